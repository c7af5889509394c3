"""Find faults of a task's data before anything is encoded.

mteb gives a meaningless score to faulty data, or fails on them after the encoding. Refuses to know:
where data come from, encoders, scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)


def data_faults(task: Any, split: str, subset: str) -> list[str]:
    """The faults of one split and subset, as messages; empty if it can be scored.

    Args:
        task: an mteb task with its data loaded.
        split: the split to check.
        subset: the subset to check.
    """
    data = task.dataset.get(subset, task.dataset)
    if isinstance(task, AbsTaskRetrieval):
        return _search_faults(data[split])
    missing = _missing_columns(task, data[split])
    if missing:
        return [missing]
    if isinstance(task, AbsTaskSTS):
        return _grade_faults(data[split]["score"])
    is_plain = not isinstance(task, AbsTaskMultilabelClassification)
    if isinstance(task, AbsTaskClassification) and is_plain:
        train = data.get(task.train_split)
        if train is None:
            return [f"has no split '{task.train_split}' to train the classifier on"]
        missing = _missing_columns(task, train)
        return [missing] if missing else _class_faults(train[task.label_column_name])
    if isinstance(task, AbsTaskPairClassification):
        labels = data[split][task.label_column_name]
        # Older data sets hold all pairs in one row.
        return _class_faults(labels[0] if len(labels) == 1 else labels)
    return []


def expected_columns(task: Any) -> tuple[str, ...]:
    """The columns that a task reads; empty if they are not known."""
    if isinstance(task, AbsTaskSTS):
        return (*task.column_names, "score")
    if isinstance(task, AbsTaskPairClassification):
        return (task.input1_column_name, task.input2_column_name, task.label_column_name)
    if isinstance(task, AbsTaskSummarization):
        return (
            task.text_column_name,
            task.human_summaries_column_name,
            task.machine_summaries_column_name,
            task.relevancy_column_name,
        )
    if isinstance(task, AbsTaskClassification | AbsTaskClustering | AbsTaskClusteringLegacy):
        return (task.input_column_name, task.label_column_name)
    return ()


def _missing_columns(task: Any, rows: Any) -> str | None:
    names = list(rows.column_names)
    if set(expected_columns(task)) <= set(names):
        return None
    return f"has the columns {', '.join(names)}; mteb expects {', '.join(expected_columns(task))}"


def _grade_faults(grades: Sequence[Any]) -> list[str]:
    values = [math.nan if grade is None else float(grade) for grade in grades]
    n_bad = sum(not math.isfinite(value) for value in values)
    if n_bad:
        return [f"{n_bad} of {len(values)} scores are not finite numbers (NaN); correct the data"]
    if len(set(values)) == 1:
        return [f"every score is {values[0]:g}; a rank correlation needs different scores"]
    return []


def _class_faults(labels: Sequence[Any]) -> list[str]:
    classes = set(labels)
    if len(classes) > 1:
        return []
    return [f"every label is {next(iter(classes), None)!r}; at least two classes are needed"]


def _search_faults(data: Any) -> list[str]:
    n_relevant = sum(
        grade > 0 for grades in data["relevant_docs"].values() for grade in grades.values()
    )
    if n_relevant:
        return []
    return ["judges no document as relevant for any query"]
