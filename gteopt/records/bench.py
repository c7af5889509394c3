"""Records of speed and memory, and the prices that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from statistics import geometric_mean
from typing import Annotated, Literal

from pydantic import Field

from gteopt.config.plan import BenchSpec, Workload
from gteopt.config.recipe import VectorCode
from gteopt.frozen import Frozen
from gteopt.records.environment import Conditions, Machine


class LatencyRecord(Frozen):
    """Percentiles of one query's end-to-end time, in milliseconds (texts in, vector out).

    Attributes:
        weight_gb_per_s: bytes of the blocks' weights, which a query reads once, over `p50_ms`.
        joules: of the device a query, when they follow one another; None where nothing counts them,
            see `BenchReport.energy`.
    """

    tokens: int
    n_queries: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    weight_gb_per_s: float | None = None
    joules: float | None = None


class ThroughputRecord(Frozen):
    """One workload of one variant: medians over the interleaved repeats.

    Attributes:
        tokens: of each text, or their median where lengths differ.
        lengths: as in `Workload`.
        tokens_per_s: real tokens, no padding counted.
        baseline_ratio: median over repeats of variant speed / baseline speed in the same round.
        ratios: of each repeat; their interval is `VariantBench.speed_interval`.
        gflops: 10^9 operations a second that were done: two a weight of a linear layer and token,
            and 4 T * d a block, head and query for attention; what the last block leaves out where
            one token a text is pooled is not counted.
        peak_ratio: `gflops` / the best product measured in the same run, `BenchReport.peak_gflops`.
        joules_per_million_tokens: of the device, as in `LatencyRecord`.
    """

    batch_size: int
    tokens: int
    lengths: Literal["equal", "lognormal"] = "equal"
    texts_per_s: float
    tokens_per_s: float
    baseline_ratio: float
    ratios: tuple[float, ...] = ()
    gflops: float | None = None
    peak_ratio: float | None = None
    joules_per_million_tokens: float | None = None

    @property
    def workload(self) -> Workload:
        """What was measured."""
        return Workload(batch_size=self.batch_size, tokens=self.tokens, lengths=self.lengths)


class VariantBench(Frozen):
    """Speed and memory of one variant.

    Attributes:
        weight_bytes: parameters and buffers as they lie in memory at run time.
        load_s: from path to first vector ready, in a fresh process, with its imports done and the
            files in the page cache.
        imports_process_bytes: its resident set after the imports, before the load.
        peak_process_bytes: its peak resident set over load and one batch, imports included.
        peak_device_bytes: peak allocated device memory of it; None on CPU.
        kernels: how many linear layers run on which kernel.
        dims: dimensions of a stored vector.
        code: how each of them is stored.
        bytes_per_vector: of one stored vector code.
        index_bytes_per_million: bytes of a million stored vectors, search structure not counted.
        graph_bytes: device memory of the recorded forward passes of short texts (CUDA graphs); None
            where queries ran kernel by kernel.
    """

    artifact_sha256: str
    weight_bytes: int
    load_s: float
    imports_process_bytes: int
    peak_process_bytes: int
    peak_device_bytes: int | None
    latency: LatencyRecord
    throughput: tuple[ThroughputRecord, ...]
    kernels: dict[str, int]
    dims: int
    code: VectorCode
    bytes_per_vector: int
    index_bytes_per_million: int
    graph_bytes: int | None = None

    @property
    def tokens_per_s(self) -> float:
        """Geometric mean over the workloads, so that none of them outweighs the others."""
        return geometric_mean(record.tokens_per_s for record in self.throughput)

    @property
    def speed_ratio(self) -> float:
        """Variant speed / baseline speed: geometric mean of the workloads' `baseline_ratio`."""
        return geometric_mean(record.baseline_ratio for record in self.throughput)

    @property
    def speed_interval(self) -> tuple[float, float] | None:
        """95 % interval of `speed_ratio`; None with too few repeats to claim one.

        Ends are order statistics of the repeats' ratios (each the geometric mean over the
        workloads), which hold for the median of any distribution: David and Nagaraja, Order
        Statistics, 2003, section 7.1. They are widened to `speed_ratio` where that lies outside.
        """
        by_repeat = [
            geometric_mean(ratios)
            for ratios in zip(*(record.ratios for record in self.throughput), strict=False)
        ]
        ends = _median_interval(by_repeat)
        if ends is None:
            return None
        return min(ends[0], self.speed_ratio), max(ends[1], self.speed_ratio)

    @property
    def peak_memory_bytes(self) -> int:
        """The peak where the weights lie: on the device where there is one, else the process."""
        if self.peak_device_bytes is not None:
            return self.peak_device_bytes
        return self.peak_process_bytes


MIN_REPEATS = 6
"""With fewer, no two order statistics enclose the median in 95 % of all cases."""


def _median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Order statistics that enclose the median with 95 % confidence; None of too few values."""
    n, below, rank = len(values), 0.0, 0
    for k in range(n // 2):
        below += comb(n, k) / 2**n  # P(at most k of n values are below the median)
        if below > 0.025:
            break
        rank = k + 1
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[n - rank]


class WholeModelEstimate(Frozen):
    """What one variant of a whole model takes, calculated from two depths of it.

    Attributes:
        query_ms: median time of one query.
        tokens_per_s: geometric mean over the workloads, as `VariantBench.tokens_per_s`.
        weight_bytes: as in `VariantBench`.
    """

    query_ms: float
    tokens_per_s: float
    weight_bytes: int


class DummyRecord(Frozen):
    """The weights were random: what of the model there was.

    Attributes:
        base: the published model whose shape it has.
        n_layers: blocks that were built and measured.
        of_layers: blocks that the model has; where they are more, no measured figure is the whole
            model's.
        shallow_layers: blocks of the second depth; None where one depth was measured.
        whole: variant -> the whole model, calculated from both depths.
    """

    base: str
    n_layers: int
    of_layers: int
    shallow_layers: int | None = None
    whole: dict[str, WholeModelEstimate] = Field(default_factory=dict)


class BenchReport(Frozen):
    """Result of `bench`: every variant measured side by side with the baseline in one run.

    Attributes:
        peak_gflops: by number type, 10^9 operations a second of the best large product that torch
            offers on this device.
        dummy: None where the weights were real.
        price_per_hour: of the machine, in dollars, as the user said.
        energy: what counted the joules, or why nothing did.
        other_load: share of the processor that other programs used while this was measured, 0 to
            1; None where the system does not tell.
    """

    schema_: Literal["gteopt.bench/1"] = Field(default="gteopt.bench/1", alias="schema")
    spec: BenchSpec
    baseline: str
    variants: dict[str, VariantBench]
    device: str
    n_threads: int
    machine: Machine
    versions: Conditions
    peak_gflops: dict[str, float] = Field(default_factory=dict)
    dummy: DummyRecord | None = None
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    energy: str | None = None
    other_load: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether figures are those of a whole model, not of some of its blocks."""
        return self.dummy is None or self.dummy.n_layers == self.dummy.of_layers

    @property
    def noise(self) -> float:
        """How far the baseline's speed seems to be from itself; 0 where it was not measured."""
        own = self.variants.get(self.baseline)
        if own is None:
            return 0.0
        ratios = [each.baseline_ratio for each in own.throughput]
        return float(max(abs(ratio - 1) for ratio in (*ratios, *(own.speed_interval or ()))))

    def cost_per_million_tokens(self, name: str) -> float | None:
        """Dollars, over the workloads; None without a price, or where nothing is known of the
        whole model.
        """
        whole = self.dummy.whole.get(name) if self.dummy else None
        if self.price_per_hour is None or not (self.is_whole or whole):
            return None
        speed = whole.tokens_per_s if whole else self.variants[name].tokens_per_s
        return cost_per_million_tokens(self.price_per_hour, speed)


HOSTED_PRICE = 0.008
"""Dollars for a million tokens at which gte-Qwen2-7B-instruct has been listed as a hosted model."""


def cost_per_million_tokens(price_per_hour: float, tokens_per_s: float) -> float:
    """Dollars, of a machine that does nothing else all the time."""
    return price_per_hour / 3600 / tokens_per_s * 1e6


def break_even_price_per_hour(tokens_per_s: float, price: float = HOSTED_PRICE) -> float:
    """Hourly price of a machine at which a million tokens cost `price` dollars."""
    return price * tokens_per_s * 3600 / 1e6


HOURS_A_MONTH = 730


def index_cost_per_month(price_per_hour: float, index_bytes: int, memory_bytes: int) -> float:
    """Dollars for the share of a machine's memory that an index takes, all the month."""
    return price_per_hour * HOURS_A_MONTH * index_bytes / memory_bytes
