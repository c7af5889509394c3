"""Random weights of a published shape can be measured like a model, and the report says so."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

import gteopt
from gteopt.commands.bench import bench_dummy
from gteopt.config.plan import BenchSpec, Workload
from gteopt.errors import InputError, UnsupportedError
from gteopt.model.checkpoint import open_checkpoint
from gteopt.records.bench import (
    BenchReport,
    break_even_price_per_hour,
    cost_per_million_tokens,
    index_cost_per_month,
)
from gteopt.report.terminal import bench_table, limits_table, whole_model_table
from gteopt.speed.protocol import run_bench_protocol
from gteopt.speed.random_model import largest_depth, read_model_shapes, write_random_model
from gteopt.speed.texts import text_lengths
from gteopt.speed.whole_model import extrapolate_whole_model

SMALL = {
    "model_type": "qwen2",
    "is_causal": False,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 20480,
    "rms_norm_eps": 1e-6,
}


QWEN3 = {"model_type": "qwen3", "head_dim": 32, "is_causal": None}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    return folder


def n_parameters(config: dict[str, int]) -> int:
    """Counted by hand: linear layers of the blocks and the token embeddings, norms left out."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = (config[f"num_{kind}_heads"] * width for kind in ("attention", "key_value"))
    block = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * inner
    return config["num_hidden_layers"] * block + config["vocab_size"] * hidden


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("gte-Qwen2-7B-instruct", 7.07),
        ("gte-Qwen2-1.5B-instruct", 1.54),
        ("gte-Qwen1.5-7B-instruct", 7.10),
        ("e5-mistral-7b-instruct", 7.11),
        ("NV-Embed-v1", 7.11),
        ("Qwen3-Embedding-0.6B", 0.60),
        ("Qwen3-Embedding-4B", 4.02),
        ("Qwen3-Embedding-8B", 7.57),
    ],
)
def test_shipped_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    assert n_parameters(read_model_shapes()[name]) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("changes", [{}, QWEN3], ids=["qwen2", "qwen3"])
def test_a_folder_of_random_weights_is_a_model_with_sane_activations(
    tmp_path: Path, small: Path, changes: dict[str, object]
) -> None:
    config = {**SMALL, **changes}
    (small / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    assert write_random_model(str(small), out, n_layers=2) == (2, 3)
    checkpoint = open_checkpoint(out)
    counted = sum(int(np.prod(s)) for n, s in checkpoint.tensors.items() if len(s) == 2)
    assert counted == n_parameters({**config, "num_hidden_layers": 2})  # type: ignore[dict-item]
    encoder = gteopt.load(out, dtype="float32")
    ids, mask = encoder.pad(
        encoder.tokenization.tokenize(["one text of some words", "and another"])
    )
    hidden = encoder.module(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    sizes = [float(states.std()) for states in hidden.hidden_states]
    assert all(0.01 < size < 10 for size in sizes)
    vectors = encoder.encode(["one text of some words", "and another"])
    assert abs(float(vectors[0] @ vectors[1])) < 0.9  # the text decides the vector


def test_what_cannot_be_built_is_refused_with_what_can(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="did you mean gte-Qwen2-7B-instruct"):
        write_random_model("Alibaba-NLP/gte-Qwen2-7B-instuct", tmp_path / "a")
    with pytest.raises(InputError, match="has 3 blocks; give 1 to 3"):
        write_random_model(str(small), tmp_path / "a", n_layers=4)
    (small / "config.json").write_text(json.dumps({**SMALL, "model_type": "bert"}))
    with pytest.raises(UnsupportedError, match="is a bert"):
        write_random_model(str(small), tmp_path / "a")
    memory = psutil.virtual_memory()._replace(available=4_000_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(InputError, match=r"28 of 28 blocks .* 4.0 GB are free; --layers 2 fits"):
        write_random_model("gte-Qwen2-7B-instruct", tmp_path / "a")
    memory = memory._replace(available=100_000_000_000)
    disk = shutil.disk_usage(tmp_path)._replace(free=10_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with pytest.raises(InputError, match=r"of disk in .* 10.0 GB are free; --layers 6 fits"):
        write_random_model("gte-Qwen2-7B-instruct", tmp_path / "a")
    with pytest.raises(InputError, match="cannot be calibrated, as gptq-int4 would need"):
        bench_dummy("gte-Qwen2-7B-instruct", ["gptq-int4"], spec=BenchSpec())


def test_lengths_around_a_median_are_seeded_and_bounded() -> None:
    workload = Workload(batch_size=400, tokens=128, lengths="lognormal")
    lengths = text_lengths(workload)
    assert lengths == text_lengths(workload)
    assert min(lengths) >= 16
    assert max(lengths) <= workload.longest == 512
    assert float(np.median(lengths)) == pytest.approx(128, rel=0.15)
    assert float(np.std(np.log(lengths))) == pytest.approx(0.8, rel=0.15)


def test_prices_are_machine_hours_over_tokens() -> None:
    assert cost_per_million_tokens(3.6, 1000) == pytest.approx(1.0)
    even = break_even_price_per_hour(36_000)
    assert cost_per_million_tokens(even, 36_000) == pytest.approx(0.008)


def test_a_backend_that_does_not_know_the_architecture_refuses_before_anything_is_built() -> None:
    steps: list[str] = []
    with pytest.raises(UnsupportedError, match="this is a qwen3 model; use backend torch"):
        bench_dummy(
            "Qwen3-Embedding-0.6B",
            ["rtn-int8"],
            spec=BenchSpec(),
            n_layers=1,
            backend="openvino",
            progress=lambda what, done, total: steps.append(what),
        )
    assert not steps


def test_a_bench_refuses_an_unknown_architecture_beside_its_other_problems(tmp_path: Path) -> None:
    config = {**SMALL, "model_type": "qwen3"}
    shape = tmp_path / "shape"
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps(config))
    write_random_model(str(shape), tmp_path / "qwen3")
    with pytest.raises(InputError, match="this is a qwen3 model") as refused:
        run_bench_protocol(
            {"nano": "nano", "qwen3": str(tmp_path / "qwen3"), "gone": str(tmp_path / "gone")},
            baseline="nano",
            spec=BenchSpec(),
            backend="openvino",
        )
    assert "gone" in str(refused.value)


def test_the_bench_of_random_weights_says_what_it_measured(small: Path) -> None:
    spec = BenchSpec(
        query_tokens=8,
        n_queries=10,
        workloads=(
            Workload(batch_size=2, tokens=32),
            Workload(batch_size=5, tokens=32, lengths="lognormal"),
        ),
        warmup=0,
        repeats=1,
    )
    kept: list[BenchReport] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no estimate for the whole model")  # times are noisy
        report = bench_dummy(
            str(small), ["rtn-int8"], spec=spec, n_layers=2, keep=kept.append, device="cpu"
        )
    assert [len(partial.variants) for partial in kept][:2] == [1, 2]
    assert report.dummy is not None
    assert report.dummy.shallow_layers in (1, None)
    assert (report.dummy.n_layers, report.dummy.of_layers) == (2, 3)
    assert list(report.variants) == ["bf16", "rtn-int8"]
    assert {"float32", "bfloat16"} <= set(report.peak_gflops)
    linear = n_parameters({**SMALL, "num_hidden_layers": 2, "vocab_size": 0})  # type: ignore[dict-item]
    for variant in report.variants.values():
        equal, mixed = variant.throughput
        # The last block computes all but keys and values for the one pooled token only.
        once = 2 * 64 * 64 + 3 * 64 * 128
        operations = 2 * ((linear - once) * 32 + once) + 4 * 64 * 32 * (32 + 1)
        assert equal.gflops == pytest.approx(operations * equal.texts_per_s / 1e9)
        n_tokens = sum(text_lengths(spec.workloads[1]))
        assert mixed.tokens_per_s == pytest.approx(n_tokens * mixed.texts_per_s / 5)
        assert variant.latency.weight_gb_per_s is not None
        assert variant.latency.weight_gb_per_s > 0
    int8 = report.variants["rtn-int8"].throughput[0]
    assert int8.gflops is not None
    assert int8.peak_ratio == pytest.approx(int8.gflops / report.peak_gflops["int8"])
    one_depth = report.model_copy(
        update={"dummy": report.dummy.model_copy(update={"whole": {}, "shallow_layers": None})}
    )
    priced = one_depth.model_copy(update={"price_per_hour": 2.0})
    assert "2 of the 3 blocks" in str(bench_table(priced).caption)
    caption = str(bench_table(priced).caption)
    assert "rtn-int8: 14 cpu.int8" in caption
    assert f"{report.spec.repeats} repeats are too few to say how sure a ratio is" in caption
    assert "the deviation of their logarithm is 0.8" in caption
    memory = report.machine.memory_bytes
    share = report.variants["bf16"].index_bytes_per_million / memory
    assert index_cost_per_month(2.0, int(share * memory), memory) == pytest.approx(1460 * share)
    cells = [list(column.cells) for column in limits_table(priced).columns]
    assert set(cells[-1]) == {f"{1460 * share:.2f}"}
    assert set(limits_table(report).columns[-1].cells) == {"–"}
    assert [cell for cell in cells[1] if "~" in str(cell)] == ["5x~32"] * 2
    assert set(cells[5]) == set(cells[6]) == {"–"}  # a part of a model has no price
    assert "more than the peak" not in str(limits_table(with_share(priced, 1.05)).caption)
    assert "more than the peak" in str(limits_table(with_share(priced, 1.9)).caption)
    assert whole_model_table(one_depth) is None

    # Times are linear in depth here, so a third depth lies on the line through two.
    def at_depth(depth: int) -> BenchReport:
        variants = {
            name: variant.model_copy(
                update={
                    "latency": variant.latency.model_copy(update={"p50_ms": 1 + 3.0 * depth}),
                    "weight_bytes": 1000 + 50 * depth,
                    "throughput": tuple(
                        row.model_copy(update={"tokens_per_s": 1000 / (2 + depth)})
                        for row in variant.throughput
                    ),
                }
            )
            for name, variant in report.variants.items()
        }
        return report.model_copy(update={"variants": variants})

    whole = extrapolate_whole_model(at_depth(8), at_depth(4), (8, 4), 28)
    for name, variant in at_depth(28).variants.items():
        assert whole[name].query_ms == pytest.approx(variant.latency.p50_ms)
        assert whole[name].tokens_per_s == pytest.approx(variant.tokens_per_s)
        assert whole[name].weight_bytes == variant.weight_bytes
    with pytest.raises(InputError, match="not slower with 8 blocks than with 4"):
        extrapolate_whole_model(at_depth(4), at_depth(8), (8, 4), 28)
    dummy = report.dummy.model_copy(update={"whole": whole, "shallow_layers": 4})
    known = priced.model_copy(update={"dummy": dummy})
    speed = whole["rtn-int8"].tokens_per_s
    assert known.cost_per_million_tokens("rtn-int8") == cost_per_million_tokens(2.0, speed)
    table = whole_model_table(known)
    assert table is not None
    assert "calculated, not measured" in str(table.caption)


def test_a_model_that_memory_holds_is_measured_whole(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_depth(str(small), tmp_path) == 3
    block = 2 * n_parameters({**SMALL, "num_hidden_layers": 1, "vocab_size": 0})  # type: ignore[dict-item]
    frame = 2 * SMALL["vocab_size"] * SMALL["hidden_size"]  # type: ignore[operator]
    room = 1.7 * (frame + 2.5 * block)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=room))
    assert largest_depth(str(small), tmp_path) == 2


def with_share(report: BenchReport, share: float) -> BenchReport:
    """The report with this share of the peak in every row."""
    variants = {
        name: variant.model_copy(
            update={
                "throughput": tuple(
                    row.model_copy(update={"peak_ratio": share}) for row in variant.throughput
                )
            }
        )
        for name, variant in report.variants.items()
    }
    return report.model_copy(update={"variants": variants})
