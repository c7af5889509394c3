"""The record of a decision: the pick, and each limit that another candidate breaks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.config.policy import Metric, Policy
from gteopt.frozen import Frozen


class BrokenLimit(Frozen):
    """A limit that a candidate does not keep; `found` is None where the metric is missing."""

    metric: Metric
    bound: Literal["min", "max"]
    limit: float
    found: float | None


class Candidate(Frozen):
    """One variant as the policy sees it."""

    name: str
    metrics: dict[Metric, float]
    broken: tuple[BrokenLimit, ...]
    on_pareto_front: bool


class Choice(Frozen):
    """The answer to a policy.

    Attributes:
        picked: the variant to deploy; None when none keeps every limit.
        reason: one sentence a person can read.
    """

    schema_: Literal["gteopt.choice/1"] = Field(default="gteopt.choice/1", alias="schema")
    policy: Policy
    picked: str | None
    reason: str
    candidates: tuple[Candidate, ...]
