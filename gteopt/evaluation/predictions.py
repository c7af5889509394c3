"""Turn mteb's predictions for single texts into the entries of a task's main score.

Hides: how each of mteb's task classes writes its predictions, and which documents its clusterings
draw. Refuses to know: encoders, intervals, gteopt's files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mteb._evaluators import DeprecatedSummarizationEvaluator
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores, mrr
from mteb.abstasks import (
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskMultilabelClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from scipy.stats import spearmanr

from gteopt.errors import UnsupportedError
from gteopt.evaluation.chance import random_ranking
from gteopt.evaluation.per_item_scores import Array, Samples

TOLERANCE = 1e-6
_AT = re.compile(r"^(max_over_subqueries_)?(ndcg|map|recall|precision|hit_rate|mrr)_at_(\d+)$")
_PAIR_METRIC = re.compile(r"^(max|similarity|cosine|dot|manhattan|euclidean)_(ap|accuracy)$")
TREC = {  # mteb's name -> pytrec_eval's
    "ndcg": "ndcg_cut",
    "map": "map_cut",
    "recall": "recall",
    "precision": "P",
    "hit_rate": "success",
}
_DIGITS = 5  # mteb rounds the results of pytrec_eval, but not the reciprocal rank


class RecordedDraws:
    """Wraps a task's random generator and records its draws: the documents of each clustering."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator
        self.sampled: list[list[int]] = []
        self.chosen: list[list[int]] = []

    def sample(self, population: Sequence[int], *args: Any, **kwargs: Any) -> list[int]:
        """Call `random.Random.sample` and record the result."""
        self.sampled.append(self._generator.sample(population, *args, **kwargs))
        return self.sampled[-1]

    def choices(self, population: Sequence[int], *args: Any, **kwargs: Any) -> list[int]:
        """Call `random.Random.choices` and record the result."""
        self.chosen.append(self._generator.choices(population, *args, **kwargs))
        return self.chosen[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)


def record_draws_(task: Any) -> RecordedDraws | None:
    """Make a clustering task record its draws; None for a task that draws no documents."""
    if not isinstance(task, AbsTaskClustering):
        return None
    draws = RecordedDraws(task.rng_state)
    task.rng_state = draws
    return draws


def read_predictions(task: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """The predictions that a task wrote into `folder`, by subset and split; empty if none."""
    path = folder / task.prediction_file_name
    if not path.is_file():
        return {}
    predictions: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return predictions


def samples_from_predictions(
    task: Any, split: str, predictions: Mapping[str, Mapping[str, Any]], draws: RecordedDraws | None
) -> Iterator[tuple[str, Samples | UnsupportedError]]:
    """The entries of each subset of one split, or the reason why there are none.

    Args:
        task: the task after its evaluation, with its data.
        split: the split that was evaluated.
        predictions: from `read_predictions`.
        draws: recorded during this evaluation of this split alone.
    """
    chosen = iter(draws.chosen if draws else ())
    sampled = iter(draws.sampled if draws else ())
    for subset in task.hf_subsets:
        try:
            data = task.dataset.get(subset, task.dataset)[split]
            of_split = predictions.get(subset, predictions.get("parallel", {})).get(split)
            if of_split is None:
                raise UnsupportedError(f"{type(task).__name__} writes no predictions")
            yield subset, _samples(task, data, subset, of_split, sampled, chosen)
        except UnsupportedError as error:
            yield subset, error


def _samples(
    task: Any,
    data: Any,
    subset: str,
    predicted: Any,
    sampled: Iterator[list[int]],
    chosen: Iterator[list[int]],
) -> Samples:
    metric = task.metadata.main_score
    if isinstance(task, AbsTaskRetrieval):
        return _retrieval(task, data, predicted, metric)
    if isinstance(task, AbsTaskClustering):
        return _clustering(task, data, predicted, metric, sampled, chosen)
    if isinstance(task, AbsTaskClusteringLegacy) and metric == "v_measure":
        return _clustering_sets(task, data, predicted)
    if isinstance(task, AbsTaskSTS) and metric == "cosine_spearman":
        arrays = {
            "similarities": np.array(predicted["cosine_scores"]),
            "gold": np.array(data["score"], np.float64),
            "texts": _texts(*(data[name] for name in task.column_names)),
        }
        return Samples("spearman", "pair", arrays)
    if isinstance(task, AbsTaskBitextMining) and metric in ("f1", "accuracy"):
        return _bitext(task, data, subset, predicted, metric)
    if isinstance(task, AbsTaskPairClassification) and _PAIR_METRIC.match(metric):
        return _pairs(task, data, predicted, metric)
    if isinstance(task, AbsTaskSummarization) and metric == "cosine_spearman":
        return _summaries(task, predicted)
    is_plain = isinstance(task, AbsTaskClassification) and not (
        isinstance(task, AbsTaskMultilabelClassification) or task.is_cross_validation
    )
    if is_plain and metric in ("accuracy", "f1"):
        return _classification(task, data, predicted, metric)
    raise UnsupportedError(f"{metric} of {task.metadata.type} has no entries for single texts")


def merges_queries(task: Any) -> bool:
    """Whether a search scores all wordings of a query ("12_0", "12_1") as one query."""
    return str(task.metadata.main_score).startswith("max_over_subqueries_")


def _retrieval(task: Any, data: Any, results: Any, metric: str) -> Samples:
    qrels = data["relevant_docs"]
    if task.ignore_identical_ids:
        for query, ranking in results.items():
            ranking.pop(query, None)
    at = _AT.match("recall_at_1" if metric == "accuracy" else metric)
    if at is None:
        raise UnsupportedError(f"{metric} has no entries for single queries")
    over_subqueries, name, depth = bool(at[1]), at[2], int(at[3])
    if over_subqueries:
        results, qrels = _merged(results, qrels)
    if name == "mrr":
        ranks = mrr(qrels, results, [depth])[f"MRR@{depth}"]
        by_query = dict(zip(results, ranks, strict=True))
    else:
        # mteb's function needs depth 1 for its summary; the extra depth costs nothing.
        skip_first = task.skip_first_result and not over_subqueries
        scored = calculate_retrieval_scores(results, qrels, [1, depth], skip_first).all_scores
        by_query = {query: ranking[f"{TREC[name]}_{depth}"] for query, ranking in scored.items()}
    names = sorted(by_query)
    arrays: dict[str, Array] = {"values": np.array([by_query[query] for query in names])[None]}
    n_relevant = [sum(grade > 0 for grade in qrels[query].values()) for query in names]
    ranked: dict[str, set[str]] = {}
    for query, documents in (data.get("top_ranked") or {}).items():
        stem = query.rpartition("_")[0] if over_subqueries else query
        ranked.setdefault(stem, set()).update(documents)
    n_documents = [len(ranked.get(query, data["corpus"])) for query in names]
    arrays["chance"] = random_ranking(name, np.array(n_relevant), np.array(n_documents), depth)
    return Samples("mean", "query", arrays, None if name == "mrr" else _DIGITS)


def _merged(results: Any, qrels: Any) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Merge subqueries ("12_0", "12_1") into one query; a document gets its best score."""
    merged: dict[str, dict[str, float]] = {}
    judged: dict[str, Any] = {}
    for query, relevant in qrels.items():
        stem = query.rpartition("_")[0]
        judged[stem] = relevant
        best = merged.setdefault(stem, {})
        for document, score in results[query].items():
            best[document] = max(score, best.get(document, score))
    return merged, judged


def _classification(task: Any, data: Any, predicted: Any, metric: str) -> Samples:
    gold, predictions = np.array(data[task.label_column_name]), np.array(predicted)  # [U], [E, U]
    if metric == "accuracy":
        largest = np.unique(gold, return_counts=True)[1].max() / len(gold)
        right = {"values": (predictions == gold).astype(np.uint8)}
        return Samples("mean", "document", right | {"chance": np.full(len(gold), largest)})
    _, codes = np.unique(np.r_[gold, predictions.ravel()], return_inverse=True)
    arrays = {
        "gold": codes[: len(gold)].astype(np.int32),
        "predictions": codes[len(gold) :].reshape(predictions.shape).astype(np.int32),
    }
    return Samples("f1_macro", "document", arrays)


def _clustering(
    task: Any,
    data: Any,
    predicted: Any,
    metric: str,
    sampled: Iterator[list[int]],
    chosen: Iterator[list[int]],
) -> Samples:
    embeds_all = task.max_document_to_embed is None
    embeds_all = embeds_all and task.max_fraction_of_documents_to_embed is None
    document_ids = np.arange(len(data)) if embeds_all else np.array(next(sampled))
    every_label = data.select(document_ids)[task.label_column_name]
    labels = [label if isinstance(label, list) else [label] for label in every_label]
    parts = []
    for level, (_, clusterings) in enumerate(predicted.items()):
        # A document without a label at this level is left out, by the same test as in mteb.
        of_level = np.array([label[level] if len(label) > level else -1 for label in labels])
        valid = np.array([label != -1 for label in of_level])
        rows = np.flatnonzero(valid)
        codes = np.unique(of_level[valid], return_inverse=True)[1]
        for clusters in clusterings:
            drawn = np.array(next(chosen))
            parts.append((rows[drawn], codes[drawn], np.array(clusters), level))
    return _clustering_samples(metric, parts)


def _clustering_sets(task: Any, data: Any, predicted: Any) -> Samples:
    """Entries of a task in which each row of the data is a set of documents to cluster."""
    clusterings = iter(predicted)
    ids: dict[str, int] = {}
    parts = []
    for row in data:
        texts, labels = row[task.input_column_name], np.array(row[task.label_column_name])
        codes = np.unique(labels, return_inverse=True)[1]
        document = np.array([ids.setdefault(text, len(ids)) for text in texts])
        # mteb scores a set with one label as 1 without clustering it, as one cluster would be.
        clusters = np.array(next(clusterings)) if codes.max() else np.zeros_like(codes)
        parts.append((document, codes, clusters, 0))
    return _clustering_samples("v_measure", parts)


def _clustering_samples(metric: str, parts: Sequence[tuple[Any, Any, Any, int]]) -> Samples:
    if metric not in ("v_measure", "ami"):
        raise UnsupportedError(f"{metric} of clusterings has no entries for single documents")
    documents, golds, clusters, levels = zip(*parts, strict=True)
    used, document = np.unique(np.concatenate(documents), return_inverse=True)
    del used  # only the equality of documents matters
    arrays: dict[str, Array] = {
        "document": document.astype(np.int32),
        "experiment": np.repeat(np.arange(len(parts)), [len(rows) for rows in documents]),
        "gold": np.concatenate(golds),
        "cluster": np.concatenate(clusters),
        "level": np.array(levels),
    }
    narrow = {name: array.astype(np.int32) for name, array in arrays.items()}
    return Samples("ami" if metric == "ami" else "v_measure", "document", narrow)


def _bitext(task: Any, data: Any, subset: str, matches: Any, metric: str) -> Samples:
    pair = subset if task.parallel_subsets else "-".join(task._DEFAULT_PAIR[0])
    predicted = np.array([match["corpus_id"] for match in matches[pair]])
    gold = np.arange(len(predicted))
    if "gold" in data:
        gold = np.array([match for _, match in data["gold"]])
    if metric == "accuracy":
        values = (predicted == gold).astype(np.uint8)
        guess = np.full(len(values), 1 / len(values))
        return Samples("mean", "sentence", {"values": values[None], "chance": guess})
    arrays = {"gold": gold.astype(np.int32), "predictions": predicted[None].astype(np.int32)}
    return Samples("f1_weighted", "sentence", arrays)


def _pairs(task: Any, data: Any, predicted: Any, metric: str) -> Samples:
    columns = (task.label_column_name, task.input1_column_name, task.input2_column_name)
    # Older data sets hold all pairs in one row.
    labels, *sides = (data[name][0] if len(data) == 1 else data[name] for name in columns)
    gold = np.array(labels)
    similarities = {
        "similarity": np.array(predicted["similarity_scores"]),
        "cosine": np.array(predicted["cosine_scores"]),
        "dot": np.array(predicted["dot_scores"]),
        "manhattan": -np.array(predicted["manhattan_distances"]),
        "euclidean": -np.array(predicted["euclidean_distances"]),
    }
    name, _, kind = metric.partition("_")
    used = list(similarities.values()) if name == "max" else [similarities[name]]
    arrays = {
        "similarities": np.stack(used),
        "gold": gold.astype(np.int8),
        "texts": _texts(*sides),
    }
    return Samples("max_ap" if kind == "ap" else "max_accuracy", "pair", arrays)


def _texts(*sides: Iterable[str]) -> Array:
    """Numbers [2, U] of the texts of pairs; equal texts have equal numbers on both sides."""
    numbers: dict[str, int] = {}
    return np.array(
        [[numbers.setdefault(text, len(numbers)) for text in side] for side in sides], np.int32
    )


def _summaries(task: Any, predicted: Any) -> Samples:
    """For each text, the correlation of its summaries' similarities with their grades.

    SummEval and SummEvalFr keep an evaluator whose mean includes both correlations and p-values
    (mteb issue 1156). Their published scores are such means. The entry of a text is therefore half
    the sum of its correlation and its p-value.
    """
    with_p_values = task.evaluator is DeprecatedSummarizationEvaluator
    values = []
    for similarities, grades in zip(
        predicted["cosine_scores"], predicted["human_scores"], strict=True
    ):
        correlation = spearmanr(grades, similarities)
        values.append(
            (correlation.statistic + correlation.pvalue) / 2
            if with_p_values
            else correlation.statistic
        )
    # Without a relation the correlation is 0 on average, and the p-value is uniform from 0 to 1.
    chance = np.full(len(values), 1 / 4 if with_p_values else 0.0)
    return Samples("mean", "text", {"values": np.array(values)[None], "chance": chance})
