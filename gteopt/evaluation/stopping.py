"""Decide whether the verdict on a task is certain before all of its items are scored.

The difference is tested after an eighth, a quarter, half and three quarters of the items. Each test
is called a look, and more looks make more false claims. Each look therefore gets a share of the
error rate. The shares follow the spending function of Lan & DeMets (1983) that resembles the bounds
of O'Brien & Fleming (1979). A look decides if its interval lies inside the margin or outside of it.
The error rate then holds for the intervals of all looks together (repeated confidence intervals,
Jennison & Turnbull 1989).

Refuses to know: tasks, mteb, models, files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from gteopt.evaluation.per_item_scores import CLUSTERINGS, Array, Floats, Samples
from gteopt.evaluation.statistics import LEVEL, MIN_UNITS, Draws, difference_of, paired_draws
from gteopt.records.evaluation import ScoreDifference, SequentialTest, Verdict

FRACTIONS = (0.125, 0.25, 0.5, 0.75)
"""Shares of the items at the looks before the last."""
_SEED = 0
_NODES = 300  # nodes of the quadrature; more nodes change the boundaries by less than 1e-6
_TAIL = 9.0  # standard deviations; the probability beyond them is less than 1e-18
_MIN_ITEMS = 5 * MIN_UNITS  # with fewer, a mean is not normal enough in the far tails


@lru_cache
def stopping_boundaries(fractions: tuple[float, ...], error_rate: float) -> tuple[float, ...]:
    """By how many standard errors a difference must be off at each look, two-sided.

    The probability that a Brownian motion B(t) exceeds `boundary * sqrt(t)` on either side at any
    look is `error_rate`. Until t, each side may spend 2 - 2 Phi(z / sqrt(t)) of it (Lan & DeMets
    1983). Here z is the normal quantile with a quarter of the rate above it. Each boundary is
    computed from the earlier ones by numerical integration (Armitage, McPherson & Rowe 1969).

    Args:
        fractions: shares of all items, ascending; the last is 1.
        error_rate: of all looks together.
    """
    z = -float(ndtri(error_rate / 4))
    spent = [4 * float(ndtr(-z / math.sqrt(t))) for t in fractions]
    bounds = [-float(ndtri(spent[0] / 2))]
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edge = min(bounds[0], _TAIL) * math.sqrt(fractions[0])
    x = edge * nodes
    density = np.exp(-(x**2) / (2 * fractions[0])) / math.sqrt(2 * math.pi * fractions[0])
    mass = density * weights * edge
    for number in range(1, len(fractions)):
        t, step = fractions[number], math.sqrt(fractions[number] - fractions[number - 1])
        more = spent[number] - spent[number - 1]
        excess = partial(_excess, x=x, mass=mass, step=step, share=more)
        bound = float(brentq(excess, 1e-6, 2 * _TAIL * math.sqrt(t)))
        bounds.append(bound / math.sqrt(t))
        edge = min(bound, _TAIL * math.sqrt(t))
        new = edge * nodes
        steps = (new[:, None] - x) / step
        mass = (np.exp(-(steps**2) / 2) @ mass) / (step * math.sqrt(2 * math.pi))
        mass, x = mass * weights * edge, new
    return tuple(bounds)


def _excess(bound: float, *, x: Floats, mass: Floats, step: float, share: float) -> float:
    """By how much the probability of first exceeding the bound at the next look exceeds a share."""
    beyond = ndtr((-bound - x) / step) + ndtr((x - bound) / step)
    return float(mass @ beyond) - share


@dataclass(frozen=True)
class StopRule:
    """Decides whether the scoring of a task can end early.

    Attributes:
        baseline: all entries of the baseline, by task, split and subset.
        baseline_sha256: hash of the baseline's files and of its stored form of vectors.
        margin: a difference of scores (0 to 1) that does not matter.
        n_claims: how many claims share the error rate; 1 if each row has its own rate.
    """

    baseline: Mapping[tuple[str, str, str], Samples]
    baseline_sha256: str
    margin: float
    n_claims: int = 1

    @property
    def error_rate(self) -> float:
        """Two-sided error rate of one claim.

        It is Bonferroni's, which is at least as strict as Holm's correction. The correction of the
        report therefore keeps every verdict.
        """
        return (1 - LEVEL) / self.n_claims

    def key(self) -> str:
        """Identifies everything that a stopped score depends on besides its task and model."""
        return f"{self.baseline_sha256} {self.margin:g} {self.n_claims} {FRACTIONS}"

    def looks(self, key: tuple[str, str, str]) -> list[SequentialTest]:
        """The looks at a task, split and subset before its end; empty if it cannot be stopped."""
        samples = self.baseline.get(key)
        if samples is None or not can_stop_early(samples):
            return []
        return _looks(samples.n_units, self.error_rate)[:-1]

    def at_end(self, key: tuple[str, str, str]) -> SequentialTest | None:
        """The last look, at all items of a score; None if the score has no earlier looks."""
        samples = self.baseline.get(key)
        if samples is None or not self.looks(key):
            return None
        return _looks(samples.n_units, self.error_rate)[-1]

    def is_decided(self, key: tuple[str, str, str], part: Samples, look: SequentialTest) -> bool:
        """Whether the verdict is certain from these entries, which are of the look's items."""
        theirs = first_scored_part(self.baseline[key], look.n_scored)
        if not part.pairs_with(theirs):
            return False
        draws = paired_draws(part, theirs)
        if draws is None:
            return False
        difference = difference_of(widen_for_looks(draws, look), part.score() - theirs.score())
        return early_verdict(difference, self.margin, look.error_rate) is not None


def early_verdict(difference: ScoreDifference, margin: float, error_rate: float) -> Verdict | None:
    """The verdict that more items would not change, at a two-sided error rate; None if open.

    An interval inside the margin is "equivalent", and an interval beyond the margin is "worse" or
    "better". An interval that leaves out zero but crosses the margin decides nothing. With all
    items, such a difference may turn out to be equivalent.
    """
    half_width = (difference.high - difference.low) / 2
    freedom = 1e6 if difference.freedom is None else difference.freedom
    room = margin - abs(difference.value)
    if half_width <= 1e-12:
        return "equivalent" if room >= 0 else "worse" if difference.value < 0 else "better"
    errors = room / half_width * float(stdtrit(freedom, (1 + LEVEL) / 2))
    if float(stdtr(freedom, -abs(errors))) > error_rate / 2:
        return None
    if room >= 0:
        return "equivalent"
    return "worse" if difference.value < 0 else "better"


def widen_for_looks(draws: Draws, look: SequentialTest) -> Draws:
    """Draws whose difference is spread further, to make up for several looks.

    Tests of this difference at the look's error rate then hold for all looks together.
    """
    wider = look_widening(look, draws.freedom, is_unchanged=draws.is_unchanged)
    difference = draws.difference
    deviations = difference - difference.mean()
    return replace(draws, variant=draws.baseline + difference.mean() + wider * deviations)


def look_widening(look: SequentialTest, freedom: float, *, is_unchanged: bool = False) -> float:
    """How many times longer the interval of a look is than the interval of a single test.

    Args:
        look: has the nominal level.
        freedom: degrees of freedom of the standard error.
        is_unchanged: the interval comes from the rule of three, so its ends are logarithms of the
            level.
    """
    freedom = min(freedom, 1e6)
    at_rate = float(stdtrit(freedom, look.error_rate / 2))
    if not is_unchanged:
        return max(1.0, float(stdtrit(freedom, look.nominal / 2)) / at_rate)
    single = (1 - LEVEL) / 2
    longer = math.log(look.nominal / 2) / math.log(single)
    return max(1.0, longer * float(stdtrit(freedom, single)) / at_rate)


def can_stop_early(samples: Samples) -> bool:
    """Whether a part of the items has a score of the same kind as all items.

    In clusterings, translations and F1 over classes, the score of an item depends on the others.
    """
    independent = samples.statistic in ("mean", "spearman", "max_ap", "max_accuracy")
    named = samples.unit in ("query", "pair", "document") and samples.statistic not in CLUSTERINGS
    return independent and named and samples.n_units * FRACTIONS[0] >= _MIN_ITEMS


def first_scored_rows(n_all: int, n_scored: int) -> Array:
    """Indices [n_scored] of the items that are scored first: the start of a seeded random order.

    They are returned in ascending order.
    """
    order = np.random.default_rng((_SEED, n_all)).permutation(n_all)
    return np.sort(order[:n_scored])


def first_scored_part(samples: Samples, n_scored: int) -> Samples:
    """The entries of the items that are scored first."""
    rows = first_scored_rows(samples.n_units, n_scored)
    arrays = {name: array[..., rows] for name, array in samples.arrays.items()}
    if "texts" in arrays:  # renumbered in order of appearance, as for a data set of these pairs
        _, first, number = np.unique(arrays["texts"], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        arrays["texts"] = rank[number].reshape(arrays["texts"].shape).astype(np.int32)
    return replace(samples, arrays=arrays)


def _looks(n_all: int, error_rate: float) -> list[SequentialTest]:
    sizes: Sequence[int] = [*(math.ceil(share * n_all) for share in FRACTIONS), n_all]
    bounds = stopping_boundaries(tuple(size / n_all for size in sizes), error_rate)
    return [
        SequentialTest(
            n_scored=size, n_all=n_all, nominal=2 * float(ndtr(-bound)), error_rate=error_rate
        )
        for size, bound in zip(sizes, bounds, strict=True)
    ]
