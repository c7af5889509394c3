"""Screen a plan's variants: compare them quickly, and choose those to measure in full.

Hides: the rules and the folder of the screening. Refuses to know: clocks, labels, printing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gteopt.commands.evaluate import EvaluationSetup, evaluate_texts
from gteopt.config.plan import Plan
from gteopt.config.policy import Metric, Policy
from gteopt.config.recipe import Recipe
from gteopt.evaluation.user_data import Collection, read_own_data, read_texts
from gteopt.model.artifact import read_manifest
from gteopt.paths import shipped_dir
from gteopt.progress import Progress
from gteopt.records.files import write_record
from gteopt.records.screening import ScreenedVariant, ScreeningRecord
from gteopt.report.wording import METRIC_WORDS, metric_amount

_N_NEIGHBOURS = 10
_SURE = 3  # a variant is dropped if it misses a limit by this many standard errors


def screen_variants(
    plan: Plan,
    policy: Policy,
    recipes: Sequence[Recipe],
    artifacts: Mapping[str, Path],
    *,
    how: EvaluationSetup,
    progress: Progress,
) -> ScreeningRecord:
    """Compare every variant with the base on a sample of texts, and choose which go on.

    Args:
        plan: the plan with its texts and the settings of the screening.
        policy: the policy whose limits on sizes and neighbours apply.
        recipes: the plan's recipes.
        artifacts: folder of each recipe's variant.
        how: how texts are encoded.
        progress: receives the progress of encoding.

    Raises:
        InputError: texts cannot be read.
    """
    assert plan.screening is not None
    folder = plan.out / "screening"
    texts = sample_screening_texts(plan, plan.screening.n_texts)
    file = folder / "texts.txt"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(texts) + "\n", encoding="utf-8")
    sources = {"bf16": plan.base, **{name: str(path) for name, path in artifacts.items()}}
    reports = evaluate_texts(sources, file, folder, how=how, progress=progress)
    variants = []
    for recipe in recipes:
        manifest = read_manifest(artifacts[recipe.name])
        scheme = getattr(recipe.weights, "scheme", None)
        variants.append(
            ScreenedVariant(
                name=recipe.name,
                weight_bytes=manifest.weight_bytes,
                bytes_per_vector=manifest.vectors.bytes_per_vector,
                neighbour_overlap=reports[recipe.name].fidelity.neighbour_overlap,
                fast_activations=scheme is not None and scheme.activation_bits == 8,
            )
        )
    record = ScreeningRecord(
        n_texts=len(texts),
        variants=judge_screening(variants, policy, len(texts), plan.screening.keep),
    )
    write_record(plan.out / "screening.json", record)
    return record


def sample_screening_texts(plan: Plan, n_texts: int) -> list[str]:
    """Texts of the plan's own data at even steps through the file; shipped texts without data."""
    if plan.texts is not None:
        texts = read_texts(plan.texts, plan.columns)
    elif plan.data is not None:
        own = read_own_data(plan.data, plan.columns)
        if isinstance(own, Collection):
            texts = [row["text"] for row in (*own.queries, *own.corpus)]
        else:
            texts = [*own.first, *own.second]
    else:
        texts = read_texts(shipped_dir("eval/mini") / "corpus.jsonl")
    lines = list(dict.fromkeys(" ".join(text.split()) for text in texts))
    lines = [line for line in lines if line]
    step = max(1, math.ceil(len(lines) / n_texts))
    return lines[::step]


@dataclass(frozen=True)
class _Bound:
    metric: Metric
    value: float
    limit: float

    def reason(self) -> str:
        """The missed limit, in words."""
        return (
            f"{METRIC_WORDS[self.metric]} {metric_amount(self.metric, self.value)}, limit "
            f"{metric_amount(self.metric, self.limit)}"
        )


def judge_screening(
    variants: Sequence[ScreenedVariant], policy: Policy, n_texts: int, keep: int
) -> tuple[ScreenedVariant, ...]:
    """The same variants, with a reason for those that are dropped.

    A variant is dropped if it surely breaks a limit, or if another variant is no larger and surely
    closer. If more than `keep` remain, the best by the policy's objective and the closest are kept
    in turns.
    """
    reasons: dict[str, str] = {}
    for variant in variants:
        if (bound := _broken(variant, policy, n_texts)) is not None:
            reasons[variant.name] = bound.reason()
    remaining = [variant for variant in variants if variant.name not in reasons]
    for variant in remaining:
        better = next((other for other in remaining if _dominates(other, variant, n_texts)), None)
        if better is not None:
            reasons[variant.name] = f"{better.name} is no larger and closer to the base"
    remaining = [variant for variant in remaining if variant.name not in reasons]
    chosen = {variant.name for variant in _in_turns(remaining, policy)[:keep]}
    for variant in remaining:
        if variant.name not in chosen:
            reasons[variant.name] = f"{keep} other variants look better for this objective"
    return tuple(
        variant.model_copy(update={"dropped": reasons.get(variant.name)}) for variant in variants
    )


def _broken(variant: ScreenedVariant, policy: Policy, n_texts: int) -> _Bound | None:
    """The first limit that a variant surely breaks; None where there is none."""
    sizes: dict[Metric, float] = {
        "weight_bytes": variant.weight_bytes,
        "index_bytes": variant.bytes_per_vector * 1e6,
    }
    for metric, value in sizes.items():
        limit = policy.limits.get(metric)
        if limit is not None and limit.max is not None and value > limit.max:
            return _Bound(metric, value, limit.max)
    overlap, limit = variant.neighbour_overlap, policy.limits.get("neighbour_overlap")
    if limit is None or limit.min is None:
        return None
    surely_below = overlap + _SURE * _overlap_error(overlap, n_texts) < limit.min
    return _Bound("neighbour_overlap", overlap, limit.min) if surely_below else None


def _overlap_error(overlap: float, n_texts: int) -> float:
    """Standard error of an overlap, with each neighbour counted as one draw."""
    return math.sqrt(overlap * (1 - overlap) / (_N_NEIGHBOURS * n_texts))


def _dominates(other: ScreenedVariant, variant: ScreenedVariant, n_texts: int) -> bool:
    """Whether `other` is no larger, is surely closer, and has the same kind of activations."""
    if other.fast_activations != variant.fast_activations:
        return False
    no_larger = other.weight_bytes <= variant.weight_bytes
    no_longer = other.bytes_per_vector <= variant.bytes_per_vector
    error = _overlap_error(variant.neighbour_overlap, n_texts)
    is_closer = other.neighbour_overlap > variant.neighbour_overlap + error
    return no_larger and no_longer and is_closer


def _in_turns(variants: Sequence[ScreenedVariant], policy: Policy) -> list[ScreenedVariant]:
    """The variants in turns: the best by the objective, the closest, the next best, ..."""
    metric = policy.objective.metric

    def promise(variant: ScreenedVariant) -> tuple[float, float]:
        if metric in ("tokens_per_s", "speed_ratio", "cost_per_million_tokens", "p95_ms"):
            return (not variant.fast_activations, variant.weight_bytes)
        if metric == "index_bytes":
            return (variant.bytes_per_vector, variant.weight_bytes)
        if metric in ("weight_bytes", "peak_memory_bytes"):
            return (variant.weight_bytes, variant.bytes_per_vector)
        return (-variant.neighbour_overlap, variant.weight_bytes)

    by_promise = sorted(variants, key=promise)
    by_closeness = sorted(variants, key=lambda variant: -variant.neighbour_overlap)
    order: list[ScreenedVariant] = []
    while len(order) < len(variants):
        for ranked in (by_promise, by_closeness):
            rest = [variant for variant in ranked if variant not in order]
            order += rest[:1]
    return order
