"""The record of a decision: the pick, and each limit that another candidate breaks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.config.policy import Metric, Policy
from gteopt.frozen import Frozen


class BrokenLimit(Frozen):
    """A limit that a candidate breaks; `found` is its metric, None where it was not measured."""

    metric: Metric
    bound: Literal["min", "max"]
    limit: float
    found: float | None


class Candidate(Frozen):
    """One variant with its metrics and the limits that it breaks."""

    name: str
    metrics: dict[Metric, float]
    broken: tuple[BrokenLimit, ...]
    on_pareto_front: bool


class Choice(Frozen):
    """The answer to a policy.

    Attributes:
        picked: the variant to deploy; None where no variant keeps every limit.
        reason: one sentence that explains the pick.
    """

    schema_: Literal["gteopt.choice/1"] = Field(default="gteopt.choice/1", alias="schema")
    policy: Policy
    picked: str | None
    reason: str
    candidates: tuple[Candidate, ...]
