"""Records come back from the disk whole and exact, or are refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from gteopt.config.plan import BenchSpec
from gteopt.config.policy import Objective, Policy
from gteopt.config.recipe import LayerScheme
from gteopt.errors import InputError, IntegrityError
from gteopt.records.bench import BenchReport, LatencyRecord, ThroughputRecord, VariantBench
from gteopt.records.choice import Candidate, Choice
from gteopt.records.environment import MachineRecord
from gteopt.records.evaluation import EvalReport, FailedTask, Fidelity, FidelityReport, TaskScore
from gteopt.records.files import read_record, record_to_json, write_atomically, write_record
from gteopt.records.manifest import LayerRecord
from gteopt.records.results_folder import read_results

MACHINE = MachineRecord(cpu="c", n_cores=2, memory_bytes=3, gpu=None, os="o", python="3")
SPEEDS = (
    ThroughputRecord(batch_size=8, tokens=64, texts_per_s=1, tokens_per_s=100, baseline_ratio=2),
    ThroughputRecord(batch_size=8, tokens=64, texts_per_s=1, tokens_per_s=400, baseline_ratio=8),
)


def variant(device_bytes: int | None = None) -> VariantBench:
    return VariantBench(
        artifact_sha256="a",
        weight_bytes=10,
        load_s=0.1,
        imports_process_bytes=100,
        peak_process_bytes=400,
        peak_device_bytes=device_bytes,
        latency=LatencyRecord(tokens=16, n_queries=50, p50_ms=1 / 3, p95_ms=2, p99_ms=3),
        throughput=SPEEDS,
        kernels={"torch.linear": 28},
        dims=256,
        code="int8",
        bytes_per_vector=256,
        index_bytes_per_million=256_000_000,
    )


def bench() -> BenchReport:
    return BenchReport(
        spec=BenchSpec(),
        baseline="base",
        variants={"base": variant()},
        device="cpu",
        n_threads=2,
        machine=MACHINE,
        versions={"torch": "2"},
    )


def evaluation(name: str, spearman: float = 0.1 + 0.2) -> EvalReport:
    return EvalReport(
        variant=name,
        artifact_sha256="a",
        baseline="base",
        baseline_sha256="b",
        suite="mini",
        suite_sha256="s",
        tasks=(
            TaskScore(
                task="t",
                task_type="STS",
                split="test",
                subset="fr",
                metric="m",
                score=0.5,
                baseline_score=0.5,
                instruction="Ä 中文",
                dataset_revision="r",
                n_samples=7,
            ),
        ),
        failed=(FailedTask(task="u", reason="why"),),
        partial=True,
        score=0.5,
        baseline_score=0.5,
        retention=1,
        dims=4,
        code="float32",
        bytes_per_vector=16,
        fidelity=Fidelity(
            n_texts=9,
            mean_cosine=1,
            p1_cosine=1,
            neighbour_overlap=1,
            spearman=spearman,
            n_queries=4,
            n_documents=5,
            n_all_documents=5,
        ),
        machine=MACHINE,
        versions={},
    )


def choice() -> Choice:
    policy = Policy(schema="gteopt.policy/1", name="p", objective=Objective(minimise="p95_ms"))
    candidate = Candidate(name="a", metrics={"p95_ms": 2}, broken=(), on_pareto_front=True)
    return Choice(policy=policy, picked="a", reason="it is", candidates=(candidate,))


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    for record in (bench(), evaluation("a"), choice()):
        path = tmp_path / "new" / "folder" / "r.json"
        write_record(path, record)
        assert read_record(path, type(record)) == record
        assert path.read_text(encoding="utf-8") == record_to_json(record)


def test_json_names_its_schema_and_ends_in_a_newline() -> None:
    for record, schema in ((bench(), "bench"), (evaluation("a"), "eval"), (choice(), "choice")):
        assert json.loads(record_to_json(record))["schema"] == f"gteopt.{schema}/1"
        assert record_to_json(record).endswith("}\n")


def test_infinity_and_nan_survive_as_valid_json(tmp_path: Path) -> None:
    lossless = LayerRecord(
        name="q",
        out_features=2,
        in_features=2,
        method="rtn",
        scheme=LayerScheme(bits=8, group_size="per_channel", symmetric=True),
        bits_per_weight=8,
        weight_snr_db=math.inf,
        output_snr_db=math.nan,
    )
    path = tmp_path / "r.json"
    write_record(path, lossless)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    back = read_record(path, LayerRecord)
    assert back.weight_snr_db == math.inf
    assert back.output_snr_db is not None
    assert math.isnan(back.output_snr_db)


def test_records_cannot_be_changed_or_extended() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        bench().device = "cuda"
    with pytest.raises(ValidationError, match="Extra inputs"):
        MachineRecord.model_validate(MACHINE.model_dump() | {"colour": "red"})


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "r.json"
    write_record(path, bench())

    def disk_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"half")
    assert read_record(path, BenchReport) == bench()
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"x")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, r"cannot be read \(No such file or directory\)"),
        (b"", "is not a valid BenchReport"),
        (record_to_json(bench()).encode()[:-40], "is not a valid BenchReport"),
        (b"\xff\xfe", "is not a valid BenchReport"),
        (record_to_json(choice()).encode(), "schema: Input should be 'gteopt.bench/1'"),
        (
            record_to_json(bench()).replace("/1", "/2").encode(),
            "schema: Input should be 'gteopt.bench/1'",
        ),
        (
            record_to_json(bench()).replace('"load_s": 0.1', '"load_s": "x"').encode(),
            "variants.base.load_s",
        ),
    ],
    ids=["missing", "empty", "cut short", "binary", "another kind", "another version", "edited"],
)
def test_a_damaged_record_is_refused_by_name_and_reason(
    tmp_path: Path, content: bytes | None, expected: str
) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IntegrityError, match=expected) as caught:
        read_record(path, BenchReport)
    assert str(path) in str(caught.value)


def test_a_results_folder_is_read_whole(tmp_path: Path) -> None:
    write_record(tmp_path / "bench.json", bench())
    for name in ("b", "a"):
        write_record(tmp_path / "eval" / f"{name}.json", evaluation(name))
    assert read_results(tmp_path).choice is None
    write_record(tmp_path / "choice.json", choice())
    results = read_results(tmp_path)
    assert results.bench == bench()
    assert results.evals == {"a": evaluation("a"), "b": evaluation("b")}
    assert results.choice == choice()


def test_a_folder_without_results_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_results(tmp_path)
    for part in ("not a results folder", "bench.json", "gteopt bench", "eval/<variant>.json"):
        assert part in str(caught.value)


def test_an_evaluation_or_own_texts_alone_are_results(tmp_path: Path) -> None:
    report = evaluation("small").model_copy(update={"artifact_sha256": "x", "baseline_sha256": "x"})
    write_record(tmp_path / "eval" / "small.json", report)
    results = read_results(tmp_path)
    assert (results.bench, results.benched, results.baseline) == (None, {}, "small")
    common = report.model_dump(include={"fidelity", "machine", "versions", "artifact_sha256"})
    texts = FidelityReport(
        variant="int8",
        baseline="nano",
        baseline_sha256="y",
        texts="mine.txt",
        texts_sha256="z",
        dims=64,
        code="int8",
        bytes_per_vector=64,
        n_asked_texts=9,
        n_encoded_texts=9,
        notes=(),
        **common,
    )
    write_record(tmp_path / "texts" / "fidelity" / "int8.json", texts)
    alone = read_results(tmp_path / "texts")
    assert (alone.fidelity, alone.evals, alone.baseline) == ({"int8": texts}, {}, "nano")


def test_two_evaluations_of_one_variant_are_refused(tmp_path: Path) -> None:
    write_record(tmp_path / "bench.json", bench())
    for name in ("a", "copy"):
        write_record(tmp_path / "eval" / f"{name}.json", evaluation("a"))
    with pytest.raises(IntegrityError, match=r"copy.json: is a second evaluation of 'a'"):
        read_results(tmp_path)


def test_speed_over_workloads_is_a_geometric_mean() -> None:
    assert variant().tokens_per_s == pytest.approx(200)  # sqrt(100 * 400)
    assert variant().speed_ratio == pytest.approx(4)  # sqrt(2 * 8)


def test_peak_memory_is_the_devices_where_there_is_one() -> None:
    assert variant().peak_memory_bytes == 400
    assert variant(device_bytes=7).peak_memory_bytes == 7
