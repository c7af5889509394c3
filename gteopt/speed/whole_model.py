"""Speed of a whole model from two depths of it, where all of its blocks are too many to measure.

Hides: the straight line through two depths. Refuses to know: how a depth was measured.
"""

from __future__ import annotations

from statistics import geometric_mean

from gteopt.errors import InputError
from gteopt.records.bench import BenchReport, WholeModelEstimate


def shallow_depth(n_layers: int) -> int | None:
    """The second depth to measure beside `n_layers` blocks; None where there is none below it.

    Half of the blocks keep both depths far apart, so that noise moves the line least.

    Example:
        >>> shallow_depth(8)
        4
    """
    return n_layers // 2 or None


def extrapolate(
    deep: BenchReport, shallow: BenchReport, depths: tuple[int, int], n_layers: int
) -> dict[str, WholeModelEstimate]:
    """What each variant of the whole model takes, on the line through two depths.

    Time and bytes are `a + b * depth`. The last block computes its output part for one token a
    text, and embedding and pooling happen once: all of them are in `a`, so one depth is not enough.

    Args:
        deep: measured with `depths[0]` blocks.
        shallow: measured with `depths[1]` blocks, by the same spec.
        depths: the larger one first.
        n_layers: blocks of the whole model.

    Raises:
        InputError: a variant was no slower with more blocks, so the runs were too noisy.

    Example:
        >>> extrapolate(deep, shallow, (8, 4), 28)["rtn-int4"].query_ms
        412.0
    """
    far, near = depths

    def at_whole(name: str, larger: float, smaller: float) -> float:
        if larger <= smaller:
            raise InputError(
                f"{name} was no slower with {far} blocks than with {near}: the machine was too "
                f"busy to tell the time of a block; close other programs, or raise --repeats"
            )
        return larger + (n_layers - far) * (larger - smaller) / (far - near)

    found = {}
    for name, own in deep.variants.items():
        other = shallow.variants[name]
        seconds_a_token = [
            at_whole(name, 1 / a.tokens_per_s, 1 / b.tokens_per_s)
            for a, b in zip(own.throughput, other.throughput, strict=True)
        ]
        found[name] = WholeModelEstimate(
            query_ms=at_whole(name, own.latency.p50_ms, other.latency.p50_ms),
            tokens_per_s=1 / geometric_mean(seconds_a_token),
            weight_bytes=round(at_whole(name, own.weight_bytes, other.weight_bytes)),
        )
    return found
