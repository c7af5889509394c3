"""Intervals cover the truth at the stated rate for every statistic. Verdicts claim no more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import adjusted_mutual_info_score

from gteopt.evaluation.per_item_scores import Samples
from gteopt.evaluation.statistics import (
    Draws,
    ResampledScores,
    holm,
    interval_of_draws,
    judge_claims,
    mean_draws,
    own_draws,
    p_equivalent,
    p_value,
    paired_draws,
    resample_scores,
)
from gteopt.records.evaluation import Correction, ScoreDifference

Pair = tuple[Samples, Samples]
Maker = Callable[[np.random.Generator, int], Pair]

N_REPEATS = 300
N_RESAMPLES = 300


def pair_of(statistic: Any, unit: str, variant: dict[str, Any], baseline: dict[str, Any]) -> Pair:
    return Samples(statistic, unit, variant), Samples(statistic, unit, baseline)


def draw(pair: tuple[Samples, Samples | ResampledScores], **options: Any) -> Draws:
    draws = paired_draws(*pair, **options)
    assert draws is not None
    return draws


def ndcg(rng: np.random.Generator, n: int) -> Pair:
    """Queries of which three in ten change, by a tenth on average."""
    ours = rng.beta(0.6, 0.6, n)
    moved = np.clip(ours + rng.normal(-0.1, 0.3, n), 0, 1)
    theirs = np.where(rng.random(n) < 0.3, moved, ours)
    return pair_of("mean", "query", {"values": theirs[None]}, {"values": ours[None]})


def accuracy(rng: np.random.Generator, n: int) -> Pair:
    """Answers of which few flip: 6 % of the right ones, 10 % of the wrong ones."""
    ours = rng.random(n) < 0.8
    flipped = rng.random(n) < np.where(ours, 0.06, 0.1)
    values = (np.where(flipped, ~ours, ours).astype(float), ours.astype(float))
    return pair_of("mean", "document", {"values": values[0][None]}, {"values": values[1][None]})


def similarity(rng: np.random.Generator, n: int) -> Pair:
    gold = rng.standard_normal(n)
    ours = gold + 0.8 * rng.standard_normal(n)
    theirs = ours + 0.4 * rng.standard_normal(n)
    return pair_of(
        "spearman",
        "pair",
        {"similarities": theirs, "gold": gold},
        {"similarities": ours, "gold": gold},
    )


def translations(rng: np.random.Generator, n: int) -> Pair:
    gold, hard, wrong = np.arange(n), rng.random(n), rng.integers(0, n, n)
    predictions = [np.where(hard < right, gold, wrong)[None] for right in (0.75, 0.8)]
    arrays = [{"gold": gold, "predictions": predicted} for predicted in predictions]
    return pair_of("f1_weighted", "sentence", *arrays)


def classes(rng: np.random.Generator, n: int) -> Pair:
    gold, hard, wrong = rng.integers(0, 4, n), rng.random((5, n)), rng.integers(0, 4, (5, n))
    predictions = [np.where(hard < right, gold, wrong) for right in (0.6, 0.7)]
    arrays = [{"gold": gold, "predictions": predicted} for predicted in predictions]
    return pair_of("f1_macro", "document", *arrays)


def lucky(statistic: str) -> Maker:
    """Texts that are hard after every training, and training sets that are lucky for one model."""
    n_sets = 10

    def make(rng: np.random.Generator, n: int) -> Pair:
        gold, hard = rng.integers(0, 4, n), rng.random(n)
        luck = rng.normal(0, 0.04, (n_sets, 1))
        predictions = []
        for right in (0.6, 0.65):
            effort = 0.8 * hard + 0.2 * rng.random((n_sets, n))
            solved = effort < right + luck + rng.normal(0, 0.08, (n_sets, 1))
            predictions.append(
                np.where(solved, gold, (gold + 1 + rng.integers(0, 3, (n_sets, n))) % 4)
            )
        if statistic == "mean":
            return pair_of(
                "mean", "document", *({"values": predicted == gold} for predicted in predictions)
            )
        return pair_of(
            statistic,
            "document",
            *({"gold": gold, "predictions": predicted} for predicted in predictions),
        )

    return make


def sharing(statistic: str) -> Maker:
    """Pairs among 100 texts. A model misreads some texts in every pair that they are in."""
    n_texts = 100

    def make(rng: np.random.Generator, n: int) -> Pair:
        texts = np.stack([rng.choice(n_texts, 2, replace=False) for _ in range(n)], axis=1)
        meaning, misread, damaged = rng.standard_normal((3, n_texts))[:, texts].sum(axis=1)
        latent = meaning + 0.8 * rng.standard_normal(n)
        ours = latent + 0.3 * misread + 0.3 * rng.standard_normal(n)
        theirs = ours + damaged + 0.1 * rng.standard_normal(n)
        arrays: list[dict[str, Any]]
        if statistic == "spearman":
            arrays = [
                {"gold": latent, "similarities": similarities} for similarities in (theirs, ours)
            ]
        else:
            gold = (latent > 0.5).astype(int)
            arrays = [
                {"gold": gold, "similarities": similarities[None]}
                for similarities in (theirs, ours)
            ]
        return pair_of(statistic, "pair", *({**array, "texts": texts} for array in arrays))

    return make


def duplicates(statistic: str) -> Maker:
    def make(rng: np.random.Generator, n: int) -> Pair:
        gold = (rng.random(n) < 0.4).astype(int)
        ours = 1.2 * gold + rng.standard_normal(n)
        theirs = ours + 0.5 * rng.standard_normal(n)
        arrays = [
            {"gold": gold, "similarities": similarities[None]} for similarities in (theirs, ours)
        ]
        return pair_of(statistic, "pair", *arrays)

    return make


def clusterings(statistic: str) -> Maker:
    """Documents that are hard in every run, and runs that are lucky for one model or for both."""
    n_runs, n_classes = 8, 4

    def make(rng: np.random.Generator, n: int) -> Pair:
        gold = rng.integers(0, n_classes, n)
        document = np.tile(np.arange(n), n_runs)
        fixed = {
            "document": document,
            "experiment": np.repeat(np.arange(n_runs), n),
            "gold": gold[document],
            "level": np.zeros(n_runs, int),
        }
        hard, luck = rng.random(n), rng.normal(0, 0.05, (n_runs, 1))
        arrays = []
        for right in (0.6, 0.65):
            effort = 0.7 * hard + 0.3 * rng.random((n_runs, n))
            solved = effort < right + luck + rng.normal(0, 0.05, (n_runs, 1))
            cluster = np.where(solved, gold, rng.integers(0, n_classes, (n_runs, n)))
            arrays.append({**fixed, "cluster": cluster.ravel()})
        return pair_of(statistic, "document", *arrays)

    return make


def summaries(rng: np.random.Generator, n: int) -> Pair:
    """For each text, the correlation of the grades by people and by a model of 16 summaries."""
    human = rng.standard_normal((n, 16))
    ours = 0.4 * human + rng.standard_normal((n, 16))
    theirs = ours + 0.5 * rng.standard_normal((n, 16))
    correlations = []
    for grades in (theirs, ours):
        ranks = [stats.rankdata(values, axis=1) - 8.5 for values in (grades, human)]
        correlations.append((ranks[0] * ranks[1]).mean(axis=1) / (ranks[0] ** 2).mean(axis=1))
    return pair_of("mean", "text", *({"values": values[None]} for values in correlations))


# Maker of a sample, number of units, and the models' difference if it has a closed form.
CASES: dict[str, tuple[Maker, int, float | None]] = {
    "retrieval and reranking (mean over queries)": (ndcg, 60, None),
    "classification (accuracy)": (accuracy, 120, 0.2 * 0.1 - 0.8 * 0.06),
    "classification (macro F1)": (classes, 120, None),
    "classification (accuracy, training sets drawn)": (lucky("mean"), 120, None),
    "classification (macro F1, training sets drawn)": (lucky("f1_macro"), 120, None),
    "similarity (Spearman)": (
        similarity,
        150,
        6 / math.pi * (math.asin(1 / math.sqrt(1.8) / 2) - math.asin(1 / math.sqrt(1.64) / 2)),
    ),
    "summarization (mean of correlations)": (summaries, 100, None),
    "bitext (weighted F1)": (translations, 120, None),
    "pairs (average precision)": (duplicates("max_ap"), 150, None),
    "pairs (best accuracy)": (duplicates("max_accuracy"), 150, None),
    "similarity (texts shared)": (sharing("spearman"), 400, None),
    "pairs (average precision, texts shared)": (sharing("max_ap"), 400, None),
    "pairs (best accuracy, texts shared)": (sharing("max_accuracy"), 400, None),
    "clustering (V-measure)": (clusterings("v_measure"), 100, None),
    "clustering (AMI)": (clusterings("ami"), 40, None),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interval_covers_the_difference_at_its_rate(case: str) -> None:
    make, n_units, truth = CASES[case]
    rng = np.random.default_rng(7)
    # Metrics that are no means are biased: the truth is their mean at this number of units.
    scores = [[samples.score() for samples in make(rng, n_units)] for _ in range(800)]
    true_score = float(np.mean([theirs for _, theirs in scores]))
    if truth is None:
        truth = float(np.mean([ours - theirs for ours, theirs in scores]))
    n_repeats = N_REPEATS if "AMI" not in case else 150
    covered = own_covered = 0
    for number in range(n_repeats):
        variant, baseline = make(rng, n_units)
        draws = draw((variant, baseline), seed=number, n_resamples=N_RESAMPLES)
        low, high = interval_of_draws(draws.difference)
        covered += low <= truth <= high
        if number % 2 == 0:
            baseline_draws = own_draws(baseline, seed=number, n_resamples=N_RESAMPLES)
            assert baseline_draws is not None
            low, high = interval_of_draws(baseline_draws)
            own_covered += low <= true_score <= high
    # Coverage of 95 % stays within these bounds in 999 of 1000 runs of this test.
    for n_covered, n in ((covered, n_repeats), (own_covered, n_repeats // 2)):
        least, most = stats.binom.ppf([0.0005, 0.9995], n, 0.95)
        assert least <= n_covered <= most, f"{n_covered / n:.3f}"


def independent(ignoring: str, samples: Samples) -> Samples:
    """The same samples without the arrays that make units depend on each other."""
    arrays = dict(samples.arrays)
    if ignoring == "pairs apart":
        del arrays["texts"]
    else:
        arrays["values"] = arrays["values"].mean(axis=0, keepdims=True)
    return Samples(samples.statistic, samples.unit, arrays)


@pytest.mark.parametrize(
    ("case", "ignoring"),
    [
        ("similarity (texts shared)", "pairs apart"),
        ("pairs (average precision, texts shared)", "pairs apart"),
        ("pairs (best accuracy, texts shared)", "pairs apart"),
        ("classification (accuracy, training sets drawn)", "training sets given"),
    ],
)
def test_an_interval_that_ignores_what_units_share_covers_too_seldom(
    case: str, ignoring: str
) -> None:
    """The samples are those that the test above covers at its rate."""
    make, n_units, _ = CASES[case]
    rng = np.random.default_rng(7)
    pairs = [make(rng, n_units) for _ in range(800)]
    differences = [theirs.score() - ours.score() for theirs, ours in pairs]
    truth = float(np.mean(differences))
    covered = 0
    for number, (theirs, ours) in enumerate(pairs[:150]):
        bare = independent(ignoring, theirs), independent(ignoring, ours)
        low, high = interval_of_draws(draw(bare, seed=number, n_resamples=100).difference)
        covered += low <= truth <= high
    assert covered < stats.binom.ppf(0.0005, 150, 0.95), f"{covered / 150:.3f}"


def test_pairs_of_their_own_texts_have_the_interval_of_independent_ones() -> None:
    for statistic in ("spearman", "max_ap", "max_accuracy"):
        maker = similarity if statistic == "spearman" else duplicates(statistic)
        pair = maker(np.random.default_rng(0), 150)
        texts = np.arange(300).reshape(2, 150)
        with_texts = [Samples(e.statistic, e.unit, {**e.arrays, "texts": texts}) for e in pair]
        alike = draw((with_texts[0], with_texts[1]))
        np.testing.assert_array_equal(alike.difference, draw(pair).difference)
        assert alike.freedom == draw(pair).freedom


def test_pairs_that_are_listed_twice_say_no_more_than_once() -> None:
    """The second copy may swap the two texts, and both texts may be the same."""
    variant, baseline = similarity(np.random.default_rng(0), 400)
    texts = np.stack([np.arange(400), np.r_[np.arange(200), np.arange(400, 600)]])
    once, twice = [], []
    for samples in (variant, baseline):
        once.append(Samples("spearman", "pair", {**samples.arrays, "texts": texts}))
        doubled = {name: np.tile(array, 2) for name, array in samples.arrays.items()}
        again = np.concatenate([texts, texts[::-1]], axis=1)
        twice.append(Samples("spearman", "pair", {**doubled, "texts": again}))
    width = np.ptp(interval_of_draws(draw((once[0], once[1])).difference))
    doubled_width = np.ptp(interval_of_draws(draw((twice[0], twice[1])).difference))
    assert doubled_width == pytest.approx(width, rel=0.08)  # two bootstraps of a thousand draws


def test_pairs_of_one_text_that_did_not_change_are_no_proof_for_many() -> None:
    """The rule of three counts the units that could change independently."""
    gold = np.arange(40.0)
    widths = []
    for texts in (np.arange(80).reshape(2, 40), np.stack([np.arange(40) // 4, np.arange(40) + 10])):
        unchanged = Samples(
            "spearman", "pair", {"gold": gold, "similarities": gold, "texts": texts}
        )
        widths.append(np.ptp(interval_of_draws(draw((unchanged, unchanged)).difference)))
    assert widths[1] > 1.2 * widths[0]


def test_a_suite_interval_covers_the_mean_over_its_tasks_at_its_rate() -> None:
    makers = ((ndcg, 60), (accuracy, 120), (similarity, 80))
    rng = np.random.default_rng(3)
    truth = float(
        np.mean(
            [
                np.mean([a.score() - b.score() for a, b in (make(rng, n) for _ in range(2000))])
                for make, n in makers
            ]
        )
    )
    covered = 0
    for number in range(N_REPEATS):
        parts = []
        for make, n in makers:
            draws = draw(make(rng, n), seed=number, n_resamples=N_RESAMPLES)
            parts.append(draws)
        low, high = interval_of_draws(mean_draws(parts).difference)
        covered += low <= truth <= high
    least, most = stats.binom.ppf([0.0005, 0.9995], N_REPEATS, 0.95)
    assert least <= covered <= most, f"{covered / N_REPEATS:.3f}"


def test_pairing_makes_the_interval_of_a_small_change_short() -> None:
    variant, baseline = ndcg(np.random.default_rng(0), 400)
    paired = draw((variant, baseline))
    shuffled = np.random.default_rng(1).permutation(variant.arrays["values"][0])
    unpaired = draw((Samples("mean", "query", {"values": shuffled[None]}), baseline))
    assert np.ptp(interval_of_draws(paired.difference)) < 0.5 * np.ptp(
        interval_of_draws(unpaired.difference)
    )


def test_a_large_sample_has_the_textbook_interval() -> None:
    variant, baseline = ndcg(np.random.default_rng(0), 20_000)
    draws = draw((variant, baseline))
    differences = (variant.arrays["values"] - baseline.arrays["values"])[0]
    expected = stats.t.interval(
        0.95, len(differences) - 1, differences.mean(), stats.sem(differences)
    )
    assert interval_of_draws(draws.difference) == pytest.approx(expected, rel=0.1)


def test_a_model_equals_itself_exactly() -> None:
    for make, n, _ in CASES.values():
        _, baseline = make(np.random.default_rng(0), n)
        draws = draw((baseline, baseline), n_resamples=50, same_model=True)
        assert interval_of_draws(draws.difference) == (0.0, 0.0)
        assert p_value(0.0, draws) == 1.0


@pytest.mark.parametrize("rate", [0.005, 0.02, 0.05])
def test_rare_changes_are_covered_even_where_none_was_seen(rate: float) -> None:
    """Perhaps none of 60 answers changed. That does not prove that none ever changes."""
    rng = np.random.default_rng(5)
    covered = 0
    for number in range(N_REPEATS):
        ours = (rng.random(60) < 0.6).astype(float)
        theirs = np.where(rng.random(60) < rate, 0.0, ours)
        pair = pair_of("mean", "document", {"values": theirs[None]}, {"values": ours[None]})
        low, high = interval_of_draws(draw(pair, seed=number, n_resamples=100).difference)
        covered += low <= -0.6 * rate <= high
    assert covered >= stats.binom.ppf(0.0005, N_REPEATS, 0.95), f"{covered / N_REPEATS:.3f}"


def test_a_handful_of_units_has_no_interval() -> None:
    """Halves of four pairs have the same ranks, so an interval would have width 0."""
    gold = np.arange(4)
    arrays = [
        {"gold": gold, "similarities": np.array(ranks)} for ranks in ([1, 2, 3, 4], [2, 1, 4, 3])
    ]
    assert paired_draws(*pair_of("spearman", "pair", *arrays)) is None
    repeated = [{name: np.tile(values, 3) for name, values in model.items()} for model in arrays]
    assert paired_draws(*pair_of("spearman", "pair", *repeated)) is not None


def test_p_values_of_few_units_are_as_rare_as_they_say() -> None:
    """Holm's correction for hundreds of claims reads tails, and a t distribution's are heavy."""
    rng = np.random.default_rng(0)
    n_repeats, small = 3000, 0.001
    p_values = []
    for number in range(n_repeats):
        ours, theirs = rng.standard_normal((2, 10))
        pair = pair_of("mean", "query", {"values": theirs[None]}, {"values": ours[None]})
        draws = draw(pair, seed=number, n_resamples=200)
        p_values.append(p_value(pair[0].score() - pair[1].score(), draws))
    assert sum(p < small for p in p_values) <= stats.binom.ppf(0.999, n_repeats, 2 * small)
    least, most = stats.binom.ppf([0.0005, 0.9995], n_repeats, 0.05)
    assert least <= sum(p < 0.05 for p in p_values) <= most


def test_a_mean_of_independent_parts_has_the_sum_of_their_degrees_of_freedom() -> None:
    """Degrees of freedom add up for independent parts, but not for copies (Satterthwaite)."""
    variant, baseline = ndcg(np.random.default_rng(0), 30)
    part = draw((variant, baseline))
    assert part.freedom == draw((variant, baseline), seed=1).freedom
    assert mean_draws([part, part]).freedom == pytest.approx(part.freedom)
    apart = [draw((variant, baseline), seed=number) for number in range(4)]
    assert mean_draws(apart).freedom == pytest.approx(4 * part.freedom, rel=0.1)


def test_resamples_of_a_baseline_serve_every_comparison_with_it() -> None:
    for make, n, _ in CASES.values():
        variant, baseline = make(np.random.default_rng(0), n)
        drawn = resample_scores(baseline, n_resamples=50)
        for samples in (variant, baseline):
            anew, reused = (
                draw((samples, baseline), n_resamples=50),
                draw((samples, drawn), n_resamples=50),
            )
            np.testing.assert_array_equal(reused.difference, anew.difference)
            np.testing.assert_array_equal(reused.baseline, anew.baseline)


def test_the_same_seed_gives_the_same_interval_and_one_unit_gives_none() -> None:
    variant, baseline = ndcg(np.random.default_rng(0), 50)
    first, again, other_seed = (draw((variant, baseline), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.difference, again.difference)
    assert (first.difference != other_seed.difference).any()
    alone = Samples("mean", "query", {"values": np.array([[0.5]])})
    assert paired_draws(alone, alone) is None


def test_translations_of_the_same_texts_are_not_taken_for_independent() -> None:
    variant, baseline = ndcg(np.random.default_rng(0), 100)
    english = draw((variant, baseline))
    translated = draw((variant, baseline))
    other_task = draw(ndcg(np.random.default_rng(1), 100))  # as many queries of another task
    width = np.ptp(interval_of_draws(english.difference))
    assert np.ptp(interval_of_draws(mean_draws([english, translated]).difference)) == pytest.approx(
        width
    )
    both_widths = math.hypot(width, np.ptp(interval_of_draws(other_task.difference)))
    halved = np.ptp(interval_of_draws(mean_draws([english, other_task]).difference))
    assert halved == pytest.approx(both_widths / 2, rel=0.15)


def test_halves_leave_a_clustering_by_chance_at_zero_where_copies_do_not() -> None:
    """This is why documents are not drawn with replacement."""
    rng = np.random.default_rng(0)
    gold, cluster = np.repeat(np.arange(16), 3), rng.integers(0, 16, 48)
    drawn = rng.integers(0, 48, (200, 48))
    copies = np.mean([adjusted_mutual_info_score(gold[d], cluster[d]) for d in drawn])
    halves = [rng.permutation(48)[:24] for _ in range(200)]
    without = np.mean([adjusted_mutual_info_score(gold[d], cluster[d]) for d in halves])
    observed = adjusted_mutual_info_score(gold, cluster)
    assert copies > observed + 0.2
    assert abs(without - observed) < 0.1


def test_p_values_agree_with_the_interval_and_follow_the_normal_tail() -> None:
    scores = np.sqrt(2) * np.random.default_rng(0).standard_normal(100_000)
    draws = Draws(scores, np.zeros_like(scores))
    assert p_value(1.959964 * math.sqrt(2), draws) == pytest.approx(0.05, abs=0.002)
    assert p_value(5 * math.sqrt(2), draws) == pytest.approx(2 * stats.norm.sf(5), rel=0.1)


def test_holm_corrects_as_in_the_textbook() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})


def test_holm_keeps_false_claims_of_a_family_at_one_in_twenty() -> None:
    rng = np.random.default_rng(0)
    false = sum(
        min(holm({str(i): p for i, p in enumerate(row)}).values()) < 0.05
        for row in rng.random((2000, 20))
    )
    assert false <= stats.binom.ppf(0.999, 2000, 0.05)


def difference(value: float, half_width: float, freedom: float | None = None) -> ScoreDifference:
    """A difference as `difference_of` records it."""
    quantile = stats.norm.ppf(0.975) if freedom is None else stats.t.ppf(0.975, freedom)
    error = half_width / quantile
    tail = stats.norm if freedom is None else stats.t(freedom)
    p = float(2 * tail.sf(abs(value) / error))
    low, high = value - half_width, value + half_width
    return ScoreDifference(
        value=value, low=low, high=high, verdict="undecided", p=p, freedom=freedom
    )


@pytest.mark.parametrize(
    ("value", "half_width", "n_claims", "expected"),
    [
        (0.0015, 0.0065, 1, "equivalent"),
        (-0.005, 0.003, 1, "equivalent"),  # certainly worse, but within the margin
        (-0.006, 0.0035, 20, "worse"),  # with 20 claims no longer certainly within the margin
        (-0.016, 0.014, 1, "worse"),
        (0.026, 0.024, 1, "better"),
        (-0.016, 0.014, 20, "undecided"),  # does not survive the correction
        (-0.014, 0.016, 1, "undecided"),
    ],
)
def test_a_verdict_says_no_more_than_interval_and_correction_allow(
    value: float, half_width: float, n_claims: int, expected: str
) -> None:
    claims = {number: (difference(0.0, 1.0), 0.01) for number in range(1, n_claims)}
    claims[0] = difference(value, half_width), 0.01
    assert judge_claims(claims)[0] == expected
    if n_claims > 1:
        assert judge_claims(claims, "row")[0] == judge_claims({0: claims[0]})[0]


@pytest.mark.parametrize("freedom", [None, 12.0])
def test_one_row_is_equivalent_where_its_interval_lies_within_the_margin(
    freedom: float | None,
) -> None:
    for value in np.linspace(-0.012, 0.012, 25):
        for half_width in (0.0011, 0.0043, 0.0081, 0.0125):
            row = difference(float(value), half_width, freedom)
            within = row.low >= -0.01 and row.high <= 0.01
            assert (p_equivalent(row, 0.01) <= 0.025) == within


def test_a_table_of_rows_at_the_margin_seldom_holds_a_false_equivalence() -> None:
    """The true difference is the margin. Corrected per row, most tables hold a false claim."""
    rng = np.random.default_rng(0)
    n_tables, n_rows, freedom, error = 2000, 36, 40, 0.003
    corrections: tuple[Correction, ...] = ("family", "row")
    false: dict[Correction, int] = dict.fromkeys(corrections, 0)
    for _ in range(n_tables):
        values = rng.normal(0.01, error, n_rows)
        errors = error * np.sqrt(rng.chisquare(freedom, n_rows) / freedom)
        half_widths = errors * stats.t.ppf(0.975, freedom)
        claims = {
            row: (difference(float(value), float(half_width), freedom), 0.01)
            for row, (value, half_width) in enumerate(zip(values, half_widths, strict=True))
        }
        for correction in corrections:
            false[correction] += "equivalent" in judge_claims(claims, correction).values()
    assert false["family"] <= stats.binom.ppf(0.999, n_tables, 0.025)
    assert false["family"] >= stats.binom.ppf(0.001, n_tables, 0.015)  # not needlessly strict
    expected = 1 - 0.975**n_rows
    assert false["row"] == pytest.approx(n_tables * expected, rel=0.1)


def test_retention_is_drawn_from_both_scores_together() -> None:
    variant, baseline = ndcg(np.random.default_rng(0), 300)
    draws = draw((variant, baseline))
    low, high = interval_of_draws(draws.retention)
    assert low < variant.score() / baseline.score() < high
    # Fieller's interval of a ratio of means, to first order.
    ours, theirs = variant.arrays["values"][0], baseline.arrays["values"][0]
    ratio = ours.mean() / theirs.mean()
    error = 1.96 * stats.sem(ours - ratio * theirs) / theirs.mean()
    assert high - low == pytest.approx(2 * error, rel=0.2)
