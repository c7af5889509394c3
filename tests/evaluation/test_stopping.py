"""Interim looks at a difference keep the stated error rate, and clear cases need fewer items."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import stdtrit

from gteopt.evaluation.per_item_scores import Floats, Samples
from gteopt.evaluation.statistics import difference_of, paired_draws
from gteopt.evaluation.stopping import (
    StopRule,
    early_verdict,
    first_scored_part,
    first_scored_rows,
    look_widening,
    stopping_boundaries,
    widen_for_looks,
)
from gteopt.records.evaluation import ScoreDifference, SequentialTest

FIFTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
QUARTERS = (0.25, 0.5, 0.75, 1.0)


@pytest.mark.parametrize(
    ("fractions", "published"),
    [
        (QUARTERS, (4.3326, 2.9631, 2.3590, 2.0141)),
        (FIFTHS, (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
    ],
)
def test_boundaries_are_those_of_published_tables(
    fractions: tuple[float, ...], published: tuple[float, ...]
) -> None:
    """The spending function resembles O'Brien and Fleming's, two-sided at 5 %.

    The tables are those of `ldbounds` and of Proschan, Lan & Wittes (2006).
    """
    assert stopping_boundaries(fractions, 0.05) == pytest.approx(published, abs=2e-4)


@pytest.mark.parametrize("error_rate", [0.05, 0.05 / 60])
def test_looks_together_cross_as_often_as_one_test_would(error_rate: float) -> None:
    fractions = (0.125, 0.25, 0.5, 0.75, 1.0)
    rng = np.random.default_rng(1)
    n = 1_000_000
    steps = rng.standard_normal((n, 5)) * np.sqrt(np.diff(fractions, prepend=0))
    z = np.cumsum(steps, axis=1) / np.sqrt(fractions)
    crossed = (np.abs(z) > stopping_boundaries(fractions, error_rate)).any(axis=1).mean()
    assert crossed == pytest.approx(error_rate, abs=4 * np.sqrt(error_rate / n))


def looks_of(n_all: int, n_claims: int = 1) -> list[SequentialTest]:
    key = "task", "test", "default"
    values = Samples("mean", "query", {"values": np.zeros((1, n_all))})
    rule = StopRule({key: values}, "", 0.01, n_claims)
    at_end = rule.at_end(key)
    assert at_end is not None
    return [*rule.looks(key), at_end]


def run(changes: Floats, looks: list[SequentialTest], margin: float) -> tuple[str, float]:
    """Verdict of one trial of changes [U], and the share of items that it took.

    Degrees of freedom are those of `paired_draws`: 2n / (kurtosis - 1), at most n - 1.
    """
    for look in looks:
        scored = changes[: look.n_scored]
        squares = (scored - scored.mean()) ** 2
        kurtosis = look.n_scored * float((squares**2).sum()) / float(squares.sum()) ** 2
        freedom = max(1.0, min(look.n_scored - 1, 2 * look.n_scored / (kurtosis - 1)))
        error = scored.std(ddof=1) / np.sqrt(look.n_scored) * look_widening(look, freedom)
        half = error * float(stdtrit(freedom, 0.975))
        value = float(scored.mean())
        difference = ScoreDifference(
            value=value,
            low=value - half,
            high=value + half,
            verdict="undecided",
            p=1.0,
            freedom=freedom,
        )
        verdict = early_verdict(difference, margin, look.error_rate)
        if verdict is not None:
            return verdict, look.n_scored / look.n_all
    return "undecided", 1.0


@pytest.mark.parametrize("n_claims", [1, 20])
@pytest.mark.parametrize("shape", ["normal", "steps"])
def test_a_difference_at_the_margin_is_seldom_called_equivalent(n_claims: int, shape: str) -> None:
    """The claims share a rate of at most 2.5 %. The verdict "better" is as rare at the margin."""
    rng = np.random.default_rng(7)
    looks, n_trials, n = looks_of(4000, n_claims), 4000, 4000
    verdicts, margin = [], 0.01
    for _ in range(n_trials):
        if shape == "normal":
            changes = rng.normal(margin, 0.1, n)
        else:  # one query in five changes its place in a ranking, a little more often upwards
            moved = rng.choice([-0.37, -0.13, 0.13, 0.37], n, p=[0.2, 0.2, 0.3, 0.3])
            changes = moved * (rng.random(n) < 0.2)
        verdicts.append(run(changes, looks, margin)[0])
    allowed = 0.025 / n_claims
    most = allowed + 3 * np.sqrt(allowed / n_trials)
    assert verdicts.count("equivalent") / n_trials <= most
    assert verdicts.count("better") / n_trials <= most
    assert verdicts.count("worse") == 0
    if n_claims == 1:  # the rate is used, so the test can fail
        assert verdicts.count("equivalent") / n_trials >= 0.01


def test_looking_often_errs_hardly_more_than_one_test_where_changes_are_skewed() -> None:
    """Few changes, nearly all of one sign, are hard for any interval; looking is not the cause."""
    rng = np.random.default_rng(7)
    looks, n_trials, n = looks_of(2000), 4000, 2000
    at_end = [look.model_copy(update={"nominal": look.error_rate}) for look in looks[-1:]]
    wrong = {"looks": 0, "once": 0}
    for _ in range(n_trials):
        changes = (rng.random(n) < 0.1) * (rng.exponential(0.2, n) - 0.1)
        wrong["looks"] += run(changes, looks, 0.01)[0] == "equivalent"
        wrong["once"] += run(changes, at_end, 0.01)[0] == "equivalent"
    assert wrong["once"] / n_trials < 0.05
    assert wrong["looks"] < 1.4 * wrong["once"]


def test_clear_cases_cost_a_fraction_and_get_the_right_verdict() -> None:
    rng = np.random.default_rng(3)
    looks = looks_of(4000)
    for mean, expected in ((0.0, "equivalent"), (-0.05, "worse"), (0.05, "better")):
        trials = [run(rng.normal(mean, 0.1, 4000), looks, 0.01) for _ in range(300)]
        assert np.mean([verdict == expected for verdict, _ in trials]) > 0.97
        assert np.mean([share for _, share in trials]) < 0.55, expected


def test_intervals_of_all_looks_hold_the_difference_together() -> None:
    """The bootstrap itself is used at 95 %, on scores of queries of which few change."""
    rng = np.random.default_rng(11)
    looks, n_trials, n = looks_of(600), 200, 600
    missed = 0
    for _ in range(n_trials):
        base = rng.choice([0.0, 0.39, 0.5, 0.63, 1.0], n)
        moved = np.where(rng.random(n) < 0.3, rng.choice([0.0, 0.39, 0.5, 0.63, 1.0], n), base)
        pair = [Samples("mean", "query", {"values": values[None]}) for values in (moved, base)]
        order = rng.permutation(n)
        for look in looks:
            rows = np.sort(order[: look.n_scored])
            ours, theirs = (
                Samples("mean", "query", {"values": samples.arrays["values"][:, rows]})
                for samples in pair
            )
            draws = paired_draws(ours, theirs, n_resamples=400)
            assert draws is not None
            difference = difference_of(widen_for_looks(draws, look), ours.score() - theirs.score())
            if not difference.low <= 0 <= difference.high:
                missed += 1
                break
    assert missed / n_trials <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_trials)


def test_a_look_in_which_nothing_changed_is_no_proof() -> None:
    """One answer in 200 gets worse, so 100 answers mostly show no change."""
    n = 800
    base = Samples("mean", "query", {"values": np.ones((1, n))})
    look = looks_of(n)[0]
    part = first_scored_part(base, look.n_scored)
    rule = StopRule({("t", "s", "d"): base}, "", 0.005)
    assert not rule.is_decided(("t", "s", "d"), part, look)


def test_parts_nest_and_are_a_random_order() -> None:
    for n_all in (400, 1000):
        smaller, larger = first_scored_rows(n_all, n_all // 8), first_scored_rows(n_all, n_all // 2)
        assert set(smaller) < set(larger)
        assert abs(larger.mean() / n_all - 0.5) < 0.1
        assert (np.diff(larger) > 0).all()
