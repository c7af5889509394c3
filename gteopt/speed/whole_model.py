"""Estimate the speed of a whole model from two depths, if it is too large to measure.

Hides: the straight line through two depths. Refuses to know: how a depth was measured.
"""

from __future__ import annotations

from statistics import geometric_mean

from gteopt.errors import InputError
from gteopt.records.bench import BenchReport, WholeModelEstimate


def shallow_depth(n_layers: int) -> int | None:
    """The second depth to measure beside `n_layers` blocks; None if there is no smaller depth.

    It is half of the blocks: two depths far apart make the line less sensitive to noise.

    Example:
        >>> shallow_depth(8)
        4
    """
    return n_layers // 2 or None


def extrapolate_whole_model(
    deep: BenchReport, shallow: BenchReport, depths: tuple[int, int], n_layers: int
) -> dict[str, WholeModelEstimate]:
    """Time and bytes of each variant of the whole model, on the line through two depths.

    Time and bytes are `a + b * depth`. One depth is not enough, because some work happens once:
    embedding, pooling, and a last block that computes only the pooled token of each text.

    Args:
        deep: measured with `depths[0]` blocks.
        shallow: measured with `depths[1]` blocks and the same spec.
        depths: both depths, the larger one first.
        n_layers: blocks of the whole model.

    Raises:
        InputError: a variant was not slower with more blocks, so the runs were too noisy.

    Example:
        >>> extrapolate(deep, shallow, (8, 4), 28)["rtn-int4"].query_ms
        412.0
    """
    n_deep, n_shallow = depths

    def at_whole(name: str, larger: float, smaller: float) -> float:
        if larger <= smaller:
            raise InputError(
                f"{name} was not slower with {n_deep} blocks than with {n_shallow}: the machine "
                f"was too busy to measure the time of a block; close other programs, or raise "
                f"--repeats"
            )
        return larger + (n_layers - n_deep) * (larger - smaller) / (n_deep - n_shallow)

    estimates = {}
    for name, of_deep in deep.variants.items():
        of_shallow = shallow.variants[name]
        seconds_a_token = [
            at_whole(name, 1 / a.tokens_per_s, 1 / b.tokens_per_s)
            for a, b in zip(of_deep.throughput, of_shallow.throughput, strict=True)
        ]
        estimates[name] = WholeModelEstimate(
            query_ms=at_whole(name, of_deep.latency.p50_ms, of_shallow.latency.p50_ms),
            tokens_per_s=1 / geometric_mean(seconds_a_token),
            weight_bytes=round(at_whole(name, of_deep.weight_bytes, of_shallow.weight_bytes)),
        )
    return estimates
