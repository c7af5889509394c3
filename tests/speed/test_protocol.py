"""The bench measures what it reports, on the embedded model in real child processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModel

import gteopt
from gteopt.config.plan import BenchSpec, Workload
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load
from gteopt.errors import GteoptError, InputError
from gteopt.machine import describe_machine, read_library_versions
from gteopt.model.checkpoint import open_checkpoint
from gteopt.records.bench import BenchReport
from gteopt.speed.child_process import FootprintQuestion, ask_child
from gteopt.speed.protocol import default_workloads, drop_long_workloads, run_bench_protocol
from gteopt.speed.texts import exact_texts

NANO = Path(gteopt.__file__).parent / "assets" / "nano"
SPEC = BenchSpec(
    query_tokens=12,
    n_queries=10,
    workloads=(Workload(batch_size=2, tokens=9), Workload(batch_size=1, tokens=33)),
    warmup=1,
    repeats=3,
)
BALLAST_BYTES = 2 * 10**9
STEPS: list[tuple[str, int, int]] = []


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return load("nano", device="cpu")


@pytest.fixture(scope="module")
def report() -> BenchReport:
    def progress(what: str, done: int, total: int) -> None:
        STEPS.append((what, done, total))

    sources = {"copy": str(NANO), "none": "nano"}
    ballast = np.ones(BALLAST_BYTES, dtype=np.uint8)
    measured = run_bench_protocol(
        sources, baseline="none", spec=SPEC, device="cpu", progress=progress
    )
    assert ballast.all()  # was held in this process while the children ran
    return measured


def test_every_variant_is_reported_with_the_baseline_first(report: BenchReport) -> None:
    assert list(report.variants) == ["none", "copy"]
    assert report.baseline == "none"
    assert report.device == "cpu"
    assert report.n_threads == torch.get_num_threads()
    assert report.versions["torch"] == torch.__version__
    assert report.versions["baseline dtype"] == "bfloat16"


def test_energy_that_nothing_counted_is_null_and_the_report_says_why(report: BenchReport) -> None:
    assert report.energy is not None
    assert "NVIDIA GPUs only" in report.energy
    for variant in report.variants.values():
        assert variant.latency.joules is None
        assert variant.graph_bytes is None
        for record in variant.throughput:
            assert record.joules_per_million_tokens is None


def test_percentiles_are_ordered_and_count_the_spec(report: BenchReport) -> None:
    for variant in report.variants.values():
        latency = variant.latency
        assert 0 < latency.p50_ms <= latency.p95_ms <= latency.p99_ms
        assert (latency.tokens, latency.n_queries) == (12, 10)


def test_throughput_covers_the_workloads_and_tokens_are_texts_times_length(
    report: BenchReport,
) -> None:
    for variant in report.variants.values():
        measured = [(record.batch_size, record.tokens) for record in variant.throughput]
        assert measured == [(2, 9), (1, 33)]
        for record in variant.throughput:
            assert record.tokens_per_s == pytest.approx(record.texts_per_s * record.tokens)


def test_the_same_model_twice_has_a_ratio_near_one(report: BenchReport) -> None:
    for variant in report.variants.values():  # the baseline's own row is measured too
        for record in variant.throughput:
            assert 0.02 < record.baseline_ratio < 50  # a broken ratio, not a noisy machine


def test_weight_bytes_are_what_transformers_allocates_for_the_model(report: BenchReport) -> None:
    module = AutoModel.from_pretrained(NANO, dtype=torch.bfloat16)
    tensors = [*module.parameters(), *module.buffers()]
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert {variant.weight_bytes for variant in report.variants.values()} == {n_bytes}


def test_vector_bytes_are_four_a_dimension_for_float32(report: BenchReport) -> None:
    for variant in report.variants.values():
        assert (variant.dims, variant.code) == (256, "float32")
        assert variant.bytes_per_vector == 1024
        assert variant.index_bytes_per_million == 1024 * 10**6


def test_a_child_holds_at_least_the_weights_on_top_of_its_imports(report: BenchReport) -> None:
    for variant in report.variants.values():
        assert variant.peak_process_bytes - variant.imports_process_bytes >= variant.weight_bytes
        assert variant.peak_device_bytes is None
        assert variant.load_s > 0


def test_a_childs_peak_does_not_contain_its_parents_memory(report: BenchReport) -> None:
    for variant in report.variants.values():
        assert variant.peak_process_bytes < BALLAST_BYTES


def test_progress_reaches_the_end_of_each_step(report: BenchReport) -> None:
    steps = {what for what, _, _ in STEPS}
    assert steps == {
        "measuring load time and memory",
        "measuring speed of none",
        "measuring speed of copy",
    }
    for step in steps:
        counts = [(done, total) for what, done, total in STEPS if what == step]
        assert [done for done, _ in counts] == list(range(1, counts[0][1] + 1))


@pytest.mark.parametrize("n_tokens", [16, 128, 512, 2048])
def test_texts_have_exactly_the_tokens_asked_for(nano: Encoder, n_tokens: int) -> None:
    texts = exact_texts(nano, 4, n_tokens, seed=0)
    assert [len(ids) for ids in nano.tokenization.tokenize(texts)] == [n_tokens] * 4
    assert len(set(texts)) == 4
    assert exact_texts(nano, 4, n_tokens, seed=0) == texts


def test_a_text_of_the_models_own_limit_is_exact_and_not_cut(nano: Encoder) -> None:
    (text,) = exact_texts(nano, 1, nano.tokenization.max_tokens, seed=0)
    assert nano.tokenization.lengths([text]) == [nano.tokenization.max_tokens]
    assert nano.tokenization.n_cut == 0


def test_a_length_that_leaves_no_room_for_text_is_refused(nano: Encoder) -> None:
    with pytest.raises(InputError, match=r"1 tokens are too few .* give at least 2"):
        exact_texts(nano, 1, 1, seed=0)


def test_all_that_is_wrong_is_said_at_once_before_anything_is_measured() -> None:
    spec = BenchSpec(query_tokens=9000, workloads=(Workload(batch_size=3, tokens=8192),))
    steps: list[str] = []
    with pytest.raises(InputError) as caught:
        run_bench_protocol(
            {"none": "nano", "ghost": "no/such-folder"},
            baseline="none",
            spec=spec,
            hub_dir=NANO,
            progress=lambda what, done, total: steps.append(what),
        )
    message = str(caught.value)
    assert "ghost (no/such-folder): " in message
    assert "query_tokens: 9000 is beyond none's limit of" in message
    assert "workload batch_size: 3, tokens: 8192 is beyond none's limit of" in message
    assert steps == []


def test_a_set_of_workloads_is_measured_as_far_as_the_model_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The long set has batches of 16,384 tokens at each length, and texts of mixed lengths."""
    long = BenchSpec.model_validate({"workloads": "long"})
    assert [workload.name for workload in long.workloads] == [
        "128x128", "32x512", "8x2048", "2x8192", "1x32768", "128x~128",
    ]  # fmt: skip
    assert {workload.batch_size * workload.tokens for workload in long.workloads[:4]} == {16_384}
    limit = open_checkpoint("nano").max_tokens
    assert [workload.longest for workload in drop_long_workloads(long, limit).workloads] == [
        128,
        512,
        2048,
        512,
    ]
    assert default_workloads("cuda:1") == "long"
    assert default_workloads("cpu") == "short"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_workloads("auto") == "long"
    with pytest.raises(ValidationError, match="did you mean long"):
        BenchSpec.model_validate({"workloads": "lon"})


def test_what_a_set_has_beyond_the_model_is_left_out_and_the_report_says_so() -> None:
    spec = SPEC.model_copy(
        update={"workloads": (*SPEC.workloads, Workload(batch_size=1, tokens=32_768))}
    )
    report = run_bench_protocol({"none": "nano"}, baseline="none", spec=spec, skip_too_long=True)
    assert report.spec == SPEC
    assert len(report.variants["none"].throughput) == len(SPEC.workloads)
    far = spec.model_copy(update={"workloads": spec.workloads[-1:]})
    with pytest.raises(InputError, match="every workload is beyond the models' limit"):
        run_bench_protocol({"none": "nano"}, baseline="none", spec=far, skip_too_long=True)


def test_a_baseline_that_is_not_among_the_sources_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="'nome' is not measured: did you mean none"):
        run_bench_protocol({"none": "nano"}, baseline="nome", spec=SPEC)


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_an_unknown_device_is_refused_before_any_model_is_opened(device: str) -> None:
    with pytest.raises(InputError, match=rf"^unknown device '{device}': use auto, cpu, cuda"):
        run_bench_protocol({"none": "no/such-folder"}, baseline="none", spec=SPEC, device=device)


def test_a_child_that_dies_is_reported_with_its_last_line() -> None:
    question = FootprintQuestion(
        source="no/such-folder", device="cpu", hub_dir=NANO, workload=SPEC.workloads[0]
    )
    with pytest.raises(GteoptError, match=r"memory of ghost .* died: .*no/such-folder"):
        ask_child("ghost", question)


def test_the_machine_is_described_without_gaps() -> None:
    here = describe_machine()
    assert here.cpu
    assert 1 <= here.n_cores <= torch.get_num_threads() * 1024
    assert here.memory_bytes > 10**8
    assert (here.gpu is None) == (not torch.cuda.is_available())
    assert read_library_versions()["numpy"] == np.__version__
