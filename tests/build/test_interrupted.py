"""A build that is killed, or runs out of memory or disk, keeps its finished blocks."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gteopt
from gteopt.build.replay import Block
from gteopt.config.recipe import Calibration, Dims, GptqWeights, load_recipe
from gteopt.errors import InputError, NumericsError
from gteopt.model import artifact
from gteopt.quant import gptq
from tests.support.models import MODELS, publish

NO_DEVICE_MEMORY: dict[str, tuple[str, Exception]] = {
    "torch": (
        "solve",
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 514.00 MiB. GPU 0 has a total capacity of 23.64 "
            "GiB of which 101.44 MiB is free."
        ),
    ),
    "torch in a thread": ("solve", torch.OutOfMemoryError("CUDA out of memory.")),
    "the driver": (
        "run",
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
    ),
    "a library": (
        "run",
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ),
}
"""Who reports the error -> where the test raises it in place of a GPU, and the error."""


@dataclass(frozen=True)
class Ended:
    """Exit code of a process, or its signal as a negative number; the error that it reported."""

    code: int | None
    error: str


def in_process(
    report: Connection, base: Path, out: Path, recipe: str, failure: str, at: int, room: int
) -> None:
    """Build, and let `failure` happen once `at` blocks are done, or in a later step."""
    name, _, change = recipe.partition(" ")
    wanted = load_recipe(name)
    weights = wanted.weights
    assert isinstance(weights, GptqWeights)
    if change == "compensated":
        weights = weights.model_copy(update={"gptaq_strength": 0.5})
    if change == "shortened":
        wanted = wanted.model_copy(update={"dims": Dims(n=16, method="pca")})
    if weights.scheme.group_size != "per_channel":
        scheme = weights.scheme.model_copy(update={"group_size": 32})
        weights = weights.model_copy(update={"scheme": scheme})
    spec = Calibration(n_texts=24, max_tokens=48)
    wanted = wanted.model_copy(update={"calibration": spec, "weights": weights})

    def progress(what: str, done: int, total: int) -> None:
        if failure == "kill while fitting" and what.startswith("fitting"):
            os.kill(os.getpid(), signal.SIGKILL)
        if not what.startswith("quantizing") or done != at:
            return
        if failure == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if failure == "disk":  # every file from here on ends at 1000 bytes, as on a full disk
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        if failure == "memory":  # no new page can be mapped
            resource.setrlimit(resource.RLIMIT_AS, (1, resource.RLIM_INFINITY))

    if failure in NO_DEVICE_MEMORY:
        where, error = NO_DEVICE_MEMORY[failure]
        module, name = (gptq, "solve") if where == "solve" else (Block, "run")
        real = getattr(module, name)

        def runs_out(first: object, *args: object, **more: object) -> object:
            is_here = not isinstance(first, Block) or first.name == "layers.1"
            if finished_blocks(out) == at and is_here:
                raise error
            return real(first, *args, **more)

        setattr(module, name, runs_out)
    if failure.startswith("note in "):
        run = Block.run

        def noted(block: Block, *arguments: Any) -> torch.Tensor:
            with Path(failure.removeprefix("note in ")).open("a") as file:
                file.write(f"{block.name}\n")
            return run(block, *arguments)

        Block.run = noted  # type: ignore[method-assign, assignment]
    if failure == "kill before the name":
        artifact.rename_stage = lambda stage, out: os.kill(os.getpid(), signal.SIGKILL)
    try:
        gteopt.quantize(
            base,
            wanted,
            out,
            devices=["cpu", "cpu"] if failure.endswith("in a thread") else [],
            activation_bytes=room,
            progress=progress,
        )
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        report.send(f"{type(error).__name__}: {error}")


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[ForkServerContext]:
    """Each process is a fork of one that has imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "gteopt.build.quantize",
            "transformers.models.qwen2.modeling_qwen2",
            "sentence_transformers",
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        # By default glibc reuses freed memory, and a build would need no new page.
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
        yield context


def build(
    base: Path, out: Path, recipe: str, failure: str = "-", at: int = -1, activation_bytes: int = 0
) -> Ended:
    context = multiprocessing.get_context("forkserver")
    received, report = context.Pipe(duplex=False)
    process = context.Process(
        target=in_process, args=(report, base, out, recipe, failure, at, activation_bytes)
    )
    process.start()
    report.close()
    process.join(500)
    error = ""
    with suppress(EOFError):
        error = received.recv() if received.poll() else ""
    return Ended(process.exitcode, error)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / MODELS[0].name
    publish(folder, MODELS[0])
    return folder


def content(artifact: Path) -> dict[str, bytes]:
    files = [path for path in artifact.rglob("*") if path.is_file()]
    return {path.relative_to(artifact).as_posix(): path.read_bytes() for path in files}


def finished_blocks(out: Path) -> int:
    return len(list((out.parent / f".{out.name}.partial").rglob("block-*.json")))


@pytest.mark.parametrize("recipe", ["gptq-int4", "int8", "int8 compensated", "int8-static"])
def test_killed_after_each_block_in_turn_it_ends_in_the_same_bytes(
    base: Path, tmp_path: Path, recipe: str
) -> None:
    """int8 smooths: a stored block rounds weights that absorb scales, and later blocks see that.

    With compensation the original is smoothed as well, also in blocks that a rerun only replays.
    The interrupted build keeps its hidden states on disk, the whole one in memory.
    """
    whole = build(base, tmp_path / "whole", recipe, activation_bytes=1 << 30)
    assert whole == Ended(0, "")
    for block in (1, 2):
        killed = build(base, tmp_path / "out", recipe, "kill", block)
        assert killed.code == -signal.SIGKILL
        assert finished_blocks(tmp_path / "out") == block
        assert not (tmp_path / "out").exists()
    # A kill in the middle of a write leaves the file under a temporary name.
    for name in (".tmp1a2b3c", "weights/.block-002.json.x1y2", "weights/block-002.part"):
        (tmp_path / ".out.partial" / name).write_bytes(b"half")
    assert build(base, tmp_path / "out", recipe) == Ended(0, "")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(modes) == 1  # weights have the mode of the other files


@pytest.mark.parametrize("recipe", ["gptq-int4", "int8 compensated"])
@pytest.mark.parametrize("damage", [None, "a file is short", "a batch is missing"])
def test_a_resumed_build_replays_no_finished_block_where_its_states_are_whole(
    tmp_path: Path, recipe: str, damage: str | None
) -> None:
    """Replaying one block of a 7B model takes minutes.

    Hidden states are kept if they take less than the token table, which is large here. Damaged
    states are not used.
    """
    model = replace(MODELS[0], config={**MODELS[0].config, "vocab_size": 20_000})
    base = tmp_path / "base" / model.name
    publish(base, model)
    whole = build(base, tmp_path / "whole", recipe, activation_bytes=1 << 30)
    assert whole == Ended(0, "")
    killed = build(base, tmp_path / "out", recipe, "kill", 2, activation_bytes=1 << 30)
    assert killed.code == -signal.SIGKILL
    kept = sorted((tmp_path / ".out.partial/activations/kept/2").iterdir())
    if damage == "a file is short":
        os.truncate(kept[0], kept[0].stat().st_size - 1)
    elif damage == "a batch is missing":
        kept[-1].unlink()
    replayed = tmp_path / "replayed"
    ended = build(base, tmp_path / "out", recipe, f"note in {replayed}", activation_bytes=1 << 30)
    assert ended == Ended(0, "")
    names = set(replayed.read_text().split())
    finished = {"layers.0", "layers.1"}
    assert names & finished == (set() if damage is None else finished)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("recipe", ["gptq-int4 shortened", "int8 shortened"])
def test_killed_while_vectors_are_fitted_no_block_is_done_twice(
    base: Path, tmp_path: Path, recipe: str
) -> None:
    assert build(base, tmp_path / "whole", recipe, activation_bytes=1 << 30) == Ended(0, "")
    written = []
    for _ in range(2):
        killed = build(base, tmp_path / "out", recipe, "kill while fitting")
        assert killed.code == -signal.SIGKILL
        shards = sorted((tmp_path / ".out.partial").rglob("block-*.safetensors"))
        written.append([(path.name, path.stat().st_mtime_ns) for path in shards])
    assert len(written[0]) == MODELS[0].config["num_hidden_layers"]
    assert written[1] == written[0]
    assert build(base, tmp_path / "out", recipe) == Ended(0, "")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_killed_before_the_last_rename_the_next_run_renames(base: Path, tmp_path: Path) -> None:
    assert build(base, tmp_path / "whole", "gptq-int4") == Ended(0, "")
    killed = build(base, tmp_path / "out", "gptq-int4", "kill before the name")
    assert killed.code == -signal.SIGKILL
    stage = tmp_path / ".out.partial"
    made = {path.relative_to(stage): path.stat().st_ino for path in stage.rglob("*.safetensors")}
    assert build(base, tmp_path / "out", "gptq-int4") == Ended(0, "")
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in made} == made
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("disk", r"OSError: .*block-001\.part|OSError: .*block-001|OSError: .*activations"),
        ("memory", r"GteoptError: memory ran out at layers\.1.*finished work is kept"),
    ],
)
def test_what_runs_out_is_named_and_the_next_run_goes_on(
    base: Path, tmp_path: Path, failure: str, message: str
) -> None:
    stopped = build(base, tmp_path / "out", "gptq-int4", failure, 1, activation_bytes=1 << 30)
    assert re.search(message, stopped.error), stopped
    assert finished_blocks(tmp_path / "out") == 1
    assert build(base, tmp_path / "whole", "gptq-int4") == Ended(0, "")
    assert build(base, tmp_path / "out", "gptq-int4") == Ended(0, "")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("failure", NO_DEVICE_MEMORY)
def test_a_device_without_memory_is_named_with_the_layer_and_the_next_run_goes_on(
    base: Path, tmp_path: Path, failure: str
) -> None:
    stopped = build(base, tmp_path / "out", "gptq-int4", failure, 1, activation_bytes=1 << 30)
    message = r"^GteoptError: memory ran out at layers\.1\.self_attn\.q_proj; finished work is kept"
    assert re.search(message, stopped.error), stopped
    assert finished_blocks(tmp_path / "out") == 1
    assert build(base, tmp_path / "whole", "gptq-int4") == Ended(0, "")
    assert build(base, tmp_path / "out", "gptq-int4") == Ended(0, "")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_two_builds_never_work_in_one_folder(base: Path, tmp_path: Path) -> None:
    with (
        artifact.lock_stage(artifact.stage_folder(tmp_path / "out")),
        pytest.raises(InputError, match="another process is making the same artifact"),
    ):
        gteopt.quantize(base, "rtn-int8", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    gteopt.quantize(base, "rtn-int8", tmp_path / "out")


def changed(base: Path, target: Path, name: str, index: int, value: float) -> Path:
    """A copy of the base with one number of one tensor replaced."""
    shutil.copytree(base, target)
    file = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(target / file)
    tensors[name].view(-1)[index] = value
    save_file(tensors, target / file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.mlp.up_proj.weight",
        "layers.1.post_attention_layernorm.weight",
        "layers.2.input_layernorm.weight",
    ],
)
def test_nan_names_the_tensor_and_keeps_the_blocks_before_it(
    base: Path, tmp_path: Path, name: str
) -> None:
    """A build that takes gradients first finds it before the first block."""
    bad = changed(base, tmp_path / MODELS[0].name, name, 3, float("nan"))
    for recipe, n_kept in (("gptq-int8", int(name.split(".")[1])), ("gptq-int4", 0)):
        stopped = build(bad, tmp_path / recipe, recipe)
        assert stopped.error.startswith("NumericsError")
        assert f"hold NaN or infinity ({name})" in stopped.error
        assert finished_blocks(tmp_path / recipe) == n_kept


def test_a_dead_input_feature_is_recorded_and_costs_nothing(base: Path, tmp_path: Path) -> None:
    from gteopt.model.artifact import read_manifest

    name = "layers.0.input_layernorm.weight"
    dead = changed(base, tmp_path / MODELS[0].name, name, 5, 0.0)
    assert build(dead, tmp_path / "out", "gptq-int4") == Ended(0, "")
    notes = {layer.name: layer.note or "" for layer in read_manifest(tmp_path / "out").layers}
    assert "1 input features never active" in notes["layers.0.self_attn.q_proj"]
    assert "never active" not in notes["layers.1.self_attn.q_proj"]
    assert torch.isfinite(
        torch.from_numpy(gteopt.load(tmp_path / "out").encode(["a text", "another"]))
    ).all()


def test_a_hessian_that_no_damping_mends_names_the_layer() -> None:
    """quantize_layer hands the solver a matrix with a large negative eigenvalue."""
    from gteopt.build.layers import LayerInputs, quantize_layer
    from gteopt.quant.hessian import HessianAccumulator

    weights = load_recipe("gptq-int4").weights
    assert isinstance(weights, GptqWeights)
    statistics = HessianAccumulator(128)
    statistics.add(torch.randn(200, 128))
    statistics.hessian[3, 3] = -1e6
    with pytest.raises(NumericsError, match=r"layers\.7\.mlp\.down_proj: the Hessian.*damping"):
        quantize_layer(
            "layers.7.mlp.down_proj",
            torch.randn(8, 128),
            weights.scheme,
            weights,
            LayerInputs(statistics),
            None,
        )
