"""Restrict an mteb task to some of its queries, pairs or texts.

Hides: where each kind of task keeps its items, and in which order their scores come. Refuses to
know: how the items were chosen, encoders, scores.
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
def restrict_task(task: Any, split: str, subset: str, rows: Array) -> Iterator[None]:
    """Restrict one split and subset of a task to some items inside the `with` block.

    Args:
        task: an mteb task with its data loaded.
        split: the split to restrict.
        subset: the subset to restrict.
        rows: indices of the items, ascending, in the order of `Samples`.
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
        whole = Dataset.from_dict(whole[0])  # older data sets hold all pairs in one row
    return whole.select(rows)


def _search(task: Any, whole: Any, rows: Array) -> dict[str, Any]:
    """Some of the queries; if queries have candidates, only the candidates of these queries."""
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
        ranked = {query: ids for query, ids in whole["top_ranked"].items() if query in kept}
        documents = {document for ids in ranked.values() for document in ids}
        corpus = whole["corpus"]
        candidates = [row for row, name in enumerate(corpus["id"]) if name in documents]
        part |= {"top_ranked": ranked, "corpus": corpus.select(candidates)}
    return part
