"""The tasks that are scored: mteb's own classes, and the mini set as subclasses of them.

Hides: how a task finds its data (the Hub, a folder in the Hub's layout, the package) and which
revision of it was read. Refuses to know: encoders, scores.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb import TaskMetadata, get_task
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.get_tasks import TASK_LIST

from gteopt.config.yaml_files import find_yaml, read_yaml
from gteopt.errors import InputError, join_problems, suggest
from gteopt.evaluation.data_check import fetch_command
from gteopt.evaluation.data_faults import data_faults
from gteopt.evaluation.instructions import INSTRUCTIONS
from gteopt.evaluation.mini_tasks import _MINI_DIR, _MINI_PATH, MINI_TASKS, _dataset
from gteopt.evaluation.mteb_isolation import isolated
from gteopt.evaluation.suites import Suite, SuiteTask
from gteopt.evaluation.user_data import Collection, Pairs, read_own
from gteopt.local_data import LocalData, describe_local_data, downloaded_commit
from gteopt.paths import shipped_dir


def load_suite(name_or_file: str) -> Suite:
    """A shipped suite by name, or one from a YAML file. Imports mteb (seconds), needs no network.

    Raises:
        InputError: no such suite; or not valid, listing every unknown task, subset and split.
    """
    path = find_yaml("eval/suites", name_or_file)
    suite = read_yaml(path, Suite)
    check_suite(suite, str(path))
    return suite


def check_suite(suite: Suite, name: str) -> None:
    """Refuse a suite with tasks, subsets or splits that mteb does not have.

    Raises:
        InputError: lists all of them; `name` is what it calls the suite.
    """
    with isolated(offline=True):
        problems = suite_problems(suite)
    if problems:
        raise InputError(join_problems(f"{name} has {len(problems)} problem(s)", problems))


_CLASSES: dict[str, Any] = {each.metadata.name: each for each in TASK_LIST}


@dataclass(frozen=True)
class ResolvedTask:
    """One task of a suite, found but not loaded.

    Attributes:
        revision: commit of the data on the Hub, or "sha256:..." of the local files that are read.
        folder: where local data lie; None where they come from the Hub.
        local: the state of a folder in the Hub's layout; None for all other data.
        max_tokens: longer texts are cut there; None is the model's limit.
        normalize: whether vectors are scaled to unit length.
        symmetric: whether the documents of a search carry the instruction, too; None where the
            suite leaves it to the model's authors.
        aggregate: name of the task that this one is a part of; its scores are reported under that
            name, with this one as a subset.
    """

    task: Any
    splits: tuple[str, ...]
    subsets: tuple[str, ...]
    instruction: str
    revision: str
    folder: Path | None
    symmetric: bool | None = None
    aggregate: str | None = None
    local: LocalData | None = None
    max_tokens: int | None = None
    normalize: bool = True

    @property
    def name(self) -> str:
        """Name of the task."""
        return str(self.task.metadata.name)


def suite_problems(suite: Suite) -> list[str]:
    """Everything that is wrong with the names in a suite: tasks, subsets, splits."""
    problems = []
    classes = _CLASSES | MINI_TASKS
    seen: set[str] = set()
    parts = _parts_by_aggregate(suite)
    for entry in suite.tasks:
        if entry.task in seen:
            problems.append(f"task '{entry.task}' is listed twice")
        seen.add(entry.task)
        problems += [
            f"task '{entry.task}' is a part of '{aggregate}', which is listed, too; remove one"
            for aggregate, names in parts.items()
            if entry.task in names
        ]
        if entry.data is not None:
            problems += _own_problems(entry, classes)
            continue
        task_class = classes.get(entry.task)
        if task_class is None:
            problems.append(f"unknown task '{entry.task}': {_suggest_task(entry.task, classes)}")
            continue
        metadata = task_class.metadata
        if entry.task in MINI_TASKS and entry.revision is not None:
            problems.append(f"task '{entry.task}' ships with gteopt; remove 'revision'")
        if hasattr(metadata, "tasks"):
            problems += _aggregate_problems(entry, [part.metadata.name for part in metadata.tasks])
            continue
        if entry.parts is not None:
            problems.append(f"task '{entry.task}' is not made of others; remove 'parts'")
        if set(metadata.modalities) != {"text"}:
            found = ", ".join(metadata.modalities)
            problems.append(f"task '{entry.task}' needs {found}; gteopt encodes text only")
            continue
        # Data may have splits that mteb does not score by default, so only its subsets are known.
        for subset in entry.subsets or ():
            if subset not in metadata.hf_subsets:
                problems.append(
                    f"task '{entry.task}' has no subset '{subset}': "
                    f"{suggest(subset, metadata.hf_subsets)}"
                )
    return problems


def resolve(suite: Suite, hub_dir: Path | None) -> list[ResolvedTask]:
    """Find every task and its data, without loading any.

    Raises:
        InputError: names that do not exist; or every folder below `hub_dir` that is missing, and
            how to fetch it.
    """
    problems = suite_problems(suite)
    if problems:
        raise InputError(join_problems(f"suite {suite.name} is not valid", problems))
    resolved = []
    own_problems: list[str] = []
    for entry in suite.tasks:
        for part, aggregate in _parts(entry):
            try:
                task = _resolve(part, aggregate, hub_dir)
                normalize = suite.normalize if entry.normalize is None else entry.normalize
                limit = entry.max_tokens or suite.max_tokens
                resolved.append(replace(task, max_tokens=limit, normalize=normalize))
            except InputError as error:
                # Own data say of which file they speak, and are there, only wrong.
                (problems if entry.data is None else own_problems).append(str(error))
    if problems:
        problems = [join_problems(f"suite {suite.name} lacks data", problems)]
    if problems or own_problems:
        raise InputError("\n".join([*own_problems, *problems]))
    return resolved


def hub_datasets() -> dict[str, str]:
    """By name of each mteb task that is not made of others, its data set on the hub."""
    return {
        name: str(each.metadata.dataset["path"])
        for name, each in _CLASSES.items()
        if not hasattr(each.metadata, "tasks")
    }


def load_data(tasks: Sequence[ResolvedTask]) -> None:
    """Load the data of tasks, before anything is encoded.

    Raises:
        InputError: names every task whose data cannot be read, or lack a split or subset.
    """
    problems = []
    for resolved in tasks:
        try:
            with nullcontext() if resolved.local is None else resolved.local.reading():
                resolved.task.load_data()
                if isinstance(resolved.task, AbsTaskRetrieval):
                    resolved.task.convert_v1_dataset_format_to_v2(num_proc=None)
                    judge_in_order_of_queries_(resolved.task)
            read_labels_at_once_(resolved.task)
        except InputError as error:
            problems.append(f"{resolved.name}: {error}")
            continue
        except Exception as error:
            # datasets, huggingface_hub and the tasks' own loaders share no exception type.
            problems.append(_unreadable(resolved, error))
            continue
        where = f"{resolved.name}: {resolved.folder or resolved.task.metadata.dataset['path']}"
        for split in resolved.splits:
            for subset in resolved.subsets:
                if split not in resolved.task.dataset.get(subset, resolved.task.dataset):
                    problems.append(
                        f"{where} has no split '{split}' of subset '{subset}'; name what it has in "
                        f"the suite (subsets, splits)"
                    )
                    continue
                of = f"{split}{'' if subset == 'default' else f' of {subset}'}"
                problems += [
                    f"{where} ({of}) {fault}" for fault in data_faults(resolved.task, split, subset)
                ]
    if problems:
        raise InputError(join_problems("data of the suite cannot be read", problems))


def judge_in_order_of_queries_(task: Any) -> None:
    """Put the judgments of a search in the order of its queries.

    mteb reads them in an order that differs from one reading to the next. Where a score merges
    queries (MindSmallReranking), the last of them decides which documents are relevant.
    """
    for splits in task.dataset.values():
        for data in splits.values():
            judged = data["relevant_docs"]
            names = dict.fromkeys(data["queries"]["id"]) | dict.fromkeys(sorted(judged))
            data["relevant_docs"] = {name: judged[name] for name in names if name in judged}


class _Labelled:
    """A data set as drawing training texts sees it, its labels in a list."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset = dataset
        self._labels = dataset[column][:]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, column: str) -> list[Any]:
        return list(self._labels)

    def select(self, rows: Sequence[int]) -> Any:
        """Those rows of the data set."""
        return self._dataset.select(rows)


def read_labels_at_once_(task: Any) -> None:
    """Make a classification read its labels column by column.

    `datasets` looks up one cell at a time where mteb draws ten training sets and computes seven
    metrics of each: several times what the regressions take. The scores are the same bits.
    """
    names = ("_undersample_data", "_calculate_scores")
    plain = isinstance(task, AbsTaskClassification) and all(
        getattr(type(task), name) is getattr(AbsTaskClassification, name) for name in names
    )
    if not plain:
        return  # of several labels a text, say, which draws and scores otherwise
    undersample, calculate = (getattr(task, name) for name in names)

    def drawing(dataset: Any, number: int, rows: list[int] | None = None) -> Any:
        return undersample(_Labelled(dataset, task.label_column_name), number, rows)

    def scoring(gold: Any, predicted: Any) -> Any:
        return calculate(gold[:], predicted)

    task._undersample_data, task._calculate_scores = drawing, scoring


def task_instruction(task: AbsTask) -> str:
    """What a task's queries are prefixed with, for models that take instructions.

    What gte-Qwen2's authors evaluate with (`instructions`), else the task's own prompt in mteb,
    which is E5-mistral's. Where there is neither, its type's counts ("Retrieve text based on user
    query.").
    """
    own = INSTRUCTIONS.get(task.metadata.name)
    prompt = task.metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get("query")
    return str(own or prompt or task.abstask_prompt)


def n_samples(task: Any, split: str, subset: str) -> int:
    """How many queries, pairs or texts the score of one split and subset is over."""
    data = task.dataset.get(subset, task.dataset)[split]
    if isinstance(task, AbsTaskRetrieval):
        return len(data["queries"])
    # Older layouts have all pairs in one row, or a set of texts to cluster in each.
    if isinstance(task, AbsTaskPairClassification) and len(data) == 1:
        return len(data[task.label_column_name][0])
    if isinstance(task, AbsTaskClusteringLegacy):
        return sum(map(len, data[task.label_column_name]))
    return len(data)


def n_texts(resolved: ResolvedTask) -> int:
    """About how many texts a task asks for: documents and queries of a search, else its rows."""
    n = 0
    for split in resolved.splits:
        for subset in resolved.subsets:
            if isinstance(resolved.task, AbsTaskRetrieval):
                n += len(resolved.task.dataset[subset][split]["corpus"])
            n += n_samples(resolved.task, split, subset)
    return n


class OwnRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
    """A user's own collection; `_own_task` gives it its metadata."""

    def __init__(self, own: Collection) -> None:
        super().__init__()
        self._own = own

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Hand over what was read; each split has the queries that it judges."""
        corpus = Dataset.from_list([dict(row) for row in self._own.corpus])
        splits: dict[str, Any] = {}
        for split, relevant in self._own.qrels.items():
            queries = [dict(row) for row in self._own.queries if row["id"] in relevant]
            splits[split] = {
                "corpus": corpus,
                "queries": _dataset(queries, ("id", "text")),
                "relevant_docs": {query: dict(grades) for query, grades in relevant.items()},
                "top_ranked": None,
            }
        self.dataset = {"default": splits}
        self.data_loaded = True


class OwnSTS(AbsTaskSTS):  # type: ignore[misc]
    """A user's own labelled pairs; `_own_task` gives them their metadata."""

    def __init__(self, own: Pairs) -> None:
        super().__init__()
        self._own = own

    def load_data(self, *args: Any, **kwargs: Any) -> None:
        """Hand over what was read."""
        columns = {
            "sentence1": list(self._own.first),
            "sentence2": list(self._own.second),
            "score": list(self._own.scores),
        }
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


def _own_task(name: str, own: Collection | Pairs) -> Any:
    """A task of a user's own data. mteb keeps metadata on the class, so each has a class."""
    is_search = isinstance(own, Collection)
    prompt = "Given a web search query, retrieve relevant passages that answer the query"
    metadata = TaskMetadata(
        name=name,
        type="Retrieval" if is_search else "STS",
        main_score="ndcg_at_10" if is_search else "cosine_spearman",
        eval_langs=["und-Zyyy"],  # ISO 639-3 and 15924: undetermined
        dataset={"path": "own", "revision": "local"},
        description="A user's own data.",
        prompt=prompt if is_search else None,
    )
    task_class: Any = OwnRetrieval if is_search else OwnSTS
    return type(task_class.__name__, (task_class,), {"metadata": metadata})(own)


def _parts(entry: SuiteTask) -> list[tuple[SuiteTask, str | None]]:
    """What an entry scores: itself, or each part of an aggregate with the aggregate's name."""
    if entry.data is not None or entry.task in MINI_TASKS:
        return [(entry, None)]
    if not hasattr(_CLASSES[entry.task].metadata, "tasks"):
        return [(entry, None)]
    names = [part.metadata.name for part in _CLASSES[entry.task].metadata.tasks]
    own = entry.model_dump(exclude={"task", "parts", "revision", "files_sha256"})
    pins = entry.parts or {}
    return [(SuiteTask(task=name, revision=pins.get(name), **own), entry.task) for name in names]


def _parts_by_aggregate(suite: Suite) -> dict[str, list[str]]:
    """Names of the tasks that each aggregate of a suite is made of."""
    metadata = {
        each.task: _CLASSES[each.task].metadata for each in suite.tasks if each.task in _CLASSES
    }
    return {
        name: [part.metadata.name for part in each.tasks]
        for name, each in metadata.items()
        if hasattr(each, "tasks")
    }


def _aggregate_problems(entry: SuiteTask, names: Sequence[str]) -> list[str]:
    problems = [
        f"task '{entry.task}' has no part '{name}': {suggest(name, names)}"
        for name in entry.parts or ()
        if name not in names
    ]
    if entry.parts and set(names) - set(entry.parts):
        missing = ", ".join(name for name in names if name not in entry.parts)
        problems.append(f"task '{entry.task}' is pinned in part only; 'parts' lacks {missing}")
    problems += [
        f"task '{entry.task}' is made of others; pin their revisions in 'parts', not '{field}'"
        for field in ("revision", "files_sha256")
        if getattr(entry, field) is not None
    ]
    if entry.subsets is not None:
        problems.append(f"task '{entry.task}' is made of others and has no subsets")
    return problems


def _own_problems(entry: SuiteTask, known: Iterable[str]) -> list[str]:
    problems = []
    if entry.task in known:
        problems.append(f"task '{entry.task}' is mteb's; give your own data another name")
    for field in ("subsets", "revision", "files_sha256", "parts"):
        if getattr(entry, field) is not None:
            problems.append(f"task '{entry.task}' is your own data; remove '{field}'")
    return problems


def _resolve_own(entry: SuiteTask, path: Path) -> ResolvedTask:
    """Read a user's own data.

    Raises:
        InputError: lists everything that is wrong with them.
    """
    own = read_own(path, entry.columns)
    task = _own_task(entry.task, own)
    has = tuple(own.qrels) if isinstance(own, Collection) else ("test",)
    unknown = [split for split in entry.splits or () if split not in has]
    if unknown:
        raise InputError(
            f"{entry.task}: {path} has no split {', '.join(unknown)}; it has {', '.join(has)}"
        )
    return ResolvedTask(
        task=task,
        splits=entry.splits or (("test",) if "test" in has else has),
        subsets=("default",),
        instruction=entry.instruction or task_instruction(task),
        revision=f"sha256:{own.sha256}",
        folder=path,
        symmetric=entry.symmetric,
    )


def _resolve(entry: SuiteTask, aggregate: str | None, hub_dir: Path | None) -> ResolvedTask:
    """Find the data of one task.

    Raises:
        InputError: no folder; or data of another revision than pinned.
    """
    if entry.data is not None:
        return _resolve_own(entry, entry.data)
    task = _make_task(entry)
    path = task.metadata.dataset["path"]
    pinned = entry.revision or task.metadata.dataset.get("revision")
    is_mini = path == _MINI_PATH
    folder: Path | None = None
    if is_mini:
        folder = shipped_dir(_MINI_DIR)
    elif hub_dir is not None:
        folder = hub_dir / path
    revision = str(pinned)
    local: LocalData | None = None
    if folder is not None:
        if not folder.is_dir():
            raise InputError(
                f"{entry.task}: no folder {folder}; fetch it with: "
                f"{fetch_command(path, pinned, folder)}"
            )
        data = describe_local_data(folder, "*.jsonl" if is_mini else "*")
        revision = f"sha256:{data.sha256}"
        if not is_mini:
            local = data
            revision = _check_pin(entry, data, path) or revision
    dataset = {**task.metadata.dataset}
    if folder is None:
        dataset["revision"] = pinned
    elif not is_mini:
        dataset |= {"path": str(folder), "revision": None}
    task.metadata = task.metadata.model_copy(update={"dataset": dataset})
    return ResolvedTask(
        task=task,
        splits=entry.splits or tuple(task.metadata.eval_splits),
        subsets=tuple(task.hf_subsets),
        instruction=entry.instruction or task_instruction(task),
        revision=revision,
        folder=folder,
        symmetric=entry.symmetric,
        aggregate=aggregate,
        local=local,
    )


def _check_pin(entry: SuiteTask, data: LocalData, path: str) -> str | None:
    """Refuse local data that are known to be of another revision than the suite's.

    A folder that `hf download --local-dir` made tells its commit, which holds as long as its files
    have the bytes that were downloaded. Of other folders, only the bytes can be compared; where the
    suite pins none, the report records their hash.

    Returns:
        The commit that the folder's files are of; None where nothing says.
    """
    commit, changed = downloaded_commit(data)
    if commit is not None and entry.revision is not None:
        if commit != entry.revision:
            raise InputError(
                f"{entry.task}: {data.folder} holds revision {commit}, but the suite pins "
                f"{entry.revision}; fetch that with: "
                f"{fetch_command(path, entry.revision, data.folder)}, or change the suite's pin"
            )
        if changed:
            raise InputError(
                f"{entry.task}: {', '.join(changed[:3])} in {data.folder} are not as downloaded "
                f"at revision {commit}; fetch them again with: "
                f"{fetch_command(path, entry.revision, data.folder)}, or remove the suite's pin"
            )
    elif entry.files_sha256 is not None and data.sha256 != entry.files_sha256:
        raise InputError(
            f"{entry.task}: the files of {data.folder} have sha256 {data.sha256}, but the suite "
            f"pins {entry.files_sha256}; they are other data, and their scores are not comparable"
        )
    return None if changed else commit


def _make_task(entry: SuiteTask) -> Any:
    if entry.task in MINI_TASKS:
        task = MINI_TASKS[entry.task]().filter_languages(None, hf_subsets=entry.subsets)
        return task.filter_eval_splits(entry.splits)
    return get_task(entry.task, hf_subsets=entry.subsets, eval_splits=entry.splits)


def _suggest_task(name: str, known: Iterable[str]) -> str:
    # mteb has more than a thousand tasks: matched whatever their case, and never listed.
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=2)
    if near:
        return f"did you mean {' or '.join(by_lower[name] for name in near)}?"
    return "`mteb available-tasks` lists mteb's"


def _unreadable(resolved: ResolvedTask, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # "an error occurred" is what `datasets` makes of it
        cause = cause.__cause__
    first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if resolved.folder is not None:
        return f"{resolved.name}: {resolved.folder} does not load ({first_line})"
    dataset = resolved.task.metadata.dataset
    path = dataset["path"]
    fetch = fetch_command(path, dataset.get("revision"), Path("DIR", path))
    return (
        f"{resolved.name}: {path} does not load from the Hub ({first_line}); to work "
        f"offline, run where there is a network: {fetch}, then give --hub-dir DIR"
    )
