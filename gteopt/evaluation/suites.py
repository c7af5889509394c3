"""Define suites: the tasks, splits and subsets that a variant is scored on.

Hides: the YAML files. Refuses to know: mteb, data, encoders.
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
        task: name of an mteb task or of a mini task (`MiniSTS`, ...). A task of own data may have
            any other name.
        data: own data of this task: a folder in the BEIR layout, or a table of labelled pairs or
            of queries with passages.
        columns: the column for each role in a table of own data, if its name is not recognised.
        subsets: mteb's subsets (mostly languages) to score; None is all subsets of the task.
        splits: splits to score; None is mteb's evaluation splits.
        instruction: the instruction that queries are prefixed with; None is the task's default.
        symmetric: whether the documents of a search have the instruction too. None follows the
            model's authors (gte-Qwen in ArguAna, QuoraRetrieval and CQADupstackRetrieval).
        revision: commit of the data on the Hub; None is the commit that mteb names.
        files_sha256: hash over a local folder of the data, if the folder has no known commit.
        parts: commits by name of the tasks that make up an aggregate (CQADupstackRetrieval).
        max_tokens: longer texts are cut to this length; None is the suite's limit.
        normalize: whether vectors are scaled to unit length; None is the suite's setting.
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
    """How a model's authors evaluate, if they do not evaluate like gteopt.

    Attributes:
        source: the script of the authors.
        max_tokens: longer texts are cut to this length; None is the model's limit.
        normalize: whether vectors are scaled to unit length.
        not_normalized: mteb's task types whose vectors keep their length in any case.
        precision: the precision of the published scores.
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
    """How a benchmark's tasks differ from the average published under its name in 2024.

    Attributes:
        n_tasks: number of tasks in the average.
        missing: tasks in the average that the benchmark no longer has.
        added: tasks of the benchmark that are not in the average.
    """

    n_tasks: Annotated[int, Field(ge=1)]
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()


class StandsFor(Frozen):
    """How the scores of a part of a suite forecast the whole suite's mean.

    The forecast is the intercept plus the weighted sum of the part's scores.

    Attributes:
        suite: name of the whole suite.
        n_tasks: number of tasks in the forecast mean: those with published scores.
        weights: weight of each task of the part.
        error: the forecast was at most this far off (0 to 1) for a share `rate` of the models.
        n_models: number of models that the error was measured on; they did not choose the tasks.
        budget_s: the time limit that the part was chosen for.
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
        minutes: estimate for a 7B model on one H200; see eval/suites/README.md.
        max_tokens, normalize: defaults for tasks that do not set them; see `SuiteTask`.
        protocol: name of the protocol; None is gteopt's.
        stands_for: the suite that this suite is a part of, if its tasks were chosen to forecast
            the mean of that suite.
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
            contents: for each task of own data, the hash of its files. It replaces their path,
                which does not affect scores.
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
    """A shipped suite by name, or a suite from a YAML file.

    The names of tasks are not checked. `tasks.load_suite` checks them too, but imports mteb.

    Raises:
        InputError: no such suite, or its YAML is not valid.
    """
    return read_yaml(find_yaml("eval/suites", name_or_file), Suite)


def read_protocol(name_or_file: str) -> Protocol:
    """A shipped protocol by name, or a protocol from a YAML file.

    Raises:
        InputError: no such protocol, or its YAML is not valid.
    """
    return read_yaml(find_yaml("eval/protocols", name_or_file), Protocol)


def add_own_task(
    suite: Suite | None,
    path: Path,
    *,
    instruction: str | None = None,
    columns: Mapping[ColumnRole, str] | None = None,
) -> Suite:
    """A suite with one more task, which is made of a user's own data and has the name of the file.

    Without a suite, the new suite has that task alone.
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
