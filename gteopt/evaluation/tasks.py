"""Find the tasks of a suite and load their data: mteb's tasks, the mini set and own data.

Hides: where a task's data are (the Hub, a folder in the Hub's layout, the package) and which
revision is read. Refuses to know: encoders, scores.
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
from gteopt.errors import InputError, join_problems, suggest_names
from gteopt.evaluation.data_check import fetch_command
from gteopt.evaluation.data_faults import data_faults
from gteopt.evaluation.instructions import INSTRUCTIONS
from gteopt.evaluation.mini_tasks import _MINI_DIR, _MINI_PATH, MINI_TASKS, _dataset
from gteopt.evaluation.mteb_isolation import isolate_mteb
from gteopt.evaluation.suites import Suite, SuiteTask
from gteopt.evaluation.user_data import Collection, Pairs, read_own_data
from gteopt.local_data import LocalData, describe_local_data, downloaded_commit
from gteopt.paths import shipped_dir


def load_suite(name_or_file: str) -> Suite:
    """A shipped suite by name, or a suite from a YAML file, with checked names.

    This imports mteb, which takes seconds, and needs no network.

    Raises:
        InputError: no such suite, or it is not valid; lists every unknown task, subset and split.
    """
    path = find_yaml("eval/suites", name_or_file)
    suite = read_yaml(path, Suite)
    check_tasks(suite, str(path))
    return suite


def check_tasks(suite: Suite, name: str) -> None:
    """Refuse a suite with tasks, subsets or splits that mteb does not have.

    Raises:
        InputError: lists all problems; `name` stands for the suite in the message.
    """
    with isolate_mteb(offline=True):
        problems = suite_problems(suite)
    if problems:
        raise InputError(join_problems(f"{name} has {len(problems)} problem(s)", problems))


_CLASSES: dict[str, Any] = {task.metadata.name: task for task in TASK_LIST}


@dataclass(frozen=True)
class ResolvedTask:
    """One task of a suite; its data are found but not loaded.

    Attributes:
        revision: commit of the data on the Hub, or "sha256:..." of the local files.
        folder: the folder of local data; None if the data come from the Hub.
        local: the state of a folder in the Hub's layout; None for all other data.
        max_tokens: longer texts are cut to this length; None is the model's limit.
        normalize: whether vectors are scaled to unit length.
        symmetric: whether the documents of a search have the instruction too; None follows the
            model's authors.
        aggregate: name of the task that this task is a part of. Scores are reported under that
            name, with this task as a subset.
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
    """All faults of the names in a suite (tasks, subsets, splits), as messages."""
    problems = []
    classes = _CLASSES | MINI_TASKS
    listed: set[str] = set()
    parts = _parts_by_aggregate(suite)
    for entry in suite.tasks:
        if entry.task in listed:
            problems.append(f"task '{entry.task}' is listed twice")
        listed.add(entry.task)
        problems += [
            f"task '{entry.task}' is a part of '{aggregate}', which is listed too; remove one"
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
            problems.append(f"task '{entry.task}' is not made of other tasks; remove 'parts'")
        if set(metadata.modalities) != {"text"}:
            modalities = ", ".join(metadata.modalities)
            problems.append(f"task '{entry.task}' needs {modalities}; gteopt encodes text only")
            continue
        # Data may have splits that mteb does not score by default, so splits are not checked here.
        for subset in entry.subsets or ():
            if subset not in metadata.hf_subsets:
                problems.append(
                    f"task '{entry.task}' has no subset '{subset}': "
                    f"{suggest_names(subset, metadata.hf_subsets)}"
                )
    return problems


def resolve_tasks(suite: Suite, hub_dir: Path | None) -> list[ResolvedTask]:
    """Find every task of a suite and its data, without loading the data.

    Raises:
        InputError: names that do not exist, or folders that are missing in `hub_dir`. Lists all,
            with the commands to download missing data.
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
                # Own data exist but have faults, and their messages name the file already.
                (problems if entry.data is None else own_problems).append(str(error))
    if problems:
        problems = [join_problems(f"suite {suite.name} lacks data", problems)]
    if problems or own_problems:
        raise InputError("\n".join([*own_problems, *problems]))
    return resolved


def hub_datasets() -> dict[str, str]:
    """The data set on the Hub of each mteb task, by name; aggregates are left out."""
    return {
        name: str(task.metadata.dataset["path"])
        for name, task in _CLASSES.items()
        if not hasattr(task.metadata, "tasks")
    }


def load_task_data(tasks: Sequence[ResolvedTask]) -> None:
    """Load the data of tasks, before anything is encoded.

    Raises:
        InputError: lists every task whose data cannot be read, or lack a split or subset.
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
                        f"{where} has no split '{split}' of subset '{subset}'; correct subsets "
                        f"and splits in the suite"
                    )
                    continue
                part = f"{split}{'' if subset == 'default' else f' of {subset}'}"
                problems += [
                    f"{where} ({part}) {fault}"
                    for fault in data_faults(resolved.task, split, subset)
                ]
    if problems:
        raise InputError(join_problems("data of the suite cannot be read", problems))


def judge_in_order_of_queries_(task: Any) -> None:
    """Put the judgments of a search in the order of its queries.

    mteb reads judgments in an order that varies between runs. If a score merges queries
    (MindSmallReranking), the last of the merged queries decides which documents are relevant.
    """
    for splits in task.dataset.values():
        for data in splits.values():
            judged = data["relevant_docs"]
            names = dict.fromkeys(data["queries"]["id"]) | dict.fromkeys(sorted(judged))
            data["relevant_docs"] = {name: judged[name] for name in names if name in judged}


class _Labelled:
    """A data set with its labels in a list, from which training texts are drawn."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset = dataset
        self._labels = dataset[column][:]

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, column: str) -> list[Any]:
        return list(self._labels)

    def select(self, rows: Sequence[int]) -> Any:
        """The given rows of the data set."""
        return self._dataset.select(rows)


def read_labels_at_once_(task: Any) -> None:
    """Make a classification read all labels of a column at once.

    mteb draws ten training sets and computes seven metrics of each, and `datasets` looks up one
    cell at a time. This takes several times as long as the regressions. Scores keep their bits.
    """
    names = ("_undersample_data", "_calculate_scores")
    plain = isinstance(task, AbsTaskClassification) and all(
        getattr(type(task), name) is getattr(AbsTaskClassification, name) for name in names
    )
    if not plain:
        return  # tasks with several labels a text, for example, draw and score in other ways
    undersample, calculate = (getattr(task, name) for name in names)

    def drawing(dataset: Any, number: int, rows: list[int] | None = None) -> Any:
        return undersample(_Labelled(dataset, task.label_column_name), number, rows)

    def scoring(gold: Any, predicted: Any) -> Any:
        return calculate(gold[:], predicted)

    task._undersample_data, task._calculate_scores = drawing, scoring


def task_instruction(task: AbsTask) -> str:
    """The instruction for a task's queries, for models that take instructions.

    It is the instruction of gte-Qwen2's authors, if they have one for the task; see `instructions`.
    Otherwise it is the task's prompt in mteb, which is E5-mistral's. If there is none, it is the
    prompt of the task type ("Retrieve text based on user query.").
    """
    by_authors = INSTRUCTIONS.get(task.metadata.name)
    prompt = task.metadata.prompt
    if isinstance(prompt, dict):
        prompt = prompt.get("query")
    return str(by_authors or prompt or task.abstask_prompt)


def n_samples(task: Any, split: str, subset: str) -> int:
    """How many queries, pairs or texts the score of one split and subset includes."""
    data = task.dataset.get(subset, task.dataset)[split]
    if isinstance(task, AbsTaskRetrieval):
        return len(data["queries"])
    # Older data sets hold all pairs in one row, or a set of texts to cluster in each row.
    if isinstance(task, AbsTaskPairClassification) and len(data) == 1:
        return len(data[task.label_column_name][0])
    if isinstance(task, AbsTaskClusteringLegacy):
        return sum(map(len, data[task.label_column_name]))
    return len(data)


def n_texts(resolved: ResolvedTask) -> int:
    """About how many texts a task encodes: documents and queries of a search, otherwise rows."""
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
        """Set the data that were read; each split has the queries that it judges."""
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
        """Set the data that were read."""
        columns = {
            "sentence1": list(self._own.first),
            "sentence2": list(self._own.second),
            "score": list(self._own.scores),
        }
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        self.data_loaded = True


def _own_task(name: str, own: Collection | Pairs) -> Any:
    """A task of a user's own data; each has a new class, because mteb keeps metadata on it."""
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
    """The tasks that an entry scores, with the name of their aggregate; None if there is none."""
    if entry.data is not None or entry.task in MINI_TASKS:
        return [(entry, None)]
    if not hasattr(_CLASSES[entry.task].metadata, "tasks"):
        return [(entry, None)]
    names = [part.metadata.name for part in _CLASSES[entry.task].metadata.tasks]
    settings = entry.model_dump(exclude={"task", "parts", "revision", "files_sha256"})
    pins = entry.parts or {}
    return [
        (SuiteTask(task=name, revision=pins.get(name), **settings), entry.task) for name in names
    ]


def _parts_by_aggregate(suite: Suite) -> dict[str, list[str]]:
    """Names of the tasks that make up each aggregate of a suite."""
    names = [entry.task for entry in suite.tasks if entry.task in _CLASSES]
    return {
        name: [part.metadata.name for part in _CLASSES[name].metadata.tasks]
        for name in names
        if hasattr(_CLASSES[name].metadata, "tasks")
    }


def _aggregate_problems(entry: SuiteTask, names: Sequence[str]) -> list[str]:
    problems = [
        f"task '{entry.task}' has no part '{name}': {suggest_names(name, names)}"
        for name in entry.parts or ()
        if name not in names
    ]
    if entry.parts and set(names) - set(entry.parts):
        missing = ", ".join(name for name in names if name not in entry.parts)
        problems.append(
            f"task '{entry.task}' pins only some of its parts; add {missing} to 'parts'"
        )
    problems += [
        f"task '{entry.task}' is made of other tasks; pin their revisions in 'parts', not '{field}'"
        for field in ("revision", "files_sha256")
        if getattr(entry, field) is not None
    ]
    if entry.subsets is not None:
        problems.append(f"task '{entry.task}' is made of other tasks and has no subsets")
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
        InputError: lists all faults of the data.
    """
    own = read_own_data(path, entry.columns)
    task = _own_task(entry.task, own)
    splits = tuple(own.qrels) if isinstance(own, Collection) else ("test",)
    unknown = [split for split in entry.splits or () if split not in splits]
    if unknown:
        raise InputError(
            f"{entry.task}: {path} has no split {', '.join(unknown)}; it has {', '.join(splits)}"
        )
    return ResolvedTask(
        task=task,
        splits=entry.splits or (("test",) if "test" in splits else splits),
        subsets=("default",),
        instruction=entry.instruction or task_instruction(task),
        revision=f"sha256:{own.sha256}",
        folder=path,
        symmetric=entry.symmetric,
    )


def _resolve(entry: SuiteTask, aggregate: str | None, hub_dir: Path | None) -> ResolvedTask:
    """Find the data of one task.

    Raises:
        InputError: the folder is missing, or its data are not of the pinned revision.
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

    A folder made by `hf download --local-dir` has a known commit, as long as its files still have
    the downloaded bytes. For other folders, only a hash of the files can be compared. If the suite
    pins no hash, the report records the hash.

    Returns:
        The commit of the folder's files; None if it is not known.
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
                f"{entry.task}: {', '.join(changed[:3])} in {data.folder} changed since the "
                f"download of revision {commit}; fetch them again with: "
                f"{fetch_command(path, entry.revision, data.folder)}, or remove the suite's pin"
            )
    elif entry.files_sha256 is not None and data.sha256 != entry.files_sha256:
        raise InputError(
            f"{entry.task}: the files of {data.folder} have sha256 {data.sha256}, but the suite "
            f"pins {entry.files_sha256}; the data differ, so their scores are not comparable"
        )
    return None if changed else commit


def _make_task(entry: SuiteTask) -> Any:
    if entry.task in MINI_TASKS:
        task = MINI_TASKS[entry.task]().filter_languages(None, hf_subsets=entry.subsets)
        return task.filter_eval_splits(entry.splits)
    return get_task(entry.task, hf_subsets=entry.subsets, eval_splits=entry.splits)


def _suggest_task(name: str, known: Iterable[str]) -> str:
    # mteb has more than a thousand tasks, too many to list. The match ignores case.
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=2)
    if near:
        return f"did you mean {' or '.join(by_lower[name] for name in near)}?"
    return "`mteb available-tasks` lists mteb's"


def _unreadable(resolved: ResolvedTask, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # `datasets` wraps the cause in "an error occurred"
        cause = cause.__cause__
    first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    if resolved.folder is not None:
        return f"{resolved.name}: {resolved.folder} does not load ({first_line})"
    dataset = resolved.task.metadata.dataset
    path = dataset["path"]
    fetch = fetch_command(path, dataset.get("revision"), Path("DIR", path))
    return (
        f"{resolved.name}: {path} does not load from the Hub ({first_line}); to work "
        f"offline, run on a machine with a network: {fetch}; then give --hub-dir DIR"
    )
