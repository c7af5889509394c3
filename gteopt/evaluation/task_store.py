"""Keep finished tasks on disk, so that they are not scored again.

Hides: the files of a task's results, and when they are still valid. Refuses to know: how a task is
scored.

    <task>-<key>/<view>.json, <view>.safetensors   scores, and the entries they are computed from
    <task>-<key>/texts.safetensors                 a sample of the task's vectors, for fidelity

`<key>` identifies everything that the task's scores depend on, except the view: the weights, the
instruction, the data, mteb and its libraries. The other tasks of the suite are not part of the key.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from gteopt.corpus.shards import ShardEncodings
from gteopt.corpus.vector_cache import CacheDtype, vector_identity
from gteopt.errors import IntegrityError
from gteopt.evaluation.fidelity import FidelitySample, read_fidelity_sample, write_fidelity_sample
from gteopt.evaluation.instructions import TaskInstruction, instructs_documents
from gteopt.evaluation.per_item_scores import Samples, read_samples, write_samples
from gteopt.evaluation.views import View
from gteopt.frozen import Frozen
from gteopt.records.environment import Conditions, MachineRecord
from gteopt.records.evaluation import SequentialTest
from gteopt.records.files import read_record, write_record

if TYPE_CHECKING:
    from gteopt.encoder.description import EncoderDescription
    from gteopt.evaluation.tasks import ResolvedTask


_SAMPLE_FILE = "texts.safetensors"


class SubsetScore(Frozen):
    """One encoder's main score on one split and subset of one task; fields as in `TaskScore`.

    Attributes:
        no_samples: why the entries of the score are not kept; None if they are.
        sequential: see `TaskScore`.
    """

    task: str
    task_type: str
    split: str
    subset: str
    metric: str
    score: float
    instruction: str | None
    dataset_revision: str
    n_samples: int
    no_samples: str | None = None
    sequential: SequentialTest | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether the score is over a part of the items."""
        return self.sequential is not None and self.sequential.is_part


class StoredTask(Frozen):
    """A finished task on disk; `key` is everything that its scores depend on.

    The entries of the scores are in a safetensors file of the same name.

    Attributes:
        machine, versions: the environment in which the task was scored. It is not part of the key,
            because a store can be moved to another machine.
    """

    schema_: Literal["gteopt.task/5"] = Field(alias="schema")
    key: dict[str, str | None]
    scores: tuple[SubsetScore, ...]
    encodings: ShardEncodings
    machine: MachineRecord
    versions: Conditions


@dataclass(frozen=True)
class FinishedTask:
    """One task's scores, their entries by (split, subset), text counts and environment."""

    scores: tuple[SubsetScore, ...]
    samples: Mapping[tuple[str, str], Samples]
    encodings: ShardEncodings
    machine: MachineRecord
    versions: Conditions


@dataclass(frozen=True)
class TaskFolder:
    """The folder of one task's results with one encoder's weights."""

    folder: Path
    name: str
    key: dict[str, str | None]

    @staticmethod
    def of(
        encoder: EncoderDescription,
        task: ResolvedTask,
        store: Path,
        dtype: CacheDtype,
        stop: str | None = None,
    ) -> TaskFolder:
        """The folder for a task; its name depends on everything that scores depend on but the view.

        Args:
            encoder: the encoder that is scored.
            task: the task with the revision of its data.
            store: the folder of all tasks.
            dtype: dtype of the cached vectors.
            stop: identifies the rule that may stop the scoring early; None if there is none.
        """
        instruction = instruction_of(encoder, task)
        key = {
            **vector_identity(encoder, dtype),
            "task": task.name,
            "splits": " ".join(task.splits),
            "subsets": " ".join(task.subsets),
            "instruction": instruction.text,
            "symmetric": str(instruction.on_documents),
            "revision": task.revision,
            "max_tokens": None if task.max_tokens is None else str(task.max_tokens),
            "normalize": str(task.normalize),
            "aggregate": task.aggregate,  # scores are reported under that name
            "mteb": version("mteb"),
            "scikit-learn": version("scikit-learn"),  # for k-means and logistic regression
        }
        if stop is not None:
            key["stop"] = stop
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return TaskFolder(store / "tasks" / f"{task.name}-{digest[:16]}", task.name, key)

    def sample(self) -> FidelitySample | None:
        """The sample of vectors; None if the file is missing or damaged."""
        path = self.folder / _SAMPLE_FILE
        try:
            return read_fidelity_sample(path) if path.is_file() else None
        except IntegrityError:
            return None

    def finished(self, view: View) -> FinishedTask | None:
        """The task's scores; None if they are missing, damaged or have another key."""
        path = self._file(view, "json")
        if not path.is_file():
            return None
        try:
            record = read_record(path, StoredTask)
            samples = read_samples(self._file(view, "safetensors"))
        except IntegrityError:
            return None  # damaged, or of an older gteopt; the task is scored again
        if record.key != self._key(view):
            return None
        return FinishedTask(
            record.scores, samples, record.encodings, record.machine, record.versions
        )

    def write_sample(self, sample: FidelitySample) -> None:
        """Save the sample of vectors."""
        write_fidelity_sample(self.folder / _SAMPLE_FILE, sample)

    def write(self, view: View, finished: FinishedTask) -> None:
        """Save scores; the record is written last, so that its entries exist when it does."""
        write_samples(self._file(view, "safetensors"), finished.samples)
        record = StoredTask(
            schema="gteopt.task/5",
            key=self._key(view),
            scores=finished.scores,
            encodings=finished.encodings,
            machine=finished.machine,
            versions=finished.versions,
        )
        write_record(self._file(view, "json"), record)

    def _key(self, view: View) -> dict[str, str | None]:
        return {**self.key, "view": view.vectors.sha256()}

    def _file(self, view: View, kind: str) -> Path:
        return self.folder / f"{view.vectors.sha256()[:16]}.{kind}"


def instruction_of(encoder: EncoderDescription, task: ResolvedTask) -> TaskInstruction:
    """The instruction that an encoder scores a task with."""
    if not encoder.takes_instructions:
        return TaskInstruction()
    family = encoder.checkpoint.family
    known = instructs_documents(family.name if family else None, task.name)
    return TaskInstruction(task.instruction, known if task.symmetric is None else task.symmetric)


def mean_over_tasks(scores: Iterable[tuple[str, float]]) -> float:
    """The mean over tasks of (task, score) pairs, averaged within each task first; NaN if empty."""
    by_task: dict[str, list[float]] = {}
    for task, score in scores:
        by_task.setdefault(task, []).append(score)
    if not by_task:
        return math.nan
    return sum(sum(values) / len(values) for values in by_task.values()) / len(by_task)
