"""Limits as a user states them, and the policy that follows from them.

Hides: units, and the metric behind each limit. Refuses to know: models, recipes.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gteopt.config.amounts import (
    parse_bytes,
    parse_count,
    parse_milliseconds,
    parse_ratio,
    parse_share,
)
from gteopt.config.policy import Limit, Metric, Objective, Policy
from gteopt.errors import InputError
from gteopt.frozen import Frozen

Goal = Literal["size", "speed", "index", "cost", "quality"]
DEFAULT_RETENTION = 0.95
DEFAULT_NEIGHBOURS = 0.7


class Limits(Frozen):
    """What a variant may cost and must keep, as a user states it.

    Attributes:
        max_weights: bytes of the weights in memory: "40MB" or "40MiB".
        max_memory: peak memory while encoding: "1GB".
        max_query_ms: 95th percentile of a single query's latency: "20ms".
        min_speedup: bulk speed over the baseline's: "1.5x".
        max_vector_bytes: bytes of one stored vector: "256B".
        max_index: bytes of all stored vectors: "10GB"; needs `n_vectors`.
        n_vectors: number of vectors that `max_index` is for: "50M".
        max_cost: dollars per million tokens; needs `price_per_hour`.
        price_per_hour: price of the machine, in dollars.
        min_quality: least lower end of retention's 95 % interval: "99%". Without labels, the least
            share of the nearest neighbours that stay.
        optimize: what to optimise within the limits.

    Example:
        >>> Limits(max_weights="40MB", min_quality="99%").policy(labelled=True).limits.keys()
        dict_keys(['weight_bytes', 'retention_low'])
    """

    max_weights: str | None = None
    max_memory: str | None = None
    max_query_ms: str | None = None
    min_speedup: str | None = None
    max_vector_bytes: str | None = None
    max_index: str | None = None
    n_vectors: str | None = None
    max_cost: Annotated[float, Field(gt=0)] | None = None
    price_per_hour: Annotated[float, Field(gt=0)] | None = None
    min_quality: str | None = None
    optimize: Goal = "size"

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.max_index is None) != (self.n_vectors is None):
            raise InputError("--max-index and --for belong together: --max-index 10GB --for 50M")
        if self.max_index is not None and self.max_vector_bytes is not None:
            raise InputError(
                "--max-index and --max-vector-bytes both limit a vector's bytes; give only one"
            )
        wants_cost = self.max_cost is not None or self.optimize == "cost"
        if wants_cost and self.price_per_hour is None:
            raise InputError("a cost needs the machine's price: --price-per-hour 2.50")
        return self

    def vector_bytes(self) -> float | None:
        """Upper limit of one stored vector's bytes; None without a limit."""
        if self.max_vector_bytes is not None:
            return parse_bytes("--max-vector-bytes", self.max_vector_bytes)
        if self.max_index is None:
            return None
        assert self.n_vectors is not None
        return parse_bytes("--max-index", self.max_index) / parse_count("--for", self.n_vectors)

    def weight_bytes(self) -> int | None:
        """Upper limit of the weights' bytes; None without a limit."""
        return None if self.max_weights is None else parse_bytes("--max-weights", self.max_weights)

    def policy(self, *, labelled: bool) -> Policy:
        """The policy with these limits.

        Args:
            labelled: whether scores will be measured; otherwise nearest neighbours decide.

        Raises:
            InputError: an amount cannot be read; the message names the option.
        """
        limits: dict[Metric, Limit] = {}
        if (weights := self.weight_bytes()) is not None:
            limits["weight_bytes"] = Limit(max=weights)
        if self.max_memory is not None:
            memory = parse_bytes("--max-memory", self.max_memory)
            limits["peak_memory_bytes"] = Limit(max=memory)
        if self.max_query_ms is not None:
            limits["p95_ms"] = Limit(max=parse_milliseconds("--max-query-ms", self.max_query_ms))
        if self.min_speedup is not None:
            limits["speed_ratio"] = Limit(min=parse_ratio("--min-speedup", self.min_speedup))
        if (vector := self.vector_bytes()) is not None:
            limits["index_bytes"] = Limit(max=vector * 1e6)
        if self.max_cost is not None:
            limits["cost_per_million_tokens"] = Limit(max=self.max_cost)
        quality = (
            None if self.min_quality is None else parse_share("--min-quality", self.min_quality)
        )
        if labelled:
            limits["retention_low"] = Limit(min=quality or DEFAULT_RETENTION)
        if not labelled or quality is None:
            is_given = quality is not None and not labelled
            limits["neighbour_overlap"] = Limit(min=quality if is_given else DEFAULT_NEIGHBOURS)
        return Policy(
            schema="gteopt.policy/1",
            name="limits",
            summary=f"The limits of `gteopt optimize`, optimised for {self.optimize}",
            limits=limits,
            objective=_objective(self.optimize, labelled=labelled),
        )


def _objective(goal: Goal, *, labelled: bool) -> Objective:
    if goal == "size":
        return Objective(minimise="weight_bytes")
    if goal == "speed":
        return Objective(maximise="tokens_per_s")
    if goal == "index":
        return Objective(minimise="index_bytes")
    if goal == "cost":
        return Objective(minimise="cost_per_million_tokens")
    return Objective(maximise="retention" if labelled else "neighbour_overlap")
