"""Suites: which tasks, splits and subsets a variant is scored on.

Hides: the YAML form, and how a name is checked against mteb's tasks. Refuses to know: data,
encoders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from gteopt.config.plan import ColumnRole
from gteopt.config.yaml_files import find_yaml, read_yaml
from gteopt.frozen import Frozen

NAME = r"^[a-z0-9][a-z0-9._-]*$"
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class SuiteTask(Frozen):
    """One task of a suite.

    Attributes:
        task: name of one of mteb's tasks or of ours (`MiniSTS`, ...), or any other for own data.
        data: own data that make up this task: a folder in the BEIR layout, or a .csv or .jsonl file
            of labelled pairs.
        columns: which column of a table of own data holds what, where its name does not tell.
        subsets: mteb's subsets (mostly languages) to score; None is all that the task has.
        splits: None is those that the task is evaluated on.
        instruction: what queries are prefixed with; None is the task's own.
        symmetric: whether the documents of a search carry the instruction, too; None is as the
            model's authors do it (gte-Qwen in ArguAna, QuoraRetrieval and CQADupstackRetrieval).
        revision: commit of the data on the Hub that is read; None is the one that mteb names.
        files_sha256: hash over a local folder of the data, for folders that tell no commit.
        parts: revisions by name of the tasks that an aggregate (CQADupstackRetrieval) is made of.
        max_tokens: longer texts are cut there; None is the suite's.
        normalize: whether vectors are scaled to unit length; None is the suite's.
    """

    task: Annotated[str, Field(min_length=1)]
    data: Path | None = None
    columns: dict[ColumnRole, str] | None = None
    subsets: Names | None = None
    splits: Names | None = None
    instruction: Annotated[str, Field(min_length=1)] | None = None
    symmetric: bool | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    files_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    parts: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]] | None = None
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    normalize: bool | None = None


class Protocol(Frozen):
    """How a model's authors evaluate, where that is not how gteopt does.

    Attributes:
        source: the script that says so.
        max_tokens: longer texts are cut there; None is the model's limit.
        normalize: whether vectors are scaled to unit length.
        not_normalized: mteb's task types whose vectors keep their length all the same.
        precision: what its published figures were computed in.
    """

    schema_: Literal["gteopt.protocol/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=NAME)]
    summary: str
    source: str
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    normalize: bool = True
    not_normalized: tuple[str, ...] = ()
    precision: str


class PublishedAverage(Frozen):
    """How a benchmark differs from the average that was published under its name in 2024.

    Attributes:
        n_tasks: that the average was over.
        missing: tasks of that average that the benchmark no longer has.
        added: tasks of the benchmark that the average did not have.
    """

    n_tasks: Annotated[int, Field(ge=1)]
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


class StandsFor(Frozen):
    """What a part of a suite says of the whole.

    The forecast of the suite's mean is the intercept and the weighted sum of the part's scores.

    Attributes:
        suite: the whole.
        n_tasks: whose mean is foretold: those with published scores.
        weights: of the part's tasks.
        error: the forecast was at most this far off, 0 to 1, for a share `rate` of models.
        n_models: that told the error, and had no say in the choice of tasks.
        budget_s: the time that the part was chosen for.
    """

    suite: str
    n_tasks: int
    weights: dict[str, float]
    intercept: float
    error: float
    rate: float
    n_models: int
    budget_s: float


class Suite(Frozen):
    """Tasks that together give one score.

    Attributes:
        minutes: estimated for a 7B model on one H200 (eval/suites/README.md says how).
        max_tokens, normalize: of the tasks that do not say; see `SuiteTask`.
        protocol: whose evaluation this is, where it is not gteopt's.
        stands_for: the suite that this is a part of, where tasks were chosen to foretell its mean.
    """

    schema_: Literal["gteopt.suite/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=NAME)]
    summary: str = ""
    minutes: Annotated[float, Field(gt=0)] | None = None
    published: PublishedAverage | None = None
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    normalize: bool = True
    protocol: str | None = None
    stands_for: StandsFor | None = None
    tasks: Annotated[tuple[SuiteTask, ...], Field(min_length=1)]

    def sha256(self, contents: Mapping[str, str]) -> str:
        """Hash of everything that decides scores (name, summary and estimates do not).

        Args:
            contents: by task of own data, what stands for what was read: where they lie says
                nothing about scores.
        """
        tasks = self.model_dump(mode="json", include={"tasks"})
        for task in tasks["tasks"]:
            del task["columns"]  # `contents` covers them
            if task["data"] is not None:
                task["data"] = contents[task["task"]]
            task["max_tokens"] = task["max_tokens"] or self.max_tokens
            task["normalize"] = self.normalize if task["normalize"] is None else task["normalize"]
        return hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest()


def read_suite(name_or_file: str) -> Suite:
    """A shipped suite by name, or one from a YAML file; reads no more than that file.

    `tasks.load_suite` checks the names in it as well, which takes mteb.

    Raises:
        InputError: no such suite, or its YAML is not valid.
    """
    return read_yaml(find_yaml("eval/suites", name_or_file), Suite)


def read_protocol(name_or_file: str) -> Protocol:
    """A shipped protocol by name, or one from a YAML file.

    Raises:
        InputError: no such protocol, or its YAML is not valid.
    """
    return read_yaml(find_yaml("eval/protocols", name_or_file), Protocol)


def with_data(
    suite: Suite | None,
    path: Path,
    *,
    instruction: str | None = None,
    columns: Mapping[ColumnRole, str] | None = None,
) -> Suite:
    """A suite with one more task, made of a user's own data and called by their name.

    Without a suite, the new one has that task alone.
    """
    name = path.resolve().name if path.is_dir() else path.stem
    task = SuiteTask(
        task=name, data=path, instruction=instruction, columns=dict(columns) if columns else None
    )
    if suite is None:
        return Suite(schema="gteopt.suite/1", name="own", tasks=(task,))
    return suite.model_copy(
        update={"name": f"{suite.name}-own", "tasks": (*suite.tasks, task), "published": None}
    )
