"""Compute scores from entries: one entry for each query, pair or document.

Hides: how each of mteb's metrics is computed on weighted samples, for many samples at once; how
entries are stored. Refuses to know: models, tasks, mteb, intervals.

A resample is a row of weights over units: how often each unit is drawn. A unit is a query, a pair,
or a test document with its results in every experiment. New units would be drawn if the data were
collected again. The documents or sentences that a query is searched in stay fixed.
Legend: U units, R resamples, E experiments, S similarities, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gteopt.errors import IntegrityError
from gteopt.records.files import write_atomically

Statistic = Literal[
    "mean", "spearman", "f1_macro", "f1_weighted", "max_ap", "max_accuracy", "v_measure", "ami"
]
CLUSTERINGS: frozenset[str] = frozenset({"v_measure", "ami"})
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_CHUNK_CELLS = 4_000_000  # weights processed together: 32 MB in float64


@dataclass(frozen=True)
class Samples:
    """The entries of one task, split and subset.

    Attributes:
        statistic: how the score is computed, which decides the arrays:
            "mean": `values` [E, U], and if it is known `chance` [U], the expected value of each
                entry for a model that knows nothing.
            "spearman": `similarities` [U] and `gold` [U].
            "f1_macro", "f1_weighted": `predictions` [E, U] and `gold` [U], classes from 0; the
                mean over experiments.
            "max_ap", "max_accuracy": `similarities` [S, U] and `gold` [U] of 0 and 1; the maximum
                over similarity functions.
            "v_measure", "ami": `document`, `experiment`, `gold` and `cluster`, all [M], with a row
                for each document of each clustering; `level` [E] of each clustering; the mean over
                clusterings.
            Pairs ("spearman", "max_ap", "max_accuracy") may also have `texts` [2, U]: the numbers
            of the two texts of each pair, from 0.
        unit: the unit of resampling ("query", "pair", "document", "sentence", "text").
        digits: decimals to which mteb rounds the score; None if it does not round.
    """

    statistic: Statistic
    unit: str
    arrays: Mapping[str, Array]
    digits: int | None = None

    @property
    def n_units(self) -> int:
        """U, the number of units."""
        if self.statistic in CLUSTERINGS:
            return int(self.arrays["document"].max(initial=-1)) + 1
        return int(self.arrays["values" if self.statistic == "mean" else "gold"].shape[-1])

    def score(self) -> float:
        """The main score as mteb computes it, from the entries alone."""
        value = float(self.scores(np.ones((1, self.n_units)))[0])
        return value if self.digits is None else round(value, self.digits)

    def scores(self, weights: Array) -> Floats:
        """Scores [R] of resamples given by weights [R, U]; not rounded."""
        scores: Floats = self.by_experiment(weights).mean(axis=1)
        return scores

    def by_experiment(self, weights: Array) -> Floats:
        """Scores [R, E] of each experiment; their mean is the score. E is 1 without experiments.

        All sums are in float64.
        """
        step = max(1, _CHUNK_CELLS // max(1, self._n_cells()))
        parts = [
            _SCORERS[self.statistic](self, np.asarray(weights[start : start + step], np.float64))
            for start in range(0, len(weights), step)
        ]
        return np.concatenate(parts)

    def influences(self) -> Floats:
        """The derivative [U] of a score of pairs with respect to the weight of each pair.

        It is taken at weights of one, and sums to 0. The best threshold and similarity function are
        held fixed: at the optimum, a change of them does not change the score to first order.
        """
        return _INFLUENCES[self.statistic](self)

    def pairs_with(self, other: Samples) -> bool:
        """Whether both have the same units, so that their difference can be resampled."""
        same = (self.statistic, self.unit, self.n_units) == (
            other.statistic,
            other.unit,
            other.n_units,
        )
        fixed = ("gold", "texts", "document", "experiment", "level")
        return same and all(
            np.array_equal(self.arrays[name], other.arrays[name])
            for name in fixed
            if name in self.arrays
        )

    def _n_cells(self) -> int:
        return max((array.size for array in self.arrays.values()), default=1)


def write_samples(path: Path, samples: Mapping[tuple[str, str], Samples]) -> None:
    """Save the entries of a task by (split, subset), in one safetensors file."""
    tensors: dict[str, Array] = {}
    metadata: dict[str, str] = {}
    for number, ((split, subset), entries) in enumerate(samples.items()):
        metadata[str(number)] = "\n".join(
            (
                split,
                subset,
                entries.statistic,
                entries.unit,
                "" if entries.digits is None else str(entries.digits),
            )
        )
        for name, array in entries.arrays.items():
            tensors[f"{number}.{name}"] = np.ascontiguousarray(array)
    write_atomically(path, save(tensors, metadata))


def read_samples(path: Path) -> dict[tuple[str, str], Samples]:
    """Read what `write_samples` saved.

    Raises:
        IntegrityError: the file is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as handle:
            names = list(handle.keys())
            samples = {}
            for number, line in (handle.metadata() or {}).items():
                split, subset, statistic, unit, digits = line.split("\n")
                if statistic not in get_args(Statistic):
                    raise ValueError(f"unknown statistic '{statistic}'")
                arrays = {
                    name.partition(".")[2]: handle.get_tensor(name)
                    for name in names
                    if name.startswith(f"{number}.")
                }
                checked: Any = statistic
                n_digits = int(digits) if digits else None
                samples[split, subset] = Samples(checked, unit, arrays, n_digits)
            return samples
    except (SafetensorError, ValueError, OSError) as error:
        raise IntegrityError(
            f"{path}: holds no per-sample scores that gteopt wrote ({error}); delete it"
        ) from error


def _mean(samples: Samples, weights: Floats) -> Floats:
    values = samples.arrays["values"].astype(np.float64)
    means: Floats = (weights @ values.T) / weights.sum(axis=1, keepdims=True)
    return means


def _spearman(samples: Samples, weights: Floats) -> Floats:
    """Pearson correlation of midranks, in which each unit counts as often as its weight says."""
    x = _midranks(samples.arrays["similarities"], weights)  # [R, U]
    y = _midranks(samples.arrays["gold"], weights)
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    covariance = (weights * x * y).sum(axis=1)
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        # A resample with a single value has no correlation, which counts as 0.
        return np.where(spread > 0, covariance / spread, 0.0)[:, None]


def _spearman_influences(samples: Samples) -> Floats:
    """Influences [U] on the correlation of ranks F and G, which are shares of the sample.

    The covariance is E[FG] - 1/4, a variance E[FF] - 1/4. The weight of a unit changes its own
    term, and the ranks of all units above it.
    """
    x, y = samples.arrays["similarities"], samples.arrays["gold"]
    n = len(x)
    ones = np.ones((1, n))
    f, g = _midranks(x, ones)[0] / n, _midranks(y, ones)[0] / n

    def above(values: Array, ranks: Floats) -> Floats:
        """Mean [U] of the ranks of the units above each unit; ties count half."""
        means: Floats = _midranks(-values, ranks[None])[0] / n
        return means

    covariance, var_x, var_y = ((a * b).mean() - 1 / 4 for a, b in ((f, g), (f, f), (g, g)))
    if var_x <= 0 or var_y <= 0:
        return np.zeros(n)
    by_unit = f * g + above(x, g) + above(y, f) - 3 * (covariance + 1 / 4)
    var_x_by_unit = f * f + 2 * above(x, f) - 3 * (var_x + 1 / 4)
    var_y_by_unit = g * g + 2 * above(y, g) - 3 * (var_y + 1 / 4)
    relative = var_x_by_unit / var_x + var_y_by_unit / var_y
    influences: Floats = (by_unit - covariance * relative / 2) / math.sqrt(var_x * var_y) / n
    return influences


def _midranks(values: Array, weights: Floats) -> Floats:
    """Ranks [R, U] of values [U] in resamples; ties get the middle of their ranks."""
    order, starts = _sorted_groups(values)
    sizes = np.diff(starts, append=len(values))
    in_group = np.add.reduceat(weights[:, order], starts, axis=1)  # [R, groups]
    middle = np.cumsum(in_group, axis=1) - in_group / 2
    ranks = np.empty_like(weights)
    ranks[:, order] = np.repeat(middle, sizes, axis=1)
    return ranks


def _sorted_groups(values: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The order [U] that sorts values, and the start of each run of equal values in it."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _f1(samples: Samples, weights: Floats) -> Floats:
    """F1 [R, E] over the classes in a resample: their mean, or their mean weighted by support."""
    gold = samples.arrays["gold"]
    predictions = samples.arrays["predictions"]
    n_classes = int(max(gold.max(), predictions.max())) + 1
    support = _sum_by(gold, weights, n_classes)  # [R, C]
    scores = np.empty((len(weights), len(predictions)))
    for experiment, predicted in enumerate(predictions):
        hits = _sum_by(gold, weights * (predicted == gold), n_classes)
        both = support + _sum_by(predicted, weights, n_classes)
        f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
        share = support if samples.statistic == "f1_weighted" else (both > 0).astype(np.float64)
        scores[:, experiment] = (f1 * share).sum(axis=1) / share.sum(axis=1)
    return scores


def _sum_by(group: Array, weights: Floats, n_groups: int) -> Floats:
    """Sums [R, n_groups] of weights [R, U] over units of the same group."""
    order, starts = _sorted_groups(group)
    sums = np.zeros((len(weights), n_groups))
    sums[:, group[order][starts]] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def _pairs(samples: Samples, weights: Floats) -> Floats:
    """Average precision or best accuracy [R, 1], the maximum over similarity functions."""
    gold = samples.arrays["gold"].astype(np.float64)
    best = np.full(len(weights), -np.inf)
    for similarities in samples.arrays["similarities"]:
        order, starts = _sorted_groups(-similarities)
        drawn = weights[:, order]
        hits = np.cumsum(np.add.reduceat(drawn * gold[order], starts, axis=1), axis=1)
        retrieved = np.cumsum(np.add.reduceat(drawn, starts, axis=1), axis=1)
        if samples.statistic == "max_ap":
            precision = np.divide(hits, retrieved, out=np.zeros_like(hits), where=retrieved > 0)
            positives = np.maximum(hits[:, -1], 1)
            new = np.diff(hits, axis=1, prepend=0)
            values = (precision * new).sum(axis=1) / positives
        else:
            negatives = (retrieved - hits)[:, -1:]
            right = hits + negatives - (retrieved - hits)
            # mteb puts no threshold below the last value or above the first.
            values = right[:, :-1].max(axis=1, initial=0) / retrieved[:, -1]
        best = np.maximum(best, values)
    return best[:, None]


def _pairs_influences(samples: Samples) -> Floats:
    """Influences [U] with the order, similarity function and threshold of the score held fixed."""
    gold = samples.arrays["gold"].astype(np.float64)
    n, positives = len(gold), max(gold.sum(), 1)
    best, influences = -np.inf, np.zeros(n)
    for similarities in samples.arrays["similarities"]:
        order, starts = _sorted_groups(-similarities)
        new = np.add.reduceat(gold[order], starts)
        hits, retrieved = np.cumsum(new), np.r_[starts[1:], n].astype(np.float64)
        rank = np.empty(n, np.int64)  # of each unit's group of equal similarity
        rank[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=n))
        if samples.statistic == "max_ap":
            precision = hits / retrieved
            score = float((precision * new).sum() / positives)
            # One more hit, or one more unit, at or before each group.
            by_hit = np.cumsum((new / retrieved)[::-1])[::-1]
            by_unit = np.cumsum((new * hits / retrieved**2)[::-1])[::-1]
            derivative = gold * (by_hit[rank] + precision[rank] - score) - by_unit[rank]
            derivative /= positives
        else:
            right = hits + (n - positives) - (retrieved - hits)
            threshold = int(right[:-1].argmax()) if len(right) > 1 else -1
            score = float(right[threshold]) / n if threshold >= 0 else 0.0
            derivative = ((rank <= threshold) == (gold == 1)) / n - score / n
        if score > best:
            best, influences = score, derivative
    return influences


def _clusterings(samples: Samples, weights: Floats) -> Floats:
    """V-measure or adjusted mutual information [R, E] from sparse contingency tables.

    Sources: Rosenberg & Hirschberg 2007 for V-measure, Vinh et al. 2010 for the other.
    """
    document, experiment, gold, cluster = (
        samples.arrays[name].astype(np.int64)
        for name in ("document", "experiment", "gold", "cluster")
    )
    n_classes, n_clusters = int(gold.max()) + 1, int(cluster.max()) + 1
    by_class = experiment * n_classes + gold  # [M]
    cells, cell_of_row = np.unique(by_class * n_clusters + cluster, return_inverse=True)
    class_of_cell = cells // n_clusters
    experiment_of_cell = class_of_cell // n_classes
    cluster_of_cell = experiment_of_cell * n_clusters + cells % n_clusters
    classes, class_index = np.unique(class_of_cell, return_inverse=True)
    clusters, cluster_index = np.unique(cluster_of_cell, return_inverse=True)
    experiment_of_class, experiment_of_cluster = classes // n_classes, clusters // n_clusters
    n_experiments = len(samples.arrays["level"])

    counts: Floats = np.stack(  # [R, cells]
        [np.bincount(cell_of_row, row[document], minlength=len(cells)) for row in weights]
    ).astype(np.float64)
    a = _sum_by(class_index, counts, len(classes))  # [R, classes of all experiments]
    b = _sum_by(cluster_index, counts, len(clusters))
    total = _sum_by(experiment_of_cell, counts, n_experiments)
    safe = np.maximum(total, 1)

    def entropy(sizes: Floats, owner: Array) -> Floats:
        logs = sizes * np.log(np.maximum(sizes, 1e-300))
        entropies: Floats = np.log(safe) - _sum_by(owner, logs, n_experiments) / safe
        return entropies

    of_classes, of_clusters = entropy(a, experiment_of_class), entropy(b, experiment_of_cluster)
    mutual = of_classes + of_clusters - entropy(counts, experiment_of_cell)
    mean = (of_classes + of_clusters) / 2
    if samples.statistic == "ami":
        chance = np.empty_like(mutual)
        for number in range(n_experiments):
            chance[:, number] = _expected_mutual_information(
                a[:, experiment_of_class == number],
                b[:, experiment_of_cluster == number],
                total[:, number],
            )
        mutual, mean = mutual - chance, mean - chance
    one_group = mean < 1e-12  # all documents in one class and one cluster agree
    return np.where(one_group, 1.0, mutual / np.where(one_group, 1.0, mean))


def _expected_mutual_information(a: Floats, b: Floats, total: Floats) -> Floats:
    """Expected mutual information [R] in nats of two random partitions of `total` [R] documents.

    The partitions have class sizes a [R, L] and cluster sizes b [R, K]. Source: Vinh et al. 2010,
    equation 24a.
    """
    logs = np.r_[0.0, np.cumsum(np.log(np.arange(1, int(total.max()) + 1)))]  # log n!

    def log_factorial(n: Floats) -> Floats:
        # Impossible counts are clipped to valid indices; `possible` excludes them below.
        values: Floats = logs[np.clip(n, 0, len(logs) - 1).astype(np.int64)]
        return values

    first, second, n = a[:, :, None], b[:, None, :], total[:, None, None]
    fixed = (
        log_factorial(first)
        + log_factorial(second)
        + log_factorial(n - first)
        + log_factorial(n - second)
        - log_factorial(n)
    )
    expected = np.zeros(len(total))
    product = np.maximum(first * second, 1)
    for shared in range(1, int(min(a.max(), b.max())) + 1):
        possible = (shared <= np.minimum(first, second)) & (shared >= first + second - n)
        log_probability = (
            fixed
            - logs[shared]
            - log_factorial(first - shared)
            - log_factorial(second - shared)
            - log_factorial(n - first - second + shared)
        )
        gain = shared / n * np.log(n * shared / product)
        probability = np.exp(np.where(possible, log_probability, -np.inf))
        expected += (gain * probability).sum(axis=(1, 2))
    return expected


_SCORERS = {
    "mean": _mean,
    "spearman": _spearman,
    "f1_macro": _f1,
    "f1_weighted": _f1,
    "max_ap": _pairs,
    "max_accuracy": _pairs,
    "v_measure": _clusterings,
    "ami": _clusterings,
}

_INFLUENCES = {
    "spearman": _spearman_influences,
    "max_ap": _pairs_influences,
    "max_accuracy": _pairs_influences,
}
