"""A task of mteb's on some of its queries, pairs or texts.

Hides: where each kind of task keeps its items, and in which order their scores come. Refuses to
know: which items are wanted and why, encoders, scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)

from gteopt.evaluation.per_item_scores import Array
from gteopt.evaluation.predictions import merges_queries


@contextmanager
def only(task: Any, split: str, subset: str, rows: Array) -> Iterator[None]:
    """Leave a task no other items of one split and subset inside of this.

    Args:
        task: with its data.
        split: that is cut.
        subset: that is cut.
        rows: of the items, ascending, in the order of `Samples`.
    """
    container = task.dataset.get(subset, task.dataset)
    whole = container[split]
    container[split] = _part(task, whole, rows)
    try:
        yield
    finally:
        container[split] = whole


def _part(task: Any, whole: Any, rows: Array) -> Any:
    if isinstance(task, AbsTaskRetrieval):
        return _search(task, whole, rows)
    assert isinstance(task, AbsTaskSTS | AbsTaskPairClassification | AbsTaskClassification)
    if isinstance(task, AbsTaskPairClassification) and len(whole) == 1:
        whole = Dataset.from_dict(whole[0])  # older layouts have all pairs in one row
    return whole.select(rows)


def _search(task: Any, whole: Any, rows: Array) -> dict[str, Any]:
    """Some of the queries; where each has its own candidates, no other document."""
    judged = {query: grades for query, grades in whole["relevant_docs"].items() if grades}
    asked = [query for query in whole["queries"]["id"] if query in judged]
    merges = merges_queries(task)
    unit = {query: query.rpartition("_")[0] if merges else query for query in asked}
    names = sorted(set(unit.values()))
    wanted = {names[row] for row in rows}
    kept = {query for query in asked if unit[query] in wanted}
    queries = whole["queries"]
    part = {
        **whole,
        "queries": queries.select([i for i, name in enumerate(queries["id"]) if name in kept]),
        "relevant_docs": {query: grades for query, grades in judged.items() if query in kept},
    }
    if whole.get("top_ranked"):
        ranked = {query: own for query, own in whole["top_ranked"].items() if query in kept}
        documents = {document for own in ranked.values() for document in own}
        corpus = whole["corpus"]
        there = [row for row, name in enumerate(corpus["id"]) if name in documents]
        part |= {"top_ranked": ranked, "corpus": corpus.select(there)}
    return part
