"""When the verdict on a task is certain before all of its queries or pairs are scored.

The difference is looked at after an eighth, a quarter, half and three quarters of the items. More
looks make more false claims. Each look therefore gets a share of the error rate, by the spending
function of Lan & DeMets (1983) that resembles O'Brien & Fleming's bounds (1979). A look decides
where its interval lies inside the margin, or outside of it. Such intervals hold the true difference
at all looks together (repeated confidence intervals, Jennison & Turnbull 1989).

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
from gteopt.records.evaluation import Difference, Sequential, Verdict

FRACTIONS = (0.125, 0.25, 0.5, 0.75)
"""Of the items, at the looks before the last one."""
_SEED = 0
_NODES = 300  # of the quadrature; more change no boundary by 1e-6
_TAIL = 9.0  # standard deviations; beyond them lies less than 1e-18
_MIN_ITEMS = 5 * MIN_UNITS  # the normal law of a mean of fewer is not to be had so far out


@lru_cache
def boundaries(fractions: tuple[float, ...], error_rate: float) -> tuple[float, ...]:
    """How many standard errors a difference must be off at each look.

    Two-sided. The chance that a Brownian motion B(t) leaves `boundary * sqrt(t)` at any look is
    `error_rate`. Until t, each side may spend 2 - 2 Phi(z / sqrt(t)), where z has a quarter of the
    rate above it (Lan & DeMets 1983). The boundaries follow one from the other by numerical
    integration (Armitage, McPherson & Rowe 1969).

    Args:
        fractions: of all items, ascending; the last is 1.
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
    """How much more than a share leaves the bound by the next look, of what has not left before."""
    beyond = ndtr((-bound - x) / step) + ndtr((x - bound) / step)
    return float(mass @ beyond) - share


@dataclass(frozen=True)
class StopRule:
    """What decides that a task need not be scored to its end.

    Attributes:
        baseline: entries of the whole baseline, by task, split and subset.
        baseline_sha256: of its files and vectors.
        margin: a difference of scores (0 to 1) that does not matter.
        n_claims: that share the error rate; 1 where each row has its own.
    """

    baseline: Mapping[tuple[str, str, str], Samples]
    baseline_sha256: str
    margin: float
    n_claims: int = 1

    @property
    def error_rate(self) -> float:
        """Two-sided, of one claim (Bonferroni: Holm's correction then keeps every verdict)."""
        return (1 - LEVEL) / self.n_claims

    def key(self) -> str:
        """What a stopped score depends on besides its task and its model."""
        return f"{self.baseline_sha256} {self.margin:g} {self.n_claims} {FRACTIONS}"

    def looks(self, key: tuple[str, str, str]) -> list[Sequential]:
        """The looks at a task, split and subset before its end; none where it cannot be stopped."""
        samples = self.baseline.get(key)
        if samples is None or not can_be_parted(samples):
            return []
        return _looks(samples.n_units, self.error_rate)[:-1]

    def at_end(self, key: tuple[str, str, str]) -> Sequential | None:
        """How a score that was looked at before counts in the end; None without earlier looks."""
        samples = self.baseline.get(key)
        if samples is None or not self.looks(key):
            return None
        return _looks(samples.n_units, self.error_rate)[-1]

    def is_decided(self, key: tuple[str, str, str], part: Samples, look: Sequential) -> bool:
        """Whether the verdict on these entries of the look's items is certain."""
        theirs = part_of(self.baseline[key], look.n_scored)
        if not part.pairs_with(theirs):
            return False
        draws = paired_draws(part, theirs)
        if draws is None:
            return False
        difference = difference_of(widened(draws, look), part.score() - theirs.score())
        return decided(difference, self.margin, look.error_rate) is not None


def decided(difference: Difference, margin: float, error_rate: float) -> Verdict | None:
    """The verdict that more items would not change, at a two-sided error rate; None without one.

    An interval within the margin is "equivalent", one beyond it "worse" or "better". A difference
    that is known to be there, and not whether it is beyond the margin, is left open: with all items
    it may turn out equivalent.
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


def widened(draws: Draws, look: Sequential) -> Draws:
    """Draws whose difference spreads as far as a difference of several looks must be read.

    Tests of it at the look's error rate then hold for all looks together.
    """
    wider = widening(look, draws.freedom, is_unchanged=draws.is_unchanged)
    difference = draws.difference
    apart = difference - difference.mean()
    return replace(draws, variant=draws.baseline + difference.mean() + wider * apart)


def widening(look: Sequential, freedom: float, *, is_unchanged: bool = False) -> float:
    """How many times longer the interval of a look is than one of a single test.

    Args:
        look: with its nominal level.
        freedom: degrees of freedom of the standard error.
        is_unchanged: the interval is the rule of three's, whose ends are logarithms of the level.
    """
    freedom = min(freedom, 1e6)
    at_rate = float(stdtrit(freedom, look.error_rate / 2))
    if not is_unchanged:
        return max(1.0, float(stdtrit(freedom, look.nominal / 2)) / at_rate)
    single = (1 - LEVEL) / 2
    longer = math.log(look.nominal / 2) / math.log(single)
    return max(1.0, longer * float(stdtrit(freedom, single)) / at_rate)


def can_be_parted(samples: Samples) -> bool:
    """Whether some of the items have a score of the same kind as all of them.

    Clusterings, translations and F1 over classes depend on what else is there.
    """
    apart = samples.statistic in ("mean", "spearman", "max_ap", "max_accuracy")
    named = samples.unit in ("query", "pair", "document") and samples.statistic not in CLUSTERINGS
    return apart and named and samples.n_units * FRACTIONS[0] >= _MIN_ITEMS


def rows_of(n_all: int, n_scored: int) -> Array:
    """The items that are scored first, ascending [n_scored]: the beginning of one random order."""
    order = np.random.default_rng((_SEED, n_all)).permutation(n_all)
    return np.sort(order[:n_scored])


def part_of(samples: Samples, n_scored: int) -> Samples:
    """The entries of the items that are scored first."""
    rows = rows_of(samples.n_units, n_scored)
    arrays = {name: array[..., rows] for name, array in samples.arrays.items()}
    if "texts" in arrays:  # numbered as they come up, as if these pairs were all
        _, first, number = np.unique(arrays["texts"], return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(first))
        arrays["texts"] = rank[number].reshape(arrays["texts"].shape).astype(np.int32)
    return replace(samples, arrays=arrays)


def _looks(n_all: int, error_rate: float) -> list[Sequential]:
    sizes: Sequence[int] = [*(math.ceil(share * n_all) for share in FRACTIONS), n_all]
    bounds = boundaries(tuple(size / n_all for size in sizes), error_rate)
    return [
        Sequential(
            n_scored=size, n_all=n_all, nominal=2 * float(ndtr(-bound)), error_rate=error_rate
        )
        for size, bound in zip(sizes, bounds, strict=True)
    ]
