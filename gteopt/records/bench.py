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
from gteopt.records.environment import Conditions, MachineRecord


class LatencyRecord(Frozen):
    """Percentiles of one query's end-to-end time, in milliseconds (text in, vector out).

    Attributes:
        weight_gb_per_s: bytes of the blocks' weights, each read once per query, over `p50_ms`.
        joules: energy of the device per query, with queries back to back; None where it is not
            measured, see `BenchReport.energy`.
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
        tokens: tokens of each text, or their median where lengths differ.
        lengths: as in `Workload`.
        tokens_per_s: real tokens per second; padding is not counted.
        baseline_ratio: median over repeats of variant speed / baseline speed in the same round.
        ratios: variant speed / baseline speed of each repeat; see `VariantBench.speed_interval`.
        gflops: 10^9 operations per second. Counted are two per linear weight and token, and 4 T * d
            per block, head and query for attention. Work that the last block skips, where one token
            per text is pooled, is not counted.
        peak_ratio: `gflops` / the fastest product of the same run, `BenchReport.peak_gflops`.
        joules_per_million_tokens: energy of the device, as in `LatencyRecord`.
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
        weight_bytes: bytes of parameters and buffers in memory at run time.
        load_s: seconds from path to first vector in a fresh process, after its imports and with the
            files in the page cache.
        imports_process_bytes: resident set of that process after the imports, before the load.
        peak_process_bytes: its peak resident set over load and one batch, imports included.
        peak_device_bytes: its peak allocated device memory; None on a CPU.
        kernels: number of linear layers by kernel.
        backend: the library that computed the variant; None in older records.
        backend_reason: why "auto" took this backend; None if the user named it.
        dims: dimensions of a stored vector.
        code: how each dimension is stored.
        bytes_per_vector: bytes of one stored vector.
        index_bytes_per_million: bytes of a million stored vectors, without a search structure.
        graph_bytes: device memory of the CUDA graphs for short texts; None where queries ran kernel
            by kernel.
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
    backend: str | None = None
    backend_reason: str | None = None
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
        """95 % interval of `speed_ratio`; None with too few repeats for one.

        The ends are order statistics of the repeats' ratios, each the geometric mean over the
        workloads. They hold for the median of any distribution: David and Nagaraja, Order
        Statistics, 2003, section 7.1. They are widened to include `speed_ratio`.
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
        """Peak memory of the device, or of the process where the model runs on a CPU."""
        if self.peak_device_bytes is not None:
            return self.peak_device_bytes
        return self.peak_process_bytes


MIN_REPEATS = 6
"""With fewer repeats, no two order statistics enclose the median in 95 % of all cases."""


def _median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Order statistics that enclose the median with 95 % confidence; None for too few values."""
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
    """Time and memory of a variant of the whole model, extrapolated from two depths.

    Attributes:
        query_ms: median time of one query.
        tokens_per_s: geometric mean over the workloads, as in `VariantBench`.
        weight_bytes: as in `VariantBench`.
    """

    query_ms: float
    tokens_per_s: float
    weight_bytes: int


class DummyRecord(Frozen):
    """The model of a measurement with random weights.

    Attributes:
        base: the published model with the same shape.
        n_layers: blocks that were built and measured.
        of_layers: blocks of the published model; if there are more, the measured figures do not
            hold for the whole model.
        shallow_layers: blocks at the second depth; None where one depth was measured.
        whole: estimates for the whole model by variant, extrapolated from both depths.
    """

    base: str
    n_layers: int
    of_layers: int
    shallow_layers: int | None = None
    whole: dict[str, WholeModelEstimate] = Field(default_factory=dict)


class BenchReport(Frozen):
    """Result of `bench`: every variant measured side by side with the baseline in one run.

    Attributes:
        peak_gflops: by dtype, 10^9 operations per second of torch's fastest large product on this
            device.
        dummy: None where the weights were real.
        price_per_hour: price of the machine in dollars, as the user gave it.
        energy: what measured the joules, or why nothing did.
        other_load: share of the processor that other programs used during the measurement, 0 to 1;
            None where the system does not report it.
    """

    schema_: Literal["gteopt.bench/1"] = Field(default="gteopt.bench/1", alias="schema")
    spec: BenchSpec
    baseline: str
    variants: dict[str, VariantBench]
    device: str
    n_threads: int
    machine: MachineRecord
    versions: Conditions
    peak_gflops: dict[str, float] = Field(default_factory=dict)
    dummy: DummyRecord | None = None
    price_per_hour: Annotated[float, Field(ge=0)] | None = None
    energy: str | None = None
    other_load: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the figures hold for a whole model, not for some of its blocks."""
        return self.dummy is None or self.dummy.n_layers == self.dummy.of_layers

    @property
    def noise(self) -> float:
        """Largest deviation from 1 of the baseline's ratio to itself; 0 where not measured."""
        baseline = self.variants.get(self.baseline)
        if baseline is None:
            return 0.0
        ratios = [record.baseline_ratio for record in baseline.throughput]
        return float(max(abs(ratio - 1) for ratio in (*ratios, *(baseline.speed_interval or ()))))

    def cost_per_million_tokens(self, name: str) -> float | None:
        """Dollars per million tokens at the mean speed of the workloads.

        None without a price, or where only some blocks were measured at one depth.
        """
        whole = self.dummy.whole.get(name) if self.dummy else None
        if self.price_per_hour is None or not (self.is_whole or whole):
            return None
        speed = whole.tokens_per_s if whole else self.variants[name].tokens_per_s
        return cost_per_million_tokens(self.price_per_hour, speed)


HOSTED_PRICE = 0.008
"""A listed price of gte-Qwen2-7B-instruct as a hosted model, in dollars per million tokens."""


def cost_per_million_tokens(price_per_hour: float, tokens_per_s: float) -> float:
    """Dollars per million tokens on a machine that encodes all the time."""
    return price_per_hour / 3600 / tokens_per_s * 1e6


def break_even_price_per_hour(tokens_per_s: float, price: float = HOSTED_PRICE) -> float:
    """Price per hour of a machine at which a million tokens cost `price` dollars."""
    return price * tokens_per_s * 3600 / 1e6


HOURS_A_MONTH = 730


def index_cost_per_month(price_per_hour: float, index_bytes: int, memory_bytes: int) -> float:
    """Dollars per month for the share of a machine's memory that an index takes."""
    return price_per_hour * HOURS_A_MONTH * index_bytes / memory_bytes
