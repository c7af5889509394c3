"""Screening: which variants are measured in full, and why the others are not."""

from __future__ import annotations

from gteopt.commands.screening import judge_screening
from gteopt.config.policy import Limit, Objective, Policy
from gteopt.records.screening import ScreenedVariant


def policy(**limits: Limit) -> Policy:
    return Policy(
        schema="gteopt.policy/1",
        name="test",
        limits=limits,  # type: ignore[arg-type]
        objective=Objective(minimise="weight_bytes"),
    )


def variant(name: str, megabytes: float, overlap: float, *, fast: bool = False) -> ScreenedVariant:
    return ScreenedVariant(
        name=name,
        weight_bytes=int(megabytes * 1e6),
        bytes_per_vector=1024,
        neighbour_overlap=overlap,
        fast_activations=fast,
    )


def reasons(*variants: ScreenedVariant, keep: int = 3, **limits: Limit) -> dict[str, str | None]:
    judged = judge_screening(variants, policy(**limits), n_texts=300, keep=keep)
    return {screened.name: screened.dropped for screened in judged}


def test_a_variant_that_breaks_a_size_limit_is_dropped_with_both_amounts() -> None:
    reason_of = reasons(
        variant("small", 30, 0.8), variant("large", 50, 0.9), weight_bytes=Limit(max=40e6)
    )
    assert reason_of == {"small": None, "large": "weight size 50 MB, limit 40 MB"}


def test_neighbours_are_judged_only_beyond_the_error_of_the_sample() -> None:
    # 0.79 of 3,000 neighbours has a standard error of 0.0074.
    reason_of = reasons(
        variant("near", 30, 0.79), variant("far", 20, 0.7), neighbour_overlap=Limit(min=0.8)
    )
    assert reason_of["near"] is None
    assert reason_of["far"] == "neighbour overlap 70 %, limit 80 %"


def test_a_variant_that_another_beats_in_size_and_closeness_is_dropped() -> None:
    reason_of = reasons(variant("good", 30, 0.9), variant("poor", 31, 0.8))
    assert reason_of["poor"] == "good is no larger and closer to the base"


def test_a_variant_that_may_be_faster_is_not_beaten_by_size_and_closeness() -> None:
    reason_of = reasons(variant("good", 30, 0.9), variant("quick", 40, 0.8, fast=True))
    assert reason_of == {"good": None, "quick": None}


def test_the_smallest_and_the_closest_of_many_variants_go_on() -> None:
    variants = [variant(f"v{i}", 20 + i, 0.5 + i / 20) for i in range(8)]
    reason_of = reasons(*variants, keep=3)
    assert {name for name, reason in reason_of.items() if reason is None} == {"v0", "v7", "v1"}
    assert reason_of["v4"] == "3 other variants look better for this objective"
