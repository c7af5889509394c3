"""`auto` takes the faster backend, says why, and is decided once for a machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gteopt
import gteopt.encoder.fastest_backend
from gteopt.commands.evaluate import EvaluationSetup, evaluate_texts
from gteopt.config.plan import BenchSpec, Workload
from gteopt.corpus.vector_cache import vector_identity
from gteopt.encoder.description import AskedBackend, RuntimeOptions, resolve_backend
from gteopt.encoder.fastest_backend import _Blocks, choose_backend, fastest_backend
from gteopt.encoder.packed_weights import list_quantized_layers
from gteopt.errors import UnsupportedError
from gteopt.kernels.measured import DETERMINISTIC, LayerTimes
from gteopt.machine import describe_machine
from gteopt.model.checkpoint import open_checkpoint
from gteopt.progress import ignore_progress
from gteopt.speed.protocol import run_bench_protocol

CPU = torch.device("cpu")
TEXTS = ["A bridge.", "Photosynthesis turns light into sugar, in every leaf of a plant."]
SLOW = LayerTimes(few={"torch": 10, "openvino": 20}, many={"torch": 100, "openvino": 90})
FAST = LayerTimes(few={"torch": 10, "openvino": 5}, many={"torch": 100, "openvino": 90})


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fastest") / "int8"
    gteopt.quantize("nano", "rtn-int8", out)
    return out


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for times that no other test fills."""
    folder = tmp_path / "kernels"
    monkeypatch.setattr("gteopt.kernels.measured.cached_assets_path", lambda *names: folder)
    return folder


def measured_as(times: LayerTimes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every measurement find these times; the list gets the key of each."""
    keys: list[str] = []

    def measure(blocks: _Blocks) -> LayerTimes:
        keys.append(blocks.key)
        return times

    monkeypatch.setattr(_Blocks, "measure", measure)
    return keys


def test_openvino_must_be_clearly_faster_over_both_workloads() -> None:
    assert choose_backend(FAST).backend == "openvino"
    assert choose_backend(SLOW).backend == "torch"
    about_equal = LayerTimes(few={"torch": 10, "openvino": 9}, many={"torch": 10, "openvino": 9})
    assert choose_backend(about_equal).backend == "torch"
    assert "2.00 of torch's time for a text of 16 tokens" in str(choose_backend(SLOW).reason)


@pytest.mark.parametrize("recipe", ["bf16", "rtn-int8", "rtn-int4", "nf4"])
def test_both_backends_are_timed_on_blocks_of_the_model(recipe: str, tmp_path: Path) -> None:
    gteopt.quantize("nano", recipe, tmp_path / "artifact")
    checkpoint = open_checkpoint(tmp_path / "artifact")
    blocks = _Blocks.of(checkpoint, torch.float32, DETERMINISTIC)
    times = blocks.measure()
    assert times.few.keys() == times.many.keys() == {"torch", "openvino"}
    assert min(*times.few.values(), *times.many.values()) > 0
    assert len(blocks.schemes) == len(
        list_quantized_layers(checkpoint)
    )  # the nano is measured whole
    taken = fastest_backend(checkpoint, CPU, torch.float32, folder=tmp_path / "times")
    assert taken.backend in ("torch", "openvino")
    assert "of torch's time" in str(taken.reason)


def test_it_is_measured_once_and_anew_for_other_threads_versions_and_schemes(
    int8: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = measured_as(FAST, monkeypatch)
    checkpoint = open_checkpoint(int8)
    for _ in range(2):
        assert fastest_backend(checkpoint, CPU, torch.bfloat16).backend == "openvino"
    assert len(keys) == 1
    fastest_backend(checkpoint, CPU, torch.float32)
    fastest_backend(open_checkpoint("nano"), CPU, torch.bfloat16)
    monkeypatch.setattr(gteopt.encoder.fastest_backend, "version", lambda name: "another")
    fastest_backend(checkpoint, CPU, torch.bfloat16)
    assert len(set(keys)) == len(keys) == 4
    monkeypatch.setattr("torch.get_num_threads", lambda: 97)
    fastest_backend(checkpoint, CPU, torch.bfloat16)
    assert len(keys) == 5
    assert len(list(assets.glob("*.json"))) == 2


def test_torch_is_taken_where_openvino_cannot_compute_it_and_the_reason_is_said(
    int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = measured_as(FAST, monkeypatch)
    checkpoint = open_checkpoint(int8)
    reasons = {
        "is for the CPU": fastest_backend(checkpoint, torch.device("cuda"), torch.bfloat16),
        "does not compute in float64": fastest_backend(checkpoint, CPU, torch.float64),
    }
    sliding = replace(checkpoint, config={**checkpoint.config, "use_sliding_window": True})
    reasons["no operations for"] = fastest_backend(sliding, CPU, torch.bfloat16)
    packed = {**checkpoint.config, "quantization_config": {"quant_method": "gptq"}}
    foreign = replace(checkpoint, manifest=None, config=packed)
    reasons["another library quantized"] = fastest_backend(foreign, CPU, torch.bfloat16)
    with monkeypatch.context() as patch:
        small = describe_machine().model_copy(update={"memory_bytes": 1000})
        patch.setattr(gteopt.encoder.fastest_backend, "describe_machine", lambda: small)
        reasons["too little memory"] = fastest_backend(checkpoint, CPU, torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(gteopt.encoder.fastest_backend, "find_spec", lambda name: None)
        reasons["is not installed"] = fastest_backend(checkpoint, CPU, torch.bfloat16)
    for words, taken in reasons.items():
        assert taken.backend == "torch"
        assert words in str(taken.reason)
    assert keys == []  # nothing of this is measured


def test_a_library_without_an_operation_leaves_torch(
    int8: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_model(*_: object, **__: object) -> None:
        raise RuntimeError("Unsupported operation\nand a trace")

    monkeypatch.setattr(gteopt.encoder.fastest_backend, "OpenVinoModel", compile_model)
    taken = fastest_backend(open_checkpoint(int8), CPU, torch.bfloat16)
    assert taken.backend == "torch"
    assert taken.reason == "OpenVINO cannot compute it here: Unsupported operation"
    assert list(assets.glob("*.json")) == []


@pytest.mark.parametrize(("times", "backend"), [(FAST, "openvino"), (SLOW, "torch")])
def test_load_computes_as_if_the_user_had_named_what_auto_takes(
    int8: Path, times: LayerTimes, backend: AskedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_as(times, monkeypatch)
    auto, named = gteopt.load(int8, backend="auto"), gteopt.load(int8, backend=backend)
    assert auto.backend == named.backend == backend
    assert auto.runtime.backend_reason is not None
    assert named.runtime.backend_reason is None
    assert vector_identity(auto) == vector_identity(named)
    np.testing.assert_array_equal(auto.encode(TEXTS), named.encode(TEXTS))
    options = RuntimeOptions(backend="auto")
    assert resolve_backend(auto.checkpoint, options).backend == backend
    assert gteopt.inspect(int8, backend="auto").backend == backend
    assert gteopt.inspect(int8).backend is None


def test_a_bench_takes_a_backend_for_each_variant_and_its_record_says_why(
    int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_as(FAST, monkeypatch)
    spec = BenchSpec(
        query_tokens=8,
        n_queries=10,
        warmup=1,
        repeats=1,
        workloads=(Workload(batch_size=2, tokens=16),),
    )
    report = run_bench_protocol(
        {"nano": "nano", "int8": str(int8)}, baseline="nano", spec=spec, backend="auto"
    )
    assert report.versions["backend"] == "auto"
    base, variant = report.variants["nano"], report.variants["int8"]
    assert (base.backend, base.backend_reason) == ("torch", None)
    assert variant.backend == "openvino"
    assert variant.kernels == {"openvino.int8": 28}
    assert "0.50 of torch's time" in str(variant.backend_reason)


def test_an_evaluation_says_what_auto_took_and_its_baseline_is_torchs(
    int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_as(FAST, monkeypatch)
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(f"Bridge {n} is at mile {n * 7}." for n in range(20)))
    sources = {"nano": "nano", "int8": str(int8)}
    asked: tuple[AskedBackend, ...] = ("auto", "openvino")
    found = {
        each: evaluate_texts(
            sources, texts, None, how=EvaluationSetup(backend=each), progress=ignore_progress
        )
        for each in asked
    }
    auto, named = found["auto"]["int8"], found["openvino"]["int8"]
    assert auto.fidelity == named.fidelity
    assert auto.versions == named.versions
    assert [note for note in auto.notes if "which auto took: OpenVINO takes 0.50" in note]
    assert found["auto"]["nano"].versions["backend"] == "torch"


def test_an_embedding_job_goes_on_with_the_backend_that_it_began_with(
    int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out = tmp_path / "corpus.jsonl", tmp_path / "vectors"
    corpus.write_text("".join(json.dumps({"text": f"Bridge {n}"}) + "\n" for n in range(8)))
    measured_as(FAST, monkeypatch)
    first = gteopt.embed(str(corpus), int8, out, shard_rows=4, backend="auto")
    assert first.backend == "openvino"
    assert "0.50 of torch's time" in str(first.backend_reason)
    lost = sorted((out / "data").iterdir())[0]
    before = lost.read_bytes()
    lost.unlink()
    # As on another machine, or with another version of a library.
    monkeypatch.setattr(
        gteopt.encoder.fastest_backend, "choose_backend", lambda times: pytest.fail("decided again")
    )
    again = gteopt.embed(str(corpus), int8, out, shard_rows=4, backend="auto")
    assert (again.backend, again.shards_now, again.backend_reason) == ("openvino", 1, None)
    assert lost.read_bytes() == before
    gteopt.embed(str(corpus), int8, out, shard_rows=4, backend="openvino")  # the same job


def test_an_unknown_backend_is_refused(int8: Path) -> None:
    with pytest.raises(Exception, match="did you mean openvino"):
        gteopt.load(int8, backend="openvin")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="runs on the CPU"):
        gteopt.load(int8, backend="openvino", device="cuda")
