"""What a score is made of: one entry a query, pair or document, and the score that they give.

Hides: how each metric of mteb's is computed on a weighted sample, for many samples at once; how
entries are stored. Refuses to know: models, tasks, mteb, intervals.

A resample is a row of weights over units: how often each unit is drawn. The unit is what would be
drawn anew if the data were collected again: a query, a pair, a test document (with what became of
it in every experiment). What a query is searched in, documents or sentences, is taken as given.
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

_CHUNK_CELLS = 4_000_000  # weights looked at together: 32 MB in float64


@dataclass(frozen=True)
class Samples:
    """The entries of one task, split and subset.

    Attributes:
        statistic: how they make the score, and so which arrays there are:
            "mean": `values` [E, U], and where it is known `chance` [U]: what each is expected to be
                of a model that knows nothing.
            "spearman": `similarities` [U] and `gold` [U].
            "f1_macro", "f1_weighted": `predictions` [E, U] and `gold` [U], classes from 0; the
                mean over experiments.
            "max_ap", "max_accuracy": `similarities` [S, U] and `gold` [U] of 0 and 1; the greatest
                over similarity functions.
            "v_measure", "ami": a row for each document of each clustering, `document` [M],
                `experiment` [M], `gold` [M], `cluster` [M], and `level` [E] of each clustering;
                the mean over clusterings.
            Pairs ("spearman", "max_ap", "max_accuracy") may have `texts` [2, U], too: which texts
            each is made of, numbered from 0.
        unit: what is drawn anew ("query", "pair", "document", "sentence", "text").
        digits: decimals that mteb rounds the score to; None where it does not.
    """

    statistic: Statistic
    unit: str
    arrays: Mapping[str, Array]
    digits: int | None = None

    @property
    def n_units(self) -> int:
        """U."""
        if self.statistic in CLUSTERINGS:
            return int(self.arrays["document"].max(initial=-1)) + 1
        return int(self.arrays["values" if self.statistic == "mean" else "gold"].shape[-1])

    def score(self) -> float:
        """The main score as mteb gives it, from the entries alone."""
        value = float(self.scores(np.ones((1, self.n_units)))[0])
        return value if self.digits is None else round(value, self.digits)

    def scores(self, weights: Array) -> Floats:
        """Scores [R] of resamples given by weights [R, U]; not rounded."""
        scores: Floats = self.by_experiment(weights).mean(axis=1)
        return scores

    def by_experiment(self, weights: Array) -> Floats:
        """Scores [R, E] of each experiment, whose mean is the score; E is 1 without experiments.

        Nothing but float64 is accumulated in.
        """
        step = max(1, _CHUNK_CELLS // max(1, self._n_cells()))
        parts = [
            _SCORERS[self.statistic](self, np.asarray(weights[start : start + step], np.float64))
            for start in range(0, len(weights), step)
        ]
        return np.concatenate(parts)

    def influences(self) -> Floats:
        """How fast the score of pairs changes [U] with the weight of each.

        The derivative at weights of one; they sum to 0. A best threshold or similarity function
        stays what it is: there, the score does not change with it to first order.
        """
        return _INFLUENCES[self.statistic](self)

    def pairs_with(self, other: Samples) -> bool:
        """Whether both are of the same units, so that their difference can be resampled."""
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
        return max((each.size for each in self.arrays.values()), default=1)


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
        IntegrityError: damaged.
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
                how: Any = statistic
                samples[split, subset] = Samples(how, unit, arrays, int(digits) if digits else None)
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
    """Pearson correlation of midranks, each unit as often as its weight says."""
    x = _midranks(samples.arrays["similarities"], weights)  # [R, U]
    y = _midranks(samples.arrays["gold"], weights)
    total = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / total
    y = y - (weights * y).sum(axis=1, keepdims=True) / total
    covariance = (weights * x * y).sum(axis=1)
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        # A resample of one value only has no correlation; it tells nothing of the model.
        return np.where(spread > 0, covariance / spread, 0.0)[:, None]


def _spearman_influences(samples: Samples) -> Floats:
    """Of a correlation of ranks F and G as shares of the sample: C = E[FG] - 1/4, A = E[FF] - 1/4.

    A unit counts by itself, and by moving all that are ranked above it.
    """
    x, y = samples.arrays["similarities"], samples.arrays["gold"]
    n = len(x)
    ones = np.ones((1, n))
    f, g = _midranks(x, ones)[0] / n, _midranks(y, ones)[0] / n

    def above(values: Array, ranks: Floats) -> Floats:
        """Mean [U] over all units of their rank where it is above, half of it where it ties."""
        found: Floats = _midranks(-values, ranks[None])[0] / n
        return found

    covariance, of_x, of_y = ((a * b).mean() - 1 / 4 for a, b in ((f, g), (f, f), (g, g)))
    if of_x <= 0 or of_y <= 0:
        return np.zeros(n)
    by_unit = f * g + above(x, g) + above(y, f) - 3 * (covariance + 1 / 4)
    of_x_by_unit = f * f + 2 * above(x, f) - 3 * (of_x + 1 / 4)
    of_y_by_unit = g * g + 2 * above(y, g) - 3 * (of_y + 1 / 4)
    relative = of_x_by_unit / of_x + of_y_by_unit / of_y
    found: Floats = (by_unit - covariance * relative / 2) / math.sqrt(of_x * of_y) / n
    return found


def _midranks(values: Array, weights: Floats) -> Floats:
    """Ranks [R, U] of values [U] in resamples, ties sharing the middle of their ranks."""
    order, starts = _sorted_groups(values)
    sizes = np.diff(starts, append=len(values))
    in_group = np.add.reduceat(weights[:, order], starts, axis=1)  # [R, groups]
    middle = np.cumsum(in_group, axis=1) - in_group / 2
    ranks = np.empty_like(weights)
    ranks[:, order] = np.repeat(middle, sizes, axis=1)
    return ranks


def _sorted_groups(values: Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Order [U] that sorts values, and where in it each run of equal values starts."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    return order, np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])


def _f1(samples: Samples, weights: Floats) -> Floats:
    """F1 [R, E] over classes that a resample holds, plain ("macro") or by support ("weighted")."""
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
    """Average precision or best accuracy, the greatest over similarity functions."""
    gold = samples.arrays["gold"].astype(np.float64)
    best = np.full(len(weights), -np.inf)
    for similarities in samples.arrays["similarities"]:
        order, starts = _sorted_groups(-similarities)
        drawn = weights[:, order]
        hits = np.cumsum(np.add.reduceat(drawn * gold[order], starts, axis=1), axis=1)
        seen = np.cumsum(np.add.reduceat(drawn, starts, axis=1), axis=1)
        if samples.statistic == "max_ap":
            precision = np.divide(hits, seen, out=np.zeros_like(hits), where=seen > 0)
            positives = np.maximum(hits[:, -1], 1)
            new = np.diff(hits, axis=1, prepend=0)
            values = (precision * new).sum(axis=1) / positives
        else:
            negatives = (seen - hits)[:, -1:]
            right = hits + negatives - (seen - hits)
            # mteb sets no threshold below the last value; above the first there is none either.
            values = right[:, :-1].max(axis=1, initial=0) / seen[:, -1]
        best = np.maximum(best, values)
    return best[:, None]


def _pairs_influences(samples: Samples) -> Floats:
    """At the order, similarity function and threshold that give the score."""
    gold = samples.arrays["gold"].astype(np.float64)
    n, positives = len(gold), max(gold.sum(), 1)
    best, influences = -np.inf, np.zeros(n)
    for similarities in samples.arrays["similarities"]:
        order, starts = _sorted_groups(-similarities)
        new = np.add.reduceat(gold[order], starts)
        hits, seen = np.cumsum(new), np.r_[starts[1:], n].astype(np.float64)
        rank = np.empty(n, np.int64)  # of each unit's group of equal similarity
        rank[order] = np.repeat(np.arange(len(starts)), np.diff(starts, append=n))
        if samples.statistic == "max_ap":
            precision = hits / seen
            score = float((precision * new).sum() / positives)
            # One more hit, or one more unit, at or before each group.
            by_hit = np.cumsum((new / seen)[::-1])[::-1]
            by_unit = np.cumsum((new * hits / seen**2)[::-1])[::-1]
            own = gold * (by_hit[rank] + precision[rank] - score) - by_unit[rank]
            own /= positives
        else:
            right = hits + (n - positives) - (seen - hits)
            threshold = int(right[:-1].argmax()) if len(right) > 1 else -1
            score = float(right[threshold]) / n if threshold >= 0 else 0.0
            own = ((rank <= threshold) == (gold == 1)) / n - score / n
        if score > best:
            best, influences = score, own
    return influences


def _clusterings(samples: Samples, weights: Floats) -> Floats:
    """V-measure (Rosenberg & Hirschberg 2007) or adjusted mutual information (Vinh et al. 2010),
    [R, E], from contingency tables of which only cells that occur are kept.
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
        found: Floats = np.log(safe) - _sum_by(owner, logs, n_experiments) / safe
        return found

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
    one_group = mean < 1e-12  # everything in one class and one cluster: they agree
    return np.where(one_group, 1.0, mutual / np.where(one_group, 1.0, mean))


def _expected_mutual_information(a: Floats, b: Floats, total: Floats) -> Floats:
    """Mean mutual information [R] of partitions with class sizes a [R, L] and cluster sizes b
    [R, K] under random assignment (Vinh et al. 2010, equation 24a), in nats.
    """
    logs = np.r_[0.0, np.cumsum(np.log(np.arange(1, int(total.max()) + 1)))]  # log n!

    def log_factorial(n: Floats) -> Floats:
        # Impossible counts are looked up, too, and left out below.
        found: Floats = logs[np.clip(n, 0, len(logs) - 1).astype(np.int64)]
        return found

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
