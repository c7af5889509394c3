"""A task that stops once decided encodes less, says so, and never counts as a whole score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gteopt
from gteopt.commands.evaluate import EvaluationSetup, evaluate_suite
from gteopt.config.recipe import Recipe
from gteopt.evaluation.compare import compare_item_scores
from gteopt.evaluation.item_scores_file import read_item_scores
from gteopt.evaluation.runner import SuiteEncodeOptions
from gteopt.evaluation.stopping import first_scored_part
from gteopt.evaluation.suites import Suite
from gteopt.progress import ignore_progress
from gteopt.records.evaluation import EvalReport

SUBJECTS = ("rivers", "engines", "bread", "violins", "taxes", "bees", "castles", "sails")
N = 480


def sentence(rng: np.random.Generator, subject: int) -> str:
    words = rng.choice(["old", "new", "broken", "small", "famous", "cheap", "quiet"], 2)
    return f"{words[0]} {words[1]} {SUBJECTS[subject]} number {rng.integers(100000)}"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def write_configs(folder: Path, configs: dict[str, tuple[str, list[dict[str, Any]]]]) -> None:
    card = ["---", "configs:"]
    for config, (split, rows) in configs.items():
        write_rows(folder / f"{config}.jsonl", rows)
        card.append(f"- config_name: {config}\n  data_files:")
        card.append(f"  - {{split: {split}, path: {config}.jsonl}}")
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, Path]:
    """One task of each kind that can stop, with hundreds of items, and one that cannot."""
    hub_dir = tmp_path_factory.mktemp("hub")
    rng = np.random.default_rng(0)
    query_subjects = [int(number) for number in rng.integers(0, 8, N)]
    corpus = [{"_id": f"d{j}", "title": "", "text": sentence(rng, j % 8)} for j in range(64)]
    search = hub_dir / "search"
    write_rows(search / "corpus.jsonl", corpus)
    queries = [
        {"_id": f"q{i}", "text": sentence(rng, subject)} for i, subject in enumerate(query_subjects)
    ]
    write_rows(search / "queries.jsonl", queries)
    lines = [
        f"q{i}\td{j}\t1\n" for i, s in enumerate(query_subjects) for j in range(64) if j % 8 == s
    ]
    (search / "qrels").mkdir()
    (search / "qrels" / "test.tsv").write_text("".join(lines))
    pairs = []
    for _ in range(N):
        a, b = rng.integers(0, 8, 2)
        grade = 4.0 * (a == b) + float(rng.random())
        pairs.append({"sentence1": sentence(rng, a), "sentence2": sentence(rng, b), "score": grade})
    write_rows(hub_dir / "pairs.jsonl", pairs)
    reranked = [{"_id": f"d{j}", "title": "", "text": sentence(rng, j % 8)} for j in range(4 * N)]
    names = [f"q{i}_{k}" for i in range(N) for k in range(2)]
    candidates = {name: rng.permutation(4 * N)[:12].tolist() for name in names}
    relevant = {i: {candidates[f"q{i}_{k}"][0] for k in range(2)} for i in range(N)}
    write_configs(
        hub_dir / "mteb" / "MindSmallReranking",
        {
            "corpus": ("corpus", reranked),
            "queries": (
                "queries",
                [{"_id": name, "text": sentence(rng, int(rng.integers(8)))} for name in names],
            ),
            "default": (
                "test",
                [
                    {"query-id": f"q{i}_{k}", "corpus-id": f"d{j}", "score": 1}
                    for i, rows in relevant.items()
                    for k in range(2)
                    for j in sorted(rows)
                ],
            ),
            "top_ranked": (
                "test",
                [
                    {"query-id": name, "corpus-ids": [f"d{j}" for j in rows]}
                    for name, rows in candidates.items()
                ],
            ),
        },
    )
    labels = [i % 2 for i in range(N)]
    first_subjects = [int(number) for number in rng.integers(0, 8, N)]
    sprint = {
        "sent1": [sentence(rng, subject) for subject in first_subjects],
        "sent2": [
            sentence(rng, (s + 1 - y) % 8) for s, y in zip(first_subjects, labels, strict=True)
        ],
        "labels": labels,
    }
    write_configs(
        hub_dir / "mteb" / "sprintduplicatequestions-pairclassification",
        {"default": ("test", [sprint])},
    )
    suite = Suite.model_validate(
        {
            "schema": "gteopt.suite/1",
            "name": "stops",
            "tasks": [
                {"task": "search", "data": str(search)},
                {"task": "pairs", "data": str(hub_dir / "pairs.jsonl")},
                {"task": "MindSmallReranking"},
                {"task": "SprintDuplicateQuestions", "splits": ["test"]},
                {"task": "MiniTopicClustering", "subsets": ["en"]},
            ],
        }
    )
    return suite, hub_dir


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The base, its rounded weights, and its vectors cut to four dimensions."""
    scheme = {"bits": 8, "group_size": "per_channel", "symmetric": True}
    calibration = {"n_texts": 24, "max_tokens": 16}
    recipes: dict[str, dict[str, Any]] = {
        "int8": {"weights": {"method": "rtn", "scheme": scheme}},
        "tiny": {"weights": {"method": "none"}, "dims": {"n": 4, "method": "pca"}},
    }
    paths = {"nano": "nano"}
    for name, recipe in recipes.items():
        full = {"schema": "gteopt.recipe/1", "name": name, "calibration": calibration, **recipe}
        folder = tmp_path_factory.mktemp("stops") / name
        gteopt.quantize("nano", Recipe.model_validate(full), folder, device="cpu")
        paths[name] = str(folder)
    return paths


def scored(
    sources: dict[str, str], data: tuple[Suite, Path], folder: Path, *, stops: bool
) -> dict[str, EvalReport]:
    suite, hub_dir = data
    setup = EvaluationSetup(hub_dir=hub_dir, device="cpu", correction="row", stops=stops)
    return evaluate_suite(sources, suite, folder, how=setup, margin=0.1, progress=ignore_progress)


@pytest.fixture(scope="module")
def folders(
    sources: dict[str, str], data: tuple[Suite, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, tuple[Path, dict[str, EvalReport]]]:
    results = {}
    for stops in (True, False):
        folder = tmp_path_factory.mktemp("stopped" if stops else "whole")
        results[stops] = folder, scored(sources, data, folder, stops=stops)
    return results


Folders = dict[bool, tuple[Path, dict[str, EvalReport]]]


def test_what_is_decided_encodes_less_and_says_after_how_many(folders: Folders) -> None:
    stopped, complete = folders[True][1], folders[False][1]
    for name in ("int8", "tiny"):
        assert stopped[name].n_encoded_texts < 0.9 * complete[name].n_encoded_texts, name
        by_task = {task.task: task for task in stopped[name].tasks}
        parts = [task for task in by_task.values() if task.is_stopped]
        assert len(parts) >= 2
        for task in parts:
            assert task.sequential is not None
            expected = f"after {task.sequential.n_scored} of {task.sequential.n_all}"
            assert any(task.task in note and expected in note for note in stopped[name].notes)
            assert task.difference is not None
            assert task.difference.verdict != "undecided"
        assert by_task["MiniTopicClustering"].sequential is None
    assert stopped["nano"].n_encoded_texts == complete["nano"].n_encoded_texts
    assert not any(task.is_stopped for task in stopped["nano"].tasks)


def test_a_part_never_counts_as_a_whole_in_the_mean(folders: Folders) -> None:
    for report in (folders[True][1][name] for name in ("int8", "tiny")):
        complete = [task for task in report.tasks if not task.is_stopped]
        assert complete
        assert report.score == pytest.approx(np.mean([task.score for task in complete]))
        assert report.partial
        assert report.difference is None
        assert report.retention_low is None
        assert any(f"the {len(complete)} of 5 tasks scored whole" in note for note in report.notes)


def test_the_score_of_a_part_is_that_of_its_items_in_a_whole_run(folders: Folders) -> None:
    """The oracle is the entries of the run that was not stopped."""
    for name in ("int8", "tiny"):
        complete = read_item_scores(folders[False][0] / "items" / f"{name}.parquet").item_scores
        base = read_item_scores(folders[False][0] / "items" / "nano.parquet").item_scores
        for task in folders[True][1][name].tasks:
            key = task.task, task.split, task.subset
            if task.sequential is None or not task.is_stopped:
                continue
            n = task.sequential.n_scored
            assert task.score == pytest.approx(
                first_scored_part(complete[key], n).score(), abs=2e-3
            )
            assert task.baseline_score == pytest.approx(
                first_scored_part(base[key], n).score(), abs=1e-6
            )


def test_what_is_stored_is_found_again_and_a_whole_score_is_preferred(
    folders: Folders, sources: dict[str, str], data: tuple[Suite, Path]
) -> None:
    again = scored(sources, data, folders[True][0], stops=True)
    for name, report in again.items():
        assert [task.score for task in report.tasks] == [
            task.score for task in folders[True][1][name].tasks
        ]
    complete = scored(sources, data, folders[False][0], stops=True)
    assert not any(task.is_stopped for report in complete.values() for task in report.tasks)


def test_a_task_that_the_cache_does_not_hold_is_encoded_once(
    sources: dict[str, str], data: tuple[Suite, Path]
) -> None:
    """Every look would read its documents again, and therefore encode them again."""
    suite, hub_dir = data
    search = suite.model_copy(update={"tasks": suite.tasks[:1]})
    counts = []
    for stops in (True, False):
        setup = EvaluationSetup(
            hub_dir=hub_dir,
            device="cpu",
            correction="row",
            stops=stops,
            options=SuiteEncodeOptions(cache_bytes=2000),
        )
        two_sources = {name: sources[name] for name in ("nano", "int8")}
        reports = evaluate_suite(
            two_sources, search, None, how=setup, margin=0.1, progress=ignore_progress
        )
        counts.append(reports["int8"].n_encoded_texts)
        assert not any(task.is_stopped for task in reports["int8"].tasks)
    assert counts[0] == counts[1]


def test_files_of_items_give_the_same_verdicts_without_a_model(folders: Folders) -> None:
    folder, reports = folders[True]
    comparison = compare_item_scores(
        folder / "items" / "nano.parquet",
        folder / "items" / "int8.parquet",
        margin=0.1,
        correction="row",
    )
    differences = {task.task: task.difference for task in reports["int8"].tasks}
    for task in comparison.tasks:
        expected = differences[task.task]
        assert task.difference is not None
        assert expected is not None
        assert task.difference.verdict == expected.verdict
        assert task.difference.low == pytest.approx(expected.low, abs=1e-9)
    assert comparison.difference is None


def test_mtebs_own_result_files_hold_whole_scores_alone(folders: Folders) -> None:
    folder, reports = folders[True]
    files = sorted(path.stem for path in (folder / "scores" / "results").rglob("*.json"))
    expected = [
        task.task for report in reports.values() for task in report.tasks if not task.is_stopped
    ]
    assert sorted(name for name in files if name != "model_meta") == sorted(expected)
