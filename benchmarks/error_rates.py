"""Measure how often intervals and verdicts are wrong, on synthetic scores of known difference.

    python benchmarks/error_rates.py    # a minute; writes benchmarks/results/error_rates.json

Coverage: how often the 95 % interval of a difference contains the true one, over many evaluations.
False equivalence: how often a table contains an "equivalent" if the true difference of every row is
the margin. Cost: how many rows the correction leaves undecided if the true difference is zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
from results_files import conditions, write_results
from scipy import stats

from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.statistics import interval_of_draws, judge_claims, paired_draws
from gteopt.records.evaluation import Correction, ScoreDifference

FOLDER = Path(__file__).parent
MARGIN = 0.01
Pair = tuple[Samples, Samples]


def queries(rng: np.random.Generator, n: int) -> Pair:
    """Scores (nDCG) of queries; three in ten differ between variant and baseline."""
    baseline = rng.beta(0.6, 0.6, n)
    moved = np.clip(baseline + rng.normal(-0.1, 0.3, n), 0, 1)
    variant = np.where(rng.random(n) < 0.3, moved, baseline)
    return tuple(  # type: ignore[return-value]
        Samples("mean", "query", {"values": scores[None]}) for scores in (variant, baseline)
    )


def answers(rng: np.random.Generator, n: int) -> Pair:
    """Right and wrong answers, of which the variant flips a few."""
    baseline = rng.random(n) < 0.8
    flipped = rng.random(n) < np.where(baseline, 0.06, 0.1)
    both = (np.where(flipped, ~baseline, baseline), baseline)
    return tuple(  # type: ignore[return-value]
        Samples("mean", "document", {"values": right.astype(float)[None]}) for right in both
    )


def similarities(rng: np.random.Generator, n: int) -> Pair:
    """Similarities of graded pairs by two models; the variant is noisier."""
    gold = rng.standard_normal(n)
    baseline = gold + 0.8 * rng.standard_normal(n)
    variant = baseline + 0.4 * rng.standard_normal(n)
    return tuple(  # type: ignore[return-value]
        Samples("spearman", "pair", {"similarities": x, "gold": gold}) for x in (variant, baseline)
    )


def duplicates(rng: np.random.Generator, n: int) -> Pair:
    """Similarities of pairs, some of which are duplicates, for average precision."""
    gold = (rng.random(n) < 0.4).astype(int)
    baseline = 1.2 * gold + rng.standard_normal(n)
    variant = baseline + 0.5 * rng.standard_normal(n)
    return tuple(  # type: ignore[return-value]
        Samples("max_ap", "pair", {"similarities": x[None], "gold": gold})
        for x in (variant, baseline)
    )


CASES: dict[str, Callable[[np.random.Generator, int], Pair]] = {
    "queries (nDCG)": queries,
    "answers (accuracy)": answers,
    "similarities (Spearman)": similarities,
    "duplicates (average precision)": duplicates,
}


def coverage(case: str, n_units: int, n_repeats: int) -> dict[str, Any]:
    """Share of evaluations whose interval contains the true difference."""
    make = CASES[case]
    rng = np.random.default_rng(0)
    large = [make(rng, 20_000) for _ in range(20)]
    true = float(np.mean([variant.score() - baseline.score() for variant, baseline in large]))
    hits = 0
    for _ in range(n_repeats):
        draws = paired_draws(*make(rng, n_units), n_resamples=300)
        assert draws is not None
        low, high = interval_of_draws(draws.difference)
        hits += low <= true <= high
    return {"case": case, "n_units": n_units, "n_repeats": n_repeats, "covered": hits / n_repeats}


def claim(value: float, error: float, freedom: float) -> ScoreDifference:
    """A difference with the interval and p-value that records have."""
    half_width = error * float(stats.t.ppf(0.975, freedom))
    return ScoreDifference(
        value=value,
        low=value - half_width,
        high=value + half_width,
        verdict="undecided",
        p=float(2 * stats.t.sf(abs(value) / error, freedom)),
        freedom=freedom,
    )


def tables(true: float, n_rows: int, error: float, n_tables: int) -> dict[str, Any]:
    """Shares of tables with an "equivalent" and of rows that are one, by correction."""
    rng = np.random.default_rng(n_rows)
    freedom = 200.0
    result: dict[str, Any] = {
        "true_difference": true,
        "n_rows": n_rows,
        "standard_error": error,
        "n_tables": n_tables,
    }
    counts = {correction: [0, 0] for correction in get_args(Correction)}
    for _ in range(n_tables):
        errors = error * np.sqrt(rng.chisquare(freedom, n_rows) / freedom)
        values = rng.normal(true, error, n_rows)
        claims = {
            row: (claim(float(value), float(row_error), freedom), MARGIN)
            for row, (value, row_error) in enumerate(zip(values, errors, strict=True))
        }
        for correction, count in counts.items():
            n_equivalent = list(judge_claims(claims, correction).values()).count("equivalent")
            count[0] += n_equivalent > 0
            count[1] += n_equivalent
    for correction, (n_with, n_all) in counts.items():
        result[f"tables_{correction}"] = n_with / n_tables
        result[f"rows_{correction}"] = n_all / (n_tables * n_rows)
    return result


def main() -> None:
    """Simulate and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "results" / "error_rates.json")
    arguments = parser.parse_args()
    record = {
        "command": "python benchmarks/error_rates.py",
        "coverage": [coverage(case, n, 200) for case in CASES for n in (50, 300)],
        "false_equivalence": [tables(MARGIN, n, 0.003, 1000) for n in (1, 8, 36)],
        "cost": [tables(0.0, n, error, 300) for n in (1, 8, 36) for error in (0.002, 0.003, 0.004)],
        "note": "two cores shared with other work",
        **conditions({"scipy": version("scipy")}),
    }
    write_results(arguments.out, record)


if __name__ == "__main__":
    main()
