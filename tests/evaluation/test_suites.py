"""Shipped suites are mteb's benchmarks, and their pinned revisions are kept."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gteopt.config.yaml_files import list_shipped_names
from gteopt.errors import InputError
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_suite

BENCHMARKS = {
    "mteb-en": ("MTEB(eng, v1)", 56),
    "c-mteb": ("MTEB(cmn, v1)", 31),
    "mteb-fr": ("MTEB(fra, v1)", 25),
    "mteb-pl": ("MTEB(pol, v1)", 17),
}


def suite_of(*tasks: dict[str, Any]) -> Suite:
    return Suite.model_validate({"schema": "gteopt.suite/1", "name": "test", "tasks": tasks})


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_suite_is_mtebs_own_definition(name: str) -> None:
    import mteb

    benchmark, n_tasks = BENCHMARKS[name]
    suite = {task.task: task for task in load_suite(name).tasks}
    assert len(suite) == n_tasks
    for task in mteb.get_benchmark(benchmark).tasks:
        entry = suite.pop(task.metadata.name)
        assert list(entry.splits or ()) == list(task.eval_splits)
        if hasattr(task.metadata, "tasks"):
            revisions = {p.metadata.name: p.metadata.dataset["revision"] for p in task.tasks}
            assert entry.parts == revisions
        else:
            assert list(entry.subsets or ("default",)) == list(task.hf_subsets)
            assert entry.revision == task.metadata.dataset["revision"]
    assert suite == {}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_suite_accounts_for_the_average_of_2024(name: str) -> None:
    suite = load_suite(name)
    published = suite.published
    assert published is not None
    assert published.n_tasks == len(suite.tasks) + len(published.missing) - len(published.added)


@pytest.mark.parametrize(
    ("name", "n_tasks"), [("mteb-en", 56), ("c-mteb", 35), ("mteb-fr", 26), ("mteb-pl", 26)]
)
def test_the_list_of_2024_is_there_with_every_task_pinned(name: str, n_tasks: int) -> None:
    """The suite itself is that list if mteb's definition has not changed."""
    now = load_suite(name).published
    assert now is not None
    moved = bool(now.missing or now.added)
    suite = load_suite(f"{name}-2024" if moved else name)
    assert len(suite.tasks) == n_tasks
    assert suite.published is not None
    assert not suite.published.missing
    assert not suite.published.added
    names = {task.task for task in suite.tasks}
    assert {missing.partition(" (")[0] for missing in now.missing} <= names
    assert not set(now.added) & names
    for task in suite.tasks:
        assert task.revision or task.parts, task.task
        assert task.splits


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_lite_suite_covers_every_task_type_with_tasks_of_the_whole(name: str) -> None:
    import mteb

    def types(suite: Suite) -> set[str]:
        return {mteb.get_task(task.task).metadata.type for task in suite.tasks}

    full, lite = load_suite(name), load_suite(f"{name}-lite")
    assert all(task in full.tasks for task in lite.tasks)
    assert types(lite) == types(full)
    assert lite.minutes is not None
    assert full.minutes is not None
    assert lite.minutes <= min(10, full.minutes / 3)


def test_every_shipped_suite_loads_and_pins_what_it_downloads() -> None:
    from gteopt.evaluation.mini_tasks import MINI_TASKS

    for name in list_shipped_names("eval/suites"):
        for task in load_suite(name).tasks:
            assert task.task in MINI_TASKS or task.revision or task.parts, (name, task.task)


def test_the_parts_of_an_aggregate_count_as_subsets_of_one_task(tmp_path: Path) -> None:
    from gteopt.evaluation.tasks import resolve_tasks

    suite = suite_of({"task": "CQADupstackRetrieval"})
    parts = resolve_tasks(suite, None)
    assert len(parts) == 12
    assert {part.aggregate for part in parts} == {"CQADupstackRetrieval"}
    with pytest.raises(InputError) as caught:
        resolve_tasks(suite, tmp_path)
    assert str(caught.value).count("hf download") == 12


def test_data_of_another_revision_than_pinned_are_refused(tmp_path: Path) -> None:
    from gteopt.evaluation.tasks import resolve_tasks

    folder = tmp_path / "mteb" / "stsbenchmark-sts"
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps({"sentence1": "a"}) + "\n")

    def note(commit: str) -> None:
        etag = hashlib.sha256((folder / "test.jsonl").read_bytes()).hexdigest()
        (notes / "test.jsonl.metadata").write_text(f"{commit}\n{etag}\n1700000000.0\n")

    pinned = {"task": "STSBenchmark", "revision": "a" * 40}
    note("b" * 40)
    with pytest.raises(InputError) as caught:
        resolve_tasks(suite_of(pinned), tmp_path)
    for expected in ("b" * 40, "a" * 40, f"--revision {'a' * 40}", str(folder)):
        assert expected in str(caught.value)
    note("a" * 40)
    assert resolve_tasks(suite_of(pinned), tmp_path)[0].revision == "a" * 40

    (notes / "test.jsonl.metadata").unlink()
    by_content = resolve_tasks(suite_of(pinned), tmp_path)[0].revision
    assert by_content.startswith("sha256:")
    content = by_content.removeprefix("sha256:")
    assert resolve_tasks(suite_of({**pinned, "files_sha256": content}), tmp_path)
    with pytest.raises(InputError, match="the data differ"):
        resolve_tasks(suite_of({**pinned, "files_sha256": "0" * 64}), tmp_path)


def test_a_pinned_revision_is_what_the_hub_is_asked_for() -> None:
    from gteopt.evaluation.tasks import resolve_tasks

    resolved = resolve_tasks(suite_of({"task": "STSBenchmark", "revision": "c" * 40}), None)[0]
    assert resolved.task.metadata.dataset["revision"] == resolved.revision == "c" * 40


def test_wrong_pins_of_a_suite_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "schema: gteopt.suite/1\nname: own\ntasks:\n"
        f"  - {{task: CQADupstackRetrieval, revision: {'a' * 40}}}\n"
        "  - {task: CQADupstackAndroidRetrieval}\n"
        f"  - {{task: MiniSTS, revision: {'a' * 40}}}\n"
        f"  - {{task: STSBenchmark, parts: {{STSBenchmark: {'a' * 40}}}}}\n"
    )
    with pytest.raises(InputError) as caught:
        load_suite(str(path))
    message = str(caught.value)
    assert "pin their revisions in 'parts', not 'revision'" in message
    assert "'CQADupstackAndroidRetrieval' is a part of 'CQADupstackRetrieval'" in message
    assert "'MiniSTS' ships with gteopt; remove 'revision'" in message
    assert "'STSBenchmark' is not made of other tasks" in message


def test_the_offline_data_are_as_pinned(shared: Path) -> None:
    from gteopt.evaluation.tasks import resolve_tasks

    assert len(resolve_tasks(load_suite("offline"), shared / "hub")) == 7


@pytest.mark.parametrize("name", [*BENCHMARKS, "offline"])
def test_every_task_of_a_benchmark_has_an_instruction_of_its_own(name: str) -> None:
    """No task uses the sentence that mteb has for all tasks of a type."""
    from gteopt.evaluation.tasks import resolve_tasks

    for resolved in resolve_tasks(load_suite(name), None):
        assert resolved.instruction != resolved.task.abstask_prompt, resolved.name


def test_instructions_are_those_of_gte_qwen2s_authors() -> None:
    """Some of each kind, from scripts/eval_mteb.py of Alibaba-NLP/gte-Qwen2-7B-instruct."""
    from gteopt.evaluation.instructions import instructs_documents
    from gteopt.evaluation.tasks import resolve_tasks

    expected = {
        "STSBenchmark": ("Retrieve semantically similar text", False),
        "Banking77Classification": (
            "Given a online banking query, find the corresponding intents",
            False,
        ),
        "ArguAna": ("Given a claim, find documents that refute the claim", True),
        "QuoraRetrieval": (
            "Given a question, retrieve questions that are semantically equivalent to the given "
            "question",
            True,
        ),
        "SciFact": (
            "Given a scientific claim, retrieve documents that support or refute the claim",
            False,
        ),
        "MLSUMClusteringS2S": (
            "Identify the topic or theme of the given articles based on the titles",
            False,
        ),
        "CBD": ("Classify the sentiment of polish tweet reviews", False),
        "T2Reranking": (
            "Given a Chinese search query, retrieve web passages that answer the question",
            False,
        ),
    }
    tasks = resolve_tasks(suite_of(*({"task": name} for name in expected)), None)
    assert {
        task.name: (task.instruction, instructs_documents("gte-qwen", task.name)) for task in tasks
    } == expected
    forums = resolve_tasks(suite_of({"task": "CQADupstackRetrieval"}), None)
    assert all(instructs_documents("gte-qwen", task.name) for task in forums)
    assert all("duplicates to" in task.instruction for task in forums)
    assert not instructs_documents("e5-mistral", "ArguAna")
    for name in ("ArguAna-PL", "ArguAna-Fa", "ArguAna-NL"):
        assert instructs_documents("gte-qwen", name)
        assert not instructs_documents("e5-mistral", name)


def test_a_suite_overrides_instruction_and_symmetry() -> None:
    from gteopt.evaluation.tasks import resolve_tasks

    (task,) = resolve_tasks(
        suite_of({"task": "ArguAna", "instruction": "Refute.", "symmetric": False}), None
    )
    assert (task.instruction, task.symmetric) == ("Refute.", False)
