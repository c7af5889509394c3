"""Every JSON that gteopt writes, as a frozen type with a versioned schema.

Hides: how records become JSON (atomically) and how a bad file is reported. Refuses to know: torch,
and how any number in a record was measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from statistics import geometric_mean
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from gteopt.errors import InputError, IntegrityError
from gteopt.recipe import (
    DEFAULT_MARGIN,
    BenchSpec,
    Frozen,
    LayerScheme,
    Layout,
    Metric,
    Policy,
    Recipe,
    VectorCode,
    Workload,
    shipped_dir,
)

Conditions = dict[str, str]
"""What a number depends on besides the variant: library versions, thread counts, environment."""


class Machine(Frozen):
    """Where something was measured or built."""

    cpu: str
    n_cores: int
    memory_bytes: int
    gpu: str | None
    os: str
    python: str


class BaseRecord(Frozen):
    """The source model.

    Attributes:
        id: what the user named it by: Hub id, folder name or "nano".
        family: row of the family table.
        revision: commit of a Hub download, where known.
        sha256: hash over the base's weight, config and tokenizer files.
        dims: full embedding dimension.
        n_parameters: all parameters of the transformer.
        weight_bytes: of the transformer in `dtype`.
        license: as its model card states it.
        matryoshka_dims: lengths that its vectors were trained to be cut to, longest first; empty
            in older artifacts.
    """

    id: str
    family: str
    revision: str | None
    sha256: str
    dims: int
    n_parameters: int
    dtype: str
    weight_bytes: int
    license: str | None
    matryoshka_dims: tuple[int, ...] = ()


class CalibrationRecord(Frozen):
    """The texts that a build looked at; `sha256` covers texts, roles, instructions and order.

    Attributes:
        n_cut: texts that were longer than `max_tokens`; None in older artifacts.
    """

    source: str
    n_texts: int
    n_tokens: int
    max_tokens: int
    n_cut: int | None = None
    seed: int
    sha256: str


class SmoothingRecord(Frozen):
    """What smoothing did to a layer's inputs; strength 0 where it did not pay.

    Attributes:
        strength: share of the outliers' size that went into the weights, 0 to 1.
        error_before: relative squared output error, summed over the layers that read the same
            inputs, with weights rounded to nearest and no smoothing.
        error_after: the same with it.
    """

    strength: float
    error_before: float
    error_after: float


class LayerRecord(Frozen):
    """One quantized linear layer.

    Attributes:
        method: how its codes were found.
        bits_per_weight: as stored, scales and zero points included.
        weight_snr_db: 10 log10(|W|^2 / |W - Wq|^2).
        output_snr_db: 10 log10(|XW|^2 / |X(W - Wq)|^2) on the calibration tokens, where measured;
            W is what the solver was given, which with `compensate` is not the base's own weight.
        smoothing: of the inputs; None where the recipe or the architecture has none.
        note: anything out of the ordinary: a fallback, raised damping, dead input features.
    """

    name: str
    out_features: int
    in_features: int
    method: str
    scheme: LayerScheme
    bits_per_weight: float
    weight_snr_db: float
    output_snr_db: float | None = None
    smoothing: SmoothingRecord | None = None
    note: str | None = None


class AllocationRecord(Frozen):
    """Which scheme each layer got under a budget, and why.

    Attributes:
        budget: mean bits a weight that were allowed.
        bits_per_weight: mean bits a weight that the choice takes; 16-bit layers counted in.
        predicted_loss: sum of the chosen schemes' losses.
        schemes: what was tried.
        losses: by layer, the mean cosine distance to the base's vectors with this layer alone
            rounded to each of `schemes`; None where a scheme does not fit the layer.
        found_by: "runs" through all later blocks, or "gradients" of the vectors, to first order.
    """

    budget: float
    bits_per_weight: float
    predicted_loss: float
    schemes: tuple[LayerScheme, ...]
    losses: dict[str, tuple[float | None, ...]]
    found_by: Literal["runs", "gradients"] = "runs"


class TuningRecord(Frozen):
    """What tuning after the solver did.

    Attributes:
        by: what was tuned at once.
        n_steps: batches; of each block where it was tuned by itself.
        error_before: how far what the solver left is from the original on the calibration texts:
            by "model", 1 - the mean cosine of the vectors; by "block", the mean over blocks and
            tokens of texts that the block was not tuned on of the squared distance of its output,
            relative to the original's.
        error_after: the same after tuning; equal where tuning was thrown away.
        codes_changed: share of the codes that are others than the solver's.
    """

    by: Literal["model", "block"]
    n_steps: int
    error_before: float
    error_after: float
    codes_changed: float


class UnquantizedRecord(Frozen):
    """One group of parameters left in full precision, and why."""

    name: str
    n_parameters: int
    reason: str


class VectorRecord(Frozen):
    """What happens to an embedding after the model; the tensors lie in vectors.safetensors.

    Attributes:
        dims: dimensions after projection.
        method: "full", "slice" or "pca".
        rotated: whether a PCA's dimensions were turned so that their signs keep more of them.
        neighbours_kept: the share of the nearest neighbours in full dimension (one of a hundred
            vectors) that remain with each of "slice", "pca" and "pca rotated" that was tried,
            searched as stored and rescored, on calibration texts held out from the fit, a quarter
            at a time; None where nothing was chosen by it.
        explained_variance_ratio: share of the calibration vectors' variance that is kept.
        bytes_per_vector: of one stored code.
    """

    dims: int
    method: Literal["full", "slice", "pca"]
    explained_variance_ratio: float | None = None
    rotated: bool = False
    neighbours_kept: dict[str, float] | None = None
    code: VectorCode = "float32"
    rescore: int = 1
    bytes_per_vector: int

    def still_trained(self, lengths: Iterable[int]) -> tuple[int, ...]:
        """Those of the base's Matryoshka lengths that these vectors can still be cut to.

        A slice keeps the shorter ones; a PCA's dimensions are others than the trained ones.
        """
        return () if self.method == "pca" else tuple(n for n in lengths if n <= self.dims)


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in parts[0]:
        raise ValueError(f"'{path}' leads out of the artifact")
    return path


class FileRecord(Frozen):
    """One file of an artifact; `path` is relative, with forward slashes, and leads into it.

    A manifest may come from anywhere, and its paths are read, copied and, after a failed download,
    removed.
    """

    path: Annotated[str, AfterValidator(_inside)]
    n_bytes: int
    sha256: str


class Manifest(Frozen):
    """`gteopt.json`: what an artifact is and how it came to be. Specified in artifacts/README.md.

    It holds no time and no path, so that the same build gives the same bytes.

    Attributes:
        layout: how the layers' packed weights lie on disk; None when no layer is quantized.
        embedding: the token embedding table, a row a token; None where it is not quantized.
        allocation: how bits were chosen by layer; None without a budget.
        tuning: what was learned after the solver; None at effort fast.
        published_from: in a published folder, the hash of the artifact that it was made from, which
            differs from it in README.md only; None in an artifact as it was built.
    """

    schema_: Literal["gteopt.artifact/1"] = Field(default="gteopt.artifact/1", alias="schema")
    recipe: Recipe
    recipe_sha256: str
    base: BaseRecord
    calibration: CalibrationRecord | None
    layers: tuple[LayerRecord, ...]
    embedding: LayerRecord | None = None
    allocation: AllocationRecord | None = None
    tuning: TuningRecord | None = None
    layout: Layout | None = None
    unquantized: tuple[UnquantizedRecord, ...]
    vectors: VectorRecord
    weight_bytes: int
    files: tuple[FileRecord, ...]
    versions: Conditions
    machine: Machine
    published_from: str | None = None


class RecipeEstimate(Frozen):
    """What a recipe would make of a base, worked out from shapes alone.

    Attributes:
        weight_bytes: of the variant's transformer, on disk and in memory.
        build_bytes: memory that the build needs at most beyond the Python process itself.
        disk_bytes: that it takes at most, the artifact included.
        bytes_per_vector: of one stored vector.
        problem: why this recipe cannot be built from this base; None when it can.
    """

    recipe: str
    summary: str
    weight_bytes: int | None
    build_bytes: int | None
    disk_bytes: int | None
    bytes_per_vector: int | None
    problem: str | None


class EstimateConditions(Frozen):
    """What estimates hold for: the options of `quantize` of the same names."""

    dtype: str
    device: str
    activation_bytes: int


class Inspection(Frozen):
    """What `inspect` says of a base or an artifact.

    Attributes:
        revision: commit of a model on the Hub.
        sha256: of a base, over weights that are here; None where only their headers were fetched.
        query_prompt, document_prompt: what is put before a text of each role.
        notes: anything out of the ordinary, remote code that is ignored for one.
        estimates: one a recipe, for a base; empty for an artifact.
        estimated_for: None for an artifact.
        manifest: of an artifact.
        kernels: how many linear layers run on which kernel of the torch backend, on the device
            that was asked for; None where this machine has none, and of other libraries' files.
    """

    schema_: Literal["gteopt.inspection/1"] = Field("gteopt.inspection/1", alias="schema")
    id: str
    revision: str | None = None
    sha256: str | None
    architecture: str
    family: str | None
    attention: str
    pooling: str
    normalised: bool
    start_token: str | None
    end_token: str | None
    query_prompt: str
    document_prompt: str
    dims: int
    matryoshka_dims: tuple[int, ...]
    max_tokens: int
    license: str | None
    n_parameters: int
    published_scores: dict[str, float]
    notes: tuple[str, ...]
    estimates: tuple[RecipeEstimate, ...]
    estimated_for: EstimateConditions | None
    manifest: Manifest | None
    kernels: dict[str, int] | None = None


class LatencyRecord(Frozen):
    """Percentiles of one query's end-to-end time, in milliseconds (texts in, vector out).

    Attributes:
        weight_gb_per_s: bytes of the blocks' weights, which a query reads once, over `p50_ms`; None
            in older reports.
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
        gflops: 10^9 operations a second that were done: two a weight of a linear layer and token,
            and 4 T * d a block, head and query for attention; what the last block leaves out where
            one token a text is pooled is not counted. None in older reports.
        peak_ratio: `gflops` / the best product measured in the same run, `BenchReport.peak_gflops`.
        joules_per_million_tokens: of the device, as in `LatencyRecord`.
    """

    batch_size: int
    tokens: int
    lengths: Literal["equal", "lognormal"] = "equal"
    texts_per_s: float
    tokens_per_s: float
    baseline_ratio: float
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
        """Geometric mean of the workloads' `baseline_ratio`."""
        return geometric_mean(record.baseline_ratio for record in self.throughput)

    @property
    def peak_memory_bytes(self) -> int:
        """The peak where the weights lie: on the device where there is one, else the process."""
        if self.peak_device_bytes is not None:
            return self.peak_device_bytes
        return self.peak_process_bytes


class DummyRecord(Frozen):
    """The weights were random: what of the model there was.

    Attributes:
        base: the published model whose shape it has.
        n_layers: blocks that were built and measured.
        of_layers: blocks that the model has; where they are more, no figure is the whole model's.
    """

    base: str
    n_layers: int
    of_layers: int


class BenchReport(Frozen):
    """Result of `bench`: every variant measured side by side with the baseline in one run.

    Attributes:
        peak_gflops: by number type, 10^9 operations a second of the best large product that torch
            offers on this device; empty in older reports.
        dummy: None where the weights were real.
        price_per_hour: of the machine, in dollars, as the user said.
        energy: what counted the joules, or why nothing did; None in older reports.
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

    @property
    def is_whole(self) -> bool:
        """Whether figures are those of a whole model, not of some of its blocks."""
        return self.dummy is None or self.dummy.n_layers == self.dummy.of_layers

    @property
    def noise(self) -> float:
        """How far the baseline's speed seems to be from itself; 0 where it was not measured."""
        own = self.variants.get(self.baseline)
        return (
            max((abs(each.baseline_ratio - 1) for each in own.throughput), default=0) if own else 0
        )

    def cost_per_million_tokens(self, name: str) -> float | None:
        """Dollars, over the workloads; None without a price, or where no model is whole."""
        if self.price_per_hour is None or not self.is_whole:
            return None
        return cost_per_million_tokens(self.price_per_hour, self.variants[name].tokens_per_s)


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


Verdict = Literal["equivalent", "better", "worse", "undecided"]
"""What may be said of a difference, given its interval and a margin that does not matter."""


class Difference(Frozen):
    """Variant - baseline, on the 0 to 1 scale of scores, with a 95 % paired bootstrap interval.

    Attributes:
        low, high: ends of the interval.
        verdict: "equivalent" where the interval lies within the margin; "worse" or "better" where
            it leaves out zero and the claim survives the correction for all claims made together.
        p: two-sided p-value of a difference of zero, not corrected.
    """

    value: float
    low: float
    high: float
    verdict: Verdict
    p: float


class BesidePublished(Frozen):
    """The baseline's own score beside a published one of the same model.

    Attributes:
        score: published, 0 to 1.
        baseline_score: ours, over the same data.
        low, high: 95 % bootstrap interval of `baseline_score`; None where its entries are not kept.
        differs: whether the published score lies outside of it; None without one.
        n_tasks: that both are means over.
        source: the revision that was run, or "external": what the model's card claims; of a suite,
            where the scores come from.
    """

    score: float
    baseline_score: float
    low: float | None
    high: float | None
    differs: bool | None
    n_tasks: int = 1
    source: str


class TaskScore(Frozen):
    """One task, split and subset (language).

    Attributes:
        score: the task's main score, 0 to 1 as mteb gives it.
        baseline_score: the baseline's on the same data in the same environment.
        instruction: what queries were prefixed with; None where the model takes none.
        difference: from the baseline, with its interval; None where `no_interval` says why.
        unit: what the interval resamples ("query", "pair", "document").
        n_units: how many of them there are.
        published: of the baseline of a published model alone, what was published for it.
    """

    task: str
    task_type: str
    split: str
    subset: str
    metric: str
    score: float
    baseline_score: float
    instruction: str | None
    dataset_revision: str
    n_samples: int
    difference: Difference | None = None
    unit: str | None = None
    n_units: int | None = None
    no_interval: str | None = None
    published: BesidePublished | None = None


class FailedTask(Frozen):
    """A task that could not be scored, and why; a report that has one is partial."""

    task: str
    reason: str


class Fidelity(Frozen):
    """Closeness to the baseline on the suite's own texts; no labels.

    Attributes:
        mean_cosine: mean cosine to the baseline's vector of the same text, before truncation and
            vector codes (vectors of different dimension have no cosine).
        p1_cosine: its 1st percentile.
        neighbour_overlap: mean share of the baseline's 10 nearest neighbours that are among the
            variant's 10, on the vectors as stored (truncated, coded, rescored).
        n_queries: whose neighbours were looked for; None in older reports.
        n_documents: among which.
        n_all_documents: different documents of all tasks; where only a sample of them is looked at,
            estimated from it, to 2 %.
        spearman: Spearman correlation of the variant's similarities with the baseline's, over
            pairs of texts, on the vectors as stored.
    """

    n_texts: int
    mean_cosine: float
    p1_cosine: float
    neighbour_overlap: float
    spearman: float
    n_queries: int | None = None
    n_documents: int | None = None
    n_all_documents: int | None = None

    @property
    def among(self) -> str:
        """In words, which neighbours were looked for."""
        if self.n_queries is None or self.n_documents is None or self.n_all_documents is None:
            return "of a sample of the suite's texts"
        whole = f"{self.n_documents:,}"
        if self.n_all_documents > self.n_documents:
            digits = len(str(self.n_all_documents)) - 2  # as many as the estimate is good for
            whole += f" of about {round(self.n_all_documents, -digits):,}"
        return f"of {self.n_queries:,} queries among {whole} documents, tasks pooled"


class ReferenceAverage(Frozen):
    """An average on a model's card.

    Attributes:
        benchmark: what the card calls it.
        suite: shipped suite of the same benchmark, whose tasks may have moved since.
        n_tasks: that it is over.
        score: 0 to 1.
    """

    benchmark: str
    suite: str
    n_tasks: int
    score: float


class ReferenceScore(Frozen):
    """A published main score, 0 to 1; `revision` is the model's, or "external" for its card's."""

    task: str
    split: str
    subset: str
    score: float
    revision: str
    dataset_revision: str | None


class Reference(Frozen):
    """`eval/reference/<model>.json`: what is published of one model.

    Attributes:
        model: id on the Hub.
        source: where `scores` come from, with its state.
        averages_source: where `averages` come from.
    """

    schema_: Literal["gteopt.reference/1"] = Field(default="gteopt.reference/1", alias="schema")
    model: str
    source: str
    averages_source: str | None
    averages: tuple[ReferenceAverage, ...]
    scores: tuple[ReferenceScore, ...]


class EvalReport(Frozen):
    """Result of `evaluate` for one variant on one suite.

    Attributes:
        score, baseline_score: mean over tasks (subsets averaged within a task first).
        retention: score / baseline_score; None where `no_retention` says why.
        partial: some task failed; the mean is over the others and comparable only with itself.
        difference: of the scores, tasks resampled independently and themselves taken as given;
            None where some task has no interval.
        retention_low, retention_high: 95 % interval of retention, from the same resamples.
        margin: differences up to this are of no matter; what verdicts are against.
        n_claims: how many differences were tested together (tasks x variants, Holm).
        dims, code, bytes_per_vector: of what was scored; None in reports of an older gteopt.
        n_asked_texts: texts whose vectors the tasks asked for, each in the run that scored it.
        n_encoded_texts: of these, encoded; the others came from the cache.
        n_cut_texts: of these, longer than the model takes, and cut there.
        notes: anything out of the ordinary: a damaged cache, batches that did not fit the memory.
        published: of the baseline of a published model alone: the mean over the tasks that have a
            published score.
        published_average: the average on the model's card that the suite goes by, whatever tasks
            it is over; None where there is none.
        asked: options of `gteopt evaluate` that ask for this, files by their names without their
            folders; empty where it was not the command line that asked.
    """

    schema_: Literal["gteopt.eval/1"] = Field(default="gteopt.eval/1", alias="schema")
    variant: str
    artifact_sha256: str
    baseline: str
    baseline_sha256: str
    suite: str
    suite_sha256: str
    tasks: tuple[TaskScore, ...]
    failed: tuple[FailedTask, ...]
    partial: bool
    score: float
    baseline_score: float
    retention: float | None
    no_retention: str | None = None
    difference: Difference | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    margin: float = DEFAULT_MARGIN
    n_claims: int = 0
    dims: int | None = None
    code: VectorCode | None = None
    bytes_per_vector: int | None = None
    n_asked_texts: int = 0
    n_encoded_texts: int = 0
    n_cut_texts: int = 0
    notes: tuple[str, ...] = ()
    published: BesidePublished | None = None
    published_average: ReferenceAverage | None = None
    asked: tuple[str, ...] = ()
    fidelity: Fidelity
    machine: Machine
    versions: Conditions


class FidelityReport(Frozen):
    """Result of `evaluate --texts` for one variant: a user's own texts, without labels.

    Attributes:
        texts: name of the file; `texts_sha256` covers the texts and their order.
        dims, code, bytes_per_vector: of what was compared.
        n_asked_texts: texts whose vectors were needed.
        n_encoded_texts: of these, encoded in this run and for this row; the others came from the
            cache, where an earlier run or row of the same weights had put them.
        n_cut_texts: see `EvalReport`.
        notes: see `EvalReport`.
    """

    schema_: Literal["gteopt.fidelity/1"] = Field(default="gteopt.fidelity/1", alias="schema")
    variant: str
    artifact_sha256: str
    baseline: str
    baseline_sha256: str
    texts: str
    texts_sha256: str
    dims: int
    code: VectorCode
    bytes_per_vector: int
    n_asked_texts: int
    n_encoded_texts: int
    n_cut_texts: int = 0
    notes: tuple[str, ...]
    fidelity: Fidelity
    machine: Machine
    versions: Conditions


class PublishedFile(Frozen):
    """One file of a published folder; `sent` says whether it had to travel."""

    path: str
    n_bytes: int
    sent: bool


class Publication(Frozen):
    """What `publish` did, or would do where `commit` is None.

    Attributes:
        artifact_sha256: of the published gteopt.json.
        published_from: of the artifact's own.
        binds: what the license asks of whoever takes it; None where little.
        deleted: paths of an earlier version that are gone.
        kept: paths that are in the repository beside the artifact, and stay.
    """

    schema_: Literal["gteopt.publication/1"] = Field("gteopt.publication/1", alias="schema")
    repo: str
    url: str | None
    commit: str | None
    artifact_sha256: str
    published_from: str
    license: str
    binds: str | None
    files: tuple[PublishedFile, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...] = ()


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


class RunRecord(Frozen):
    """What `run` last made of a results folder: the rest in it is someone else's.

    Attributes:
        variants: names that it wrote, the baseline's among them.
    """

    schema_: Literal["gteopt.run/1"] = Field(default="gteopt.run/1", alias="schema")
    plan: str
    base: str
    variants: tuple[str, ...]


class Results(Frozen):
    """Everything measured, as it lies in a results folder; any part may be missing.

    Attributes:
        bench: speed and memory; None before `gteopt bench --out`.
        evals: scores and fidelity on a suite, by variant.
        fidelity: closeness on a user's own texts, by variant.
        choice: None before `gteopt choose`.
    """

    bench: BenchReport | None
    evals: dict[str, EvalReport]
    fidelity: dict[str, FidelityReport] = Field(default_factory=dict)
    choice: Choice | None

    @property
    def baseline(self) -> str:
        """Name of the variant that the others are compared with."""
        if self.bench is not None:
            return self.bench.baseline
        reports: list[EvalReport | FidelityReport] = [
            *self.evals.values(),
            *self.fidelity.values(),
        ]
        own = (each.variant for each in reports if each.artifact_sha256 == each.baseline_sha256)
        return next(own, reports[0].baseline if reports else "")

    @property
    def benched(self) -> dict[str, VariantBench]:
        """What `bench` measured, by variant; empty without it."""
        return {} if self.bench is None else self.bench.variants


Record = TypeVar("Record", bound=Frozen)


def to_json(record: Frozen) -> str:
    """The record as indented JSON that ends in a newline."""
    return record.model_dump_json(by_alias=True, indent=2) + "\n"


def write_record(path: Path, record: Frozen) -> None:
    """Write a record so that a reader sees the old file or the whole new one, never half of it."""
    write_atomically(path, to_json(record).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as handle:
        try:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
            os.chmod(handle.name, 0o644)
            os.replace(handle.name, path)
        except BaseException:
            Path(handle.name).unlink(missing_ok=True)
            raise


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read and validate a record.

    Raises:
        IntegrityError: missing, not JSON, of another schema, or not valid.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first: dict[str, Any] = dict(error.errors()[0])
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise IntegrityError(
            f"{path}: is not a valid {kind.__name__} ({where}: {first['msg']}; "
            f"{error.error_count()} problem(s) in all); it was edited, cut short, or written by "
            f"another version of gteopt"
        ) from error


def find_reference(model: str) -> Reference | None:
    """What is published of a model on the Hub; None where nothing ships.

    Raises:
        IntegrityError: the installation is damaged.
    """
    path = shipped_dir("eval/reference") / f"{model.partition('/')[2]}.json"
    if not path.is_file():
        return None
    found = read_record(path, Reference)
    return found if found.model == model else None


def read_results(folder: Path) -> Results:
    """Read a results folder.

    Raises:
        InputError: neither `run` nor `bench` nor `evaluate` has filled it.
        IntegrityError: one of its files is damaged.
    """
    paths = sorted((folder / "fidelity").glob("*.json"))
    fidelity = {path.stem: read_record(path, FidelityReport) for path in paths}
    bench, evals = (None, {}) if fidelity and _only_texts(folder) else read_measurements(folder)
    choice_path = folder / "choice.json"
    return Results(
        bench=bench,
        evals=evals,
        fidelity=fidelity,
        choice=read_record(choice_path, Choice) if choice_path.is_file() else None,
    )


def _only_texts(folder: Path) -> bool:
    return not (folder / "bench.json").is_file() and not any((folder / "eval").glob("*.json"))


def read_measurements(folder: Path) -> tuple[BenchReport | None, dict[str, EvalReport]]:
    """What a results folder says of speed and of quality, by variant; either may be missing.

    Raises:
        InputError: it says neither.
        IntegrityError: one of its files is damaged.
    """
    evals: dict[str, EvalReport] = {}
    for path in sorted((folder / "eval").glob("*.json")):
        report = read_record(path, EvalReport)
        if report.variant in evals:
            raise IntegrityError(
                f"{path}: is a second evaluation of '{report.variant}'; keep the one that counts"
            )
        evals[report.variant] = report
    path = folder / "bench.json"
    bench = read_record(path, BenchReport) if path.is_file() else None
    if bench is None and not evals:
        raise InputError(
            f"{folder} is not a results folder; it has neither bench.json (made by `gteopt bench "
            f"--out`) nor eval/<variant>.json (made by `gteopt evaluate --out`)"
        )
    return bench, evals
