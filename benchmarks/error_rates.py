"""How often intervals cover and verdicts are wrong, on synthetic scores of known difference.

    python benchmarks/error_rates.py          # benchmarks/results/error_rates.json, about a minute

Coverage: of the 95 % interval of a difference, over resamplings of whole evaluations. Verdicts: how
often a table holds a false "equivalent" where every row's true difference is the margin, and what
the correction costs where the true difference is zero.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
from scipy import stats

from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.statistics import interval, judge, paired_draws
from gteopt.machine import machine, versions
from gteopt.records.evaluation import Correction, Difference

FOLDER = Path(__file__).parent
MARGIN = 0.01
Pair = tuple[Samples, Samples]


def queries(rng: np.random.Generator, n: int) -> Pair:
    """NDCG of queries, three in ten of which change."""
    ours = rng.beta(0.6, 0.6, n)
    moved = np.clip(ours + rng.normal(-0.1, 0.3, n), 0, 1)
    theirs = np.where(rng.random(n) < 0.3, moved, ours)
    return tuple(  # type: ignore[return-value]
        Samples("mean", "query", {"values": each[None]}) for each in (theirs, ours)
    )


def answers(rng: np.random.Generator, n: int) -> Pair:
    """Right and wrong answers, few of which flip."""
    ours = rng.random(n) < 0.8
    flipped = rng.random(n) < np.where(ours, 0.06, 0.1)
    both = (np.where(flipped, ~ours, ours), ours)
    return tuple(  # type: ignore[return-value]
        Samples("mean", "document", {"values": each.astype(float)[None]}) for each in both
    )


def similarities(rng: np.random.Generator, n: int) -> Pair:
    """Graded pairs, ranked by two models of which one is noisier."""
    gold = rng.standard_normal(n)
    ours = gold + 0.8 * rng.standard_normal(n)
    theirs = ours + 0.4 * rng.standard_normal(n)
    return tuple(  # type: ignore[return-value]
        Samples("spearman", "pair", {"similarities": each, "gold": gold}) for each in (theirs, ours)
    )


def duplicates(rng: np.random.Generator, n: int) -> Pair:
    """Duplicates among pairs, by average precision."""
    gold = (rng.random(n) < 0.4).astype(int)
    ours = 1.2 * gold + rng.standard_normal(n)
    theirs = ours + 0.5 * rng.standard_normal(n)
    return tuple(  # type: ignore[return-value]
        Samples("max_ap", "pair", {"similarities": each[None], "gold": gold})
        for each in (theirs, ours)
    )


CASES: dict[str, Callable[[np.random.Generator, int], Pair]] = {
    "queries (nDCG)": queries,
    "answers (accuracy)": answers,
    "similarities (Spearman)": similarities,
    "duplicates (average precision)": duplicates,
}


def coverage(case: str, n_units: int, n_repeats: int) -> dict[str, Any]:
    """Share of evaluations whose interval holds the true difference."""
    make = CASES[case]
    rng = np.random.default_rng(0)
    large = [make(rng, 20_000) for _ in range(20)]
    true = float(np.mean([variant.score() - baseline.score() for variant, baseline in large]))
    hits = 0
    for _ in range(n_repeats):
        draws = paired_draws(*make(rng, n_units), n_resamples=300)
        assert draws is not None
        low, high = interval(draws.difference)
        hits += low <= true <= high
    return {"case": case, "n_units": n_units, "n_repeats": n_repeats, "covered": hits / n_repeats}


def claim(value: float, error: float, freedom: float) -> Difference:
    """A difference as the records hold it."""
    half_width = error * float(stats.t.ppf(0.975, freedom))
    return Difference(
        value=value,
        low=value - half_width,
        high=value + half_width,
        verdict="undecided",
        p=float(2 * stats.t.sf(abs(value) / error, freedom)),
        freedom=freedom,
    )


def tables(true: float, n_rows: int, error: float, n_tables: int) -> dict[str, Any]:
    """Tables of rows with one true difference: how many hold an "equivalent", and how many rows."""
    rng = np.random.default_rng(n_rows)
    freedom = 200.0
    found: dict[str, Any] = {
        "true_difference": true,
        "n_rows": n_rows,
        "standard_error": error,
        "n_tables": n_tables,
    }
    counts = {each: [0, 0] for each in get_args(Correction)}
    for _ in range(n_tables):
        errors = error * np.sqrt(rng.chisquare(freedom, n_rows) / freedom)
        values = rng.normal(true, error, n_rows)
        claims = {
            row: (claim(float(value), float(own), freedom), MARGIN)
            for row, (value, own) in enumerate(zip(values, errors, strict=True))
        }
        for correction, count in counts.items():
            n_equivalent = list(judge(claims, correction).values()).count("equivalent")
            count[0] += n_equivalent > 0
            count[1] += n_equivalent
    for correction, (n_with, n_all) in counts.items():
        found[f"tables_{correction}"] = n_with / n_tables
        found[f"rows_{correction}"] = n_all / (n_tables * n_rows)
    return found


def main() -> None:
    """Simulate and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "results" / "error_rates.json")
    arguments = parser.parse_args()
    record = {
        "command": "python benchmarks/error_rates.py",
        "coverage": [coverage(case, n, 200) for case in CASES for n in (50, 300)],
        "false_equivalence": [tables(MARGIN, n, 0.003, 1000) for n in (1, 8, 36)],
        "cost": [tables(0.0, n, error, 300) for n in (1, 8, 36) for error in (0.002, 0.003, 0.004)],
        "note": "two cores shared with other work",
        "machine": machine().model_dump(),
        "versions": {**versions(), "scipy": version("scipy")},
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
