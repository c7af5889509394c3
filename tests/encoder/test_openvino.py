"""The OpenVINO backend computes what torch does from the same packed weights, or refuses."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import gteopt.encoder.openvino
from gteopt.commands.evaluate import EvaluationSetup, evaluate_texts
from gteopt.commands.export import export_openvino
from gteopt.config.plan import BenchSpec, Workload
from gteopt.config.recipe import Calibration, LayerScheme, load_recipe
from gteopt.corpus.vector_cache import vector_identity
from gteopt.encoder.description import Backend
from gteopt.encoder.openvino import OpenVinoModel, OpenVinoWeights
from gteopt.errors import InputError, UnsupportedError
from gteopt.formats.packed import ReadLayer
from gteopt.model.families import Pooling
from gteopt.progress import ignore_progress
from gteopt.quant.affine import pack, quantize_rtn
from gteopt.speed.protocol import run_bench_protocol
from tests.support.random_models import random_module

SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "hidden_act": "silu"}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {**DECODER, "model_type": "qwen2", "is_causal": False},
    "qwen2 causal": {**DECODER, "model_type": "qwen2", "rope_theta": 1e6},
    "mistral": {**DECODER, "model_type": "mistral", "sliding_window": None, "head_dim": 24},
    "bert": {**SIZES, "model_type": "bert", "hidden_act": "gelu"},
}
LENGTHS = (9, 1, 4)
BACKENDS: tuple[Backend, ...] = ("torch", "openvino")
SCHEMES = {
    "2 bits": LayerScheme(bits=2, group_size=32, symmetric=False),
    "3 bits": LayerScheme(bits=3, group_size=64, symmetric=True),
    "4 bits": LayerScheme(bits=4, group_size=32, symmetric=True),
    "4 bits with zero points": LayerScheme(bits=4, group_size=128, symmetric=False),
    "4 bits, a scale a row": LayerScheme(bits=4, group_size="per_channel", symmetric=True),
    "NF4": LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4"),
    "8 bits": LayerScheme(bits=8, group_size="per_channel", symmetric=True),
    "8 bits with zero points": LayerScheme(bits=8, group_size=64, symmetric=False),
}


def padded() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    return ids * mask, mask.long()


def alone(module: Any) -> list[Tensor]:
    """Token vectors of each text in float64 without padding, by the module itself."""
    ids, _ = padded()
    hidden = []
    for row, length in zip(ids, LENGTHS, strict=True):
        mask = torch.ones(1, length, dtype=torch.int64)
        out = module.double()(input_ids=row[None, :length], attention_mask=mask)
        hidden.append(out.last_hidden_state[0])
    return hidden


def quantized(module: Any, scheme: LayerScheme) -> dict[str, ReadLayer]:
    """Round every linear layer of the blocks; the module gets the dequantized weights."""
    packed = {}
    for name, linear in module.named_modules():
        if isinstance(linear, nn.Linear) and "layer" in name:
            rounded = quantize_rtn(linear.weight.float(), scheme)
            linear.weight.data = rounded.dequantize().to(linear.weight.dtype)
            packed[name] = ReadLayer(pack(rounded))
    return packed


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_graph_computes_what_the_module_does(name: str) -> None:
    module = random_module(CONFIGS[name])
    weights = OpenVinoWeights(module.state_dict())
    graph = OpenVinoModel(
        {**CONFIGS[name], **module.config.to_dict()}, weights, dtype=torch.float32
    )
    hidden = graph(*padded())
    for row, length, expected in zip(hidden, LENGTHS, alone(module), strict=True):
        assert (row[:length] - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("pooling", ["lasttoken", "cls"])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_last_block_computes_one_token_where_pooling_reads_one(
    name: str, pooling: Pooling
) -> None:
    module = random_module(CONFIGS[name])
    config = {**CONFIGS[name], **module.config.to_dict()}
    weights = OpenVinoWeights(module.state_dict())
    graph = OpenVinoModel(config, weights, dtype=torch.float32, reads=pooling)
    hidden, at = graph(*padded()), -1 if pooling == "lasttoken" else 0
    sees_itself_alone = pooling == "cls" and name in ("qwen2 causal", "mistral")
    assert graph.pools is not sees_itself_alone
    assert hidden.shape[1] == (1 if graph.pools else max(LENGTHS))
    for row, expected in zip(hidden, alone(module), strict=True):
        assert (row[0] - expected[at]).abs().max() < 2e-5 * expected[at].abs().max()


@pytest.mark.parametrize("name", list(SCHEMES))
def test_packed_weights_stand_for_the_same_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gteopt.encoder.openvino, "_ACTIVATION_GROUP", 0)  # inputs are not rounded
    module = random_module(CONFIGS["qwen2"])
    packed = quantized(module, SCHEMES[name])
    config = {**CONFIGS["qwen2"], **module.config.to_dict()}
    graph = OpenVinoModel(config, OpenVinoWeights(module.state_dict(), packed), dtype=torch.float32)
    hidden = graph(*padded())
    for row, length, expected in zip(hidden, LENGTHS, alone(module), strict=True):
        assert (row[:length] - expected).norm() < 2e-5 * expected.norm()
    kind = "nf" if SCHEMES[name].number_format == "nf4" else "int"
    assert graph.kernels == {f"openvino.{kind}{SCHEMES[name].bits}": len(packed)}


def test_codes_stay_packed() -> None:
    module = random_module(CONFIGS["qwen2"])
    packed = quantized(module, SCHEMES["4 bits"])
    graph = OpenVinoModel(
        {**CONFIGS["qwen2"], **module.config.to_dict()},
        OpenVinoWeights(module.state_dict(), packed),
        dtype=torch.float32,
    )
    packed_names = {f"{name}.weight" for name in packed}
    rest = sum(t.nbytes for name, t in module.state_dict().items() if name not in packed_names)
    # The angles of the rotary embedding are a constant too: half a head of float32.
    assert graph.weight_bytes == sum(p.weight.n_bytes for p in packed.values()) + rest + 4 * 16


def test_act_order_reaches_the_right_columns() -> None:
    module = random_module(CONFIGS["bert"])
    packed = quantized(module, SCHEMES["8 bits with zero points"])
    for seed, (name, read) in enumerate(packed.items()):
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(linear.in_features, generator=generator)
        # Column c multiplies input order[c], so the module's weight gets its columns reordered.
        linear.weight.data = linear.weight[:, order.argsort()]
        packed[name] = replace(read, order=order)
    graph = OpenVinoModel(
        {**CONFIGS["bert"], **module.config.to_dict()},
        OpenVinoWeights(module.state_dict(), packed),
        dtype=torch.float32,
    )
    hidden = graph(*padded())
    for row, length, expected in zip(hidden, LENGTHS, alone(module), strict=True):
        assert (row[:length] - expected).norm() < 2e-5 * expected.norm()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano in int8, with an int8 token table."""
    out = tmp_path_factory.mktemp("openvino") / "int8"
    recipe = load_recipe("rtn-int8")
    weights = recipe.weights.model_copy(update={"embed_int8": True})
    gteopt.quantize("nano", recipe.model_copy(update={"weights": weights}), out)
    return out


def test_an_artifact_has_the_same_vectors_on_both_backends(artifact: Path) -> None:
    texts = ["A bridge.", "Photosynthesis turns light into sugar, in every leaf of a plant.", "水"]
    torch_encoder = gteopt.load(artifact, dtype="float32")
    fast = gteopt.load(artifact, dtype="float32", backend="openvino")
    assert fast.backend == "openvino"
    assert fast.kernels == {"openvino.int8": 28}
    assert fast.number_type == torch_encoder.number_type == "int8"
    assert abs(fast.weight_bytes / torch_encoder.weight_bytes - 1) < 0.01
    base = gteopt.load("nano", dtype="float32").encode(texts)
    by_torch, by_openvino = torch_encoder.encode(texts), fast.encode(texts)
    # Both round inputs to 8 bits, OpenVINO in groups, so it is as close to the base.
    assert (1 - (by_openvino * base).sum(1)).max() < 1.2 * (1 - (by_torch * base).sum(1)).max()
    np.testing.assert_allclose(np.linalg.norm(by_openvino, axis=1), 1, atol=1e-6)


CORES_WHILE_COMPUTING = """
import os
import threading
from contextlib import suppress

import gteopt

encoder = gteopt.load("nano", device="cpu", backend="openvino")
computing = threading.Thread(target=encoder.encode, args=(["a bridge over the river"] * 256,))
computing.start()
seen = set()
while computing.is_alive():
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):
            seen.add(tuple(os.sched_getaffinity(int(thread))))
print(seen == {tuple(os.sched_getaffinity(0))})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the cores of a thread")
def test_its_threads_may_use_every_core() -> None:
    """Threads bound to a core would share it with those of the next process."""
    command = [sys.executable, "-c", CORES_WHILE_COMPUTING]
    assert subprocess.check_output(command, text=True).split()[-1] == "True"


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano with static activations in every layer."""
    out = tmp_path_factory.mktemp("openvino") / "static"
    calibration = {"calibration": Calibration(n_texts=96, max_tokens=64)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gteopt.build.blocks.LARGEST_LOSS", np.inf)
        gteopt.quantize("nano", load_recipe("int8-static").model_copy(update=calibration), out)
    return out


def test_layers_with_static_and_with_dynamic_inputs_run_side_by_side(tmp_path: Path) -> None:
    calibration = {"calibration": Calibration(n_texts=96, max_tokens=64)}
    recipe = load_recipe("int8-static").model_copy(update=calibration)
    manifest = gteopt.quantize("nano", recipe, tmp_path / "mixed")
    n_static = sum(layer.scheme.activation_static for layer in manifest.layers)
    by_token = [layer for layer in manifest.layers if not layer.scheme.activation_static]
    assert 0 < n_static < 28
    assert all("each token's range" in (layer.note or "") for layer in by_token)
    texts = ["A bridge.", "Photosynthesis turns light into sugar, in every leaf of a plant.", "水"]
    base = gteopt.load("nano", dtype="float32").encode(texts)
    for backend in ("torch", "openvino"):
        encoder = gteopt.load(tmp_path / "mixed", dtype="float32", backend=backend)
        assert encoder.number_type == "int8"
        assert (1 - (encoder.encode(texts) * base).sum(1)).max() < 0.002
    assert encoder.kernels == {
        "openvino.int8 (static)": n_static,
        "openvino.int8": 28 - n_static,
    }


def test_static_activations_are_the_same_numbers_on_every_backend(static: Path) -> None:
    texts = ["A bridge.", "Photosynthesis turns light into sugar, in every leaf of a plant.", "水"]
    fast = gteopt.load(static, dtype="float32", backend="openvino")
    assert fast.kernels == {"openvino.int8 (static)": 28}
    assert fast.number_type == "int8"
    assert gteopt.load("nano", dtype="float32", backend="openvino").number_type == "float32"
    by_openvino, by_torch = fast.encode(texts), gteopt.load(static, dtype="float32").encode(texts)
    base = gteopt.load("nano", dtype="float32").encode(texts)
    # Sums run in another order, so a value next to a tie may get another code.
    apart, error = (1 - (by_openvino * other).sum(1).min() for other in (by_torch, base))
    assert error < 0.005
    assert apart < 0.05 * error


def test_without_vnni_static_weights_multiply_inputs_as_they_are(
    static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["A bridge.", "Photosynthesis turns light into sugar, in every leaf of a plant."]
    base = gteopt.load("nano", dtype="float32").encode(texts)
    rounded = gteopt.load(static, dtype="float32", backend="openvino").encode(texts)
    monkeypatch.setattr(gteopt.encoder.openvino, "activation_bits", lambda: 7)
    encoder = gteopt.load(static, dtype="float32", backend="openvino")
    assert encoder.kernels == {"openvino.int8 (inputs as they are: no VNNI)": 28}
    assert encoder.number_type == "float32"
    exact = encoder.encode(texts)
    assert (1 - (exact * base).sum(1)).max() < 0.5 * (1 - (rounded * base).sum(1)).max()


def test_batches_do_not_change_a_vector(artifact: Path) -> None:
    encoder = gteopt.load("nano", dtype="float32", backend="openvino")
    texts = ["short", "a text of a few more words than the first one", "and a third"]
    together = encoder.encode(texts)
    alone = np.concatenate([encoder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_cached_vectors_of_the_backends_are_kept_apart(artifact: Path) -> None:
    by_torch, by_openvino = (
        gteopt.load(artifact, backend=backend) for backend in ("torch", "openvino")
    )
    assert vector_identity(by_torch) != vector_identity(by_openvino)
    assert f"openvino {version('openvino')}" in vector_identity(by_openvino)["arithmetic"]


def test_variants_are_judged_on_it_and_the_baseline_on_torch(
    artifact: Path, tmp_path: Path
) -> None:
    lines = [f"Bridge {number} crosses the river at mile {number * 7}." for number in range(40)]
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(lines), encoding="utf-8")
    sources = {"nano": "nano", "int8": str(artifact)}
    close = {
        backend: evaluate_texts(
            sources, texts, None, how=EvaluationSetup(backend=backend), progress=ignore_progress
        )
        for backend in BACKENDS
    }
    assert close["openvino"]["nano"].fidelity == close["torch"]["nano"].fidelity
    cosines = {backend: close[backend]["int8"].fidelity.mean_cosine for backend in BACKENDS}
    assert cosines["openvino"] != cosines["torch"]  # the same weights, another arithmetic
    assert 1 - cosines["openvino"] < 1.2 * (1 - cosines["torch"])


def test_a_bench_says_what_ran_where(artifact: Path) -> None:
    spec = BenchSpec(
        query_tokens=8,
        n_queries=10,
        warmup=1,
        repeats=1,
        workloads=(Workload(batch_size=2, tokens=16),),
    )
    sources = {"nano": "nano", "int8": str(artifact)}
    report = run_bench_protocol(sources, baseline="nano", spec=spec, backend="openvino")
    assert report.variants["int8"].kernels == {"openvino.int8": 28}
    assert not any("openvino" in kernel for kernel in report.variants["nano"].kernels)
    assert report.versions["backend"] == "openvino"


def test_the_exported_graph_runs_without_gteopt(artifact: Path, tmp_path: Path) -> None:
    """openvino opens the graph, as optimum-intel does for Sentence Transformers.

    optimum-intel itself does not install beside this version of transformers.
    """
    out = tmp_path / "exported"
    export_openvino(artifact, out)
    assert not list(out.rglob("*.safetensors"))
    compiled = openvino.compile_model(
        out / "openvino" / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = dict(tokenizer(["A bridge over the river."], return_tensors="np"))
    inputs = {name: rows[name] for name in ("input_ids", "attention_mask")}
    last = compiled(inputs)["last_hidden_state"][0, -1]
    expected = gteopt.load(artifact, dtype="float32", backend="openvino")
    (vector,) = expected.encode(["A bridge over the river."])
    # OpenVINO's default has another group size for rounded inputs.
    assert vector @ (last / np.linalg.norm(last)) > 0.9995
    with pytest.raises(InputError, match="exists"):
        export_openvino(artifact, out)


@pytest.mark.parametrize("most_bytes", [1000, 1_000_000, 3_000_000])
def test_an_export_that_the_disk_has_no_room_for_says_so(
    artifact: Path, tmp_path: Path, most_bytes: int
) -> None:
    """A limit on the size of files raises the same kind of error as a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    out = tmp_path / "exported"
    command = [sys.executable, "-m", "gteopt", "export", str(artifact), str(out)]
    ran = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "cannot be written" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_openvino_cannot_compute_is_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean openvino"):
        gteopt.load(artifact, backend="openvin")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"not in torch\.float64"):
        gteopt.load(artifact, backend="openvino", dtype="float64")
    with pytest.raises(UnsupportedError, match="runs on the CPU, not on cuda"):
        gteopt.load(artifact, backend="openvino", device="cuda")
    gteopt.quantize("nano", "fp8", tmp_path / "fp8")
    with pytest.raises(UnsupportedError, match=r"layers\.0\..* is e4m3; use backend torch"):
        gteopt.load(tmp_path / "fp8", backend="openvino")
    with pytest.raises(UnsupportedError, match="and this is a qwen3 model"):
        OpenVinoModel({"model_type": "qwen3"}, OpenVinoWeights({}), dtype=torch.float32)
    wide = {**CONFIGS["qwen2"], "rope_scaling": {"rope_type": "yarn"}}
    with pytest.raises(UnsupportedError, match="usual settings"):
        OpenVinoModel(wide, OpenVinoWeights({}), dtype=torch.float32)
