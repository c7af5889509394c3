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
from gteopt.frozen import Frozen

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


class Suite(Frozen):
    """Tasks that together give one score.

    Attributes:
        minutes: estimated for a 7B model on one H200 (eval/suites/README.md says how).
    """

    schema_: Literal["gteopt.suite/1"] = Field(alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    summary: str = ""
    minutes: Annotated[float, Field(gt=0)] | None = None
    published: PublishedAverage | None = None
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
        return hashlib.sha256(json.dumps(tasks, sort_keys=True).encode()).hexdigest()


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
