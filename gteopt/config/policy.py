"""Policies: the limits that a variant must keep and what is optimised within them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator

from gteopt.config.yaml_files import find_yaml, read_yaml
from gteopt.frozen import Frozen

DEFAULT_MARGIN = 0.01
"""One point of a score that is shown in per cent."""
Metric = Literal[
    "retention",
    "retention_low",
    "mean_cosine",
    "neighbour_overlap",
    "spearman",
    "weight_bytes",
    "peak_memory_bytes",
    "p95_ms",
    "tokens_per_s",
    "speed_ratio",
    "index_bytes",
    "cost_per_million_tokens",
]
HIGHER_IS_BETTER: frozenset[str] = frozenset(
    {
        "retention",
        "retention_low",
        "mean_cosine",
        "neighbour_overlap",
        "spearman",
        "tokens_per_s",
        "speed_ratio",
    }
)


class Limit(Frozen):
    """A bound on one metric; at least one side is given.

    Attributes:
        min: the lowest allowed value.
        max: the highest allowed value.
    """

    min: FiniteFloat | None = None
    max: FiniteFloat | None = None

    @model_validator(mode="after")
    def _can_be_kept(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}; no value can keep both")
        return self


class Objective(Frozen):
    """What to optimise among the variants that keep every limit; exactly one side is given.

    Attributes:
        minimise: the metric that should be as low as possible.
        maximise: the metric that should be as high as possible.
    """

    minimise: Metric | None = None
    maximise: Metric | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.minimise is None) == (self.maximise is None):
            raise ValueError("give exactly one of minimise and maximise")
        return self

    @property
    def metric(self) -> Metric:
        """The metric that is optimised."""
        metric = self.minimise or self.maximise
        assert metric is not None
        return metric


class Policy(Frozen):
    """The user's limits and what to optimise within them.

    Attributes:
        name: the name in tables.
        summary: one line for tables.
        limits: bounds by metric; empty sets no limit.
        objective: what to optimise within them.
        margin: a difference of scores (0 to 1) that does not matter to the user. A variant is
            equivalent to the baseline if its difference's 95 % interval lies within the margin.
    """

    schema_: Literal["gteopt.policy/1"] = Field(alias="schema")
    name: str
    summary: str = ""
    limits: dict[Metric, Limit] = Field(default_factory=dict)
    objective: Objective
    margin: Annotated[float, Field(gt=0, lt=1)] = DEFAULT_MARGIN


def load_policy(name_or_file: str, *, beside: Path | None = None) -> Policy:
    """A shipped policy by name, or one from a YAML file."""
    return read_yaml(find_yaml("recipes/policies", name_or_file, beside=beside), Policy)
