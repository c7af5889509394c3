"""Measure speed and memory of variants, each side by side with the baseline.

Hides: child processes, clocks, texts of an exact length, interleaving. Refuses to know: whether an
encoder is quantized, and whether a result is good enough.

The protocol:

- **Before anything is measured**, every source is opened and checked, and every length in the spec
  is compared with every model's limit.
- **Load time and peak memory**: one fresh child process for each variant, before this process holds
  any weights. The child builds the model without weights, which imports all libraries, and notes
  its resident set. Then it times the load up to the first vector, and runs one batch of the largest
  workload. `load_s` includes the verification of an artifact's hashes, but no imports; the files
  come from the page cache. The peak of the process includes the interpreter, the libraries
  (`imports_process_bytes`) and mapped weight files. On Linux it is VmHWM, because `ru_maxrss`
  survives `exec` and would report the parent's peak. The device's peak is
  `torch.cuda.max_memory_allocated`.
- **Latency**: single texts of exactly `query_tokens` tokens with the end token, all different, from
  text to code: tokenize, encode, shorten, code. The texts have no instruction, because it would
  only make them longer. Percentiles interpolate linearly between order statistics.
- **Throughput**: batches of texts of exactly `tokens` tokens, or of seeded log-normal lengths with
  that median. The time is from token ids to full-dimension vectors in this process's memory.
  Padding does not count as tokens. Tokenization is not timed: it is the same for all variants of a
  base, and can run at the same time.
- **Side by side**: the baseline and one variant are in memory and take turns, query by query and
  round by round. They alternate in being first, so that a machine that slows down affects both.
  `baseline_ratio` is the median of the ratios of each round. The baseline is also measured against
  itself: the distance of that ratio from 1 is the noise of the measurement.
- **Load**: the share of the machine's processor time that other programs used meanwhile.
- **Peaks**: the fastest of five products of 1024 x 1024 by 1024 x 4096 matrices in float32,
  bfloat16 and int8; on a GPU of 8192 x 8192 matrices, also in 8-bit floats. `peak_ratio` compares a
  variant with the peak of the number type in which its quantized layers multiply. Weights with
  fewer bits than 8 multiply in the baseline's number type.
- **Energy**, if the device counts it: after the timed turns, the variant alone repeats a query, and
  then each workload. Each takes at least two seconds, because the counter is updated only about ten
  times a second.
- **Clock**: the monotonic clock on a CPU, CUDA events on a GPU. Python's cyclic garbage collector
  is off while the clock runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TypedDict, Unpack

import numpy as np
import torch

from gteopt.config.plan import BenchSpec, Workload, WorkloadSet
from gteopt.encoder.description import (
    AskedBackend,
    RuntimeOptions,
    pick_device,
    resolve_backend,
)
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load_checkpoint
from gteopt.encoder.openvino import refuse_unknown_openvino
from gteopt.errors import GteoptError, InputError, UnsupportedError, join_problems, suggest_names
from gteopt.machine import describe_machine, read_library_versions
from gteopt.model.checkpoint import Checkpoint, open_checkpoint
from gteopt.progress import Progress, ignore_progress
from gteopt.records.bench import BenchReport, LatencyRecord, ThroughputRecord, VariantBench
from gteopt.speed.child_process import Footprint, FootprintQuestion, ask_child
from gteopt.speed.clock import release_model_memory, time_in_turns
from gteopt.speed.energy import open_energy_meter
from gteopt.speed.load import LoadMeter
from gteopt.speed.peaks import peak_gflops
from gteopt.speed.texts import exact_texts, text_lengths, workload_call


class BenchOptions(TypedDict, total=False):
    """Options of `run_bench_protocol`.

    Attributes:
        skip_too_long: skip workloads with texts longer than a model takes, instead of raising; the
            report's `spec` then lacks them.
        device: as for `load`; the default is "auto".
        backend: backend of the variants, as for `load`; "auto" chooses one for each variant. The
            baseline runs on torch.
        kernels: kernels of the variants, as for `load`; the baseline's are deterministic.
        hub_dir: as for `load`.
    """

    skip_too_long: bool
    device: str
    backend: AskedBackend
    kernels: str
    hub_dir: Path | None


def run_bench_protocol(
    sources: Mapping[str, str],
    *,
    baseline: str,
    spec: BenchSpec,
    keep: Callable[[BenchReport], object] = lambda report: None,
    progress: Progress = ignore_progress,
    **options: Unpack[BenchOptions],
) -> BenchReport:
    """Measure every variant side by side with the baseline; the module describes the protocol.

    Args:
        sources: base, folder or artifact of each variant by its name; includes the baseline.
        baseline: name of the variant that the others are compared with.
        spec: what is measured, and how often.
        keep: called after each variant with the report so far.
        progress: called after each child process, and after each query or round.
        options: see `BenchOptions`.

    Raises:
        InputError: the device or the baseline is unknown, a source cannot be opened, or a length is
            beyond a model's limit. Problems of all sources come at once, before anything is
            measured.
        GteoptError: the child process of a variant died; the message has its last line.

    Example:
        >>> report = bench({"bf16": "nano", "int8": "artifacts/nano-int8"}, baseline="bf16",
        ...                spec=BenchSpec())
        >>> report.variants["int8"].speed_ratio
    """
    device, hub_dir = options.get("device", "auto"), options.get("hub_dir")
    backend, skip = options.get("backend", "torch"), options.get("skip_too_long", False)
    kernels = options.get("kernels", "deterministic")
    pick_device(device)
    checkpoints, spec = open_bench_models(sources, baseline, spec, hub_dir, skip, backend)
    order = [baseline, *(name for name in sources if name != baseline)]
    largest = max(spec.workloads, key=lambda workload: workload.batch_size * workload.tokens)
    runtimes = {baseline: RuntimeOptions(device, cuda_graphs=True)}
    reasons: dict[str, str | None] = {baseline: None}
    for name in order[1:]:
        asked = RuntimeOptions(device, backend=backend, kernels=kernels, cuda_graphs=True)
        taken = resolve_backend(checkpoints[name], asked)
        runtimes[name], reasons[name] = replace(asked, backend=taken.backend), taken.reason
    footprints: dict[str, Footprint] = {}
    for name in order:
        question = FootprintQuestion(
            source=sources[name],
            device=device,
            backend=runtimes[name].backend,
            kernels=runtimes[name].kernels,
            hub_dir=hub_dir,
            workload=largest,
        )
        footprints[name] = ask_child(name, question)
        progress("measuring load time and memory", len(footprints), len(order))

    reference = load_checkpoint(checkpoints[baseline], runtimes[baseline])
    session = _Session(spec, baseline, reference, backend, kernels)
    variants: dict[str, VariantBench] = {}
    for name in order:
        encoder = reference
        if name != baseline:
            where = replace(runtimes[name], device=str(reference.device))
            encoder = load_checkpoint(checkpoints[name], where)
        measured = session.measure(name, encoder, footprints[name], progress)
        variants[name] = measured.model_copy(update={"backend_reason": reasons[name]})
        del encoder  # before the next one is loaded
        release_model_memory()
        keep(session.report(variants))
    return session.report(variants)


def default_workloads(device: str) -> WorkloadSet:
    """The default set of workloads on a device: "long" on a GPU, else "short"."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "long" if on_gpu else "short"


def drop_long_workloads(spec: BenchSpec, max_tokens: int) -> BenchSpec:
    """The spec without workloads whose texts have more than `max_tokens` tokens."""
    fits = tuple(workload for workload in spec.workloads if workload.longest <= max_tokens)
    return spec.model_copy(update={"workloads": fits})


def open_bench_models(
    sources: Mapping[str, str],
    baseline: str,
    spec: BenchSpec,
    hub_dir: Path | None,
    skip_too_long: bool,
    backend: AskedBackend = "torch",
) -> tuple[dict[str, Checkpoint], BenchSpec]:
    """Open the models, and keep the workloads that all of them can run.

    Arguments are those of `run_bench_protocol`.

    Raises:
        InputError: see `run_bench_protocol`.
    """
    if baseline not in sources:
        raise InputError(
            f"the baseline '{baseline}' is not measured: {suggest_names(baseline, sources)}"
        )
    checkpoints: dict[str, Checkpoint] = {}
    problems: list[str] = []
    for name, source in sources.items():
        try:
            checkpoints[name] = open_checkpoint(source, hub_dir=hub_dir)
        except GteoptError as error:
            problems.append(f"{name} ({source}): {error}")
            continue
        if backend == "openvino" and name != baseline:
            try:
                refuse_unknown_openvino(checkpoints[name].config)
            except UnsupportedError as error:
                problems.append(f"{name} ({source}): {error}")
        limit = checkpoints[name].max_tokens
        if spec.query_tokens > limit:
            problems.append(
                f"query_tokens: {spec.query_tokens} is beyond {name}'s limit of {limit}"
            )
        problems += [
            f"workload batch_size: {workload.batch_size}, tokens: {workload.tokens} is beyond "
            f"{name}'s limit of {limit} tokens"
            for workload in spec.workloads
            if workload.longest > limit and not skip_too_long
        ]
    shortest = min((checkpoint.max_tokens for checkpoint in checkpoints.values()), default=0)
    fits = drop_long_workloads(spec, shortest)
    if skip_too_long and checkpoints and not fits.workloads:
        problems.append(f"every workload is beyond the models' limit of {shortest} tokens")
    if problems:
        raise InputError(join_problems("the bench cannot start", problems))
    return checkpoints, fits


class _Session:
    """One benchmark run: the loaded baseline, the device's peaks and its energy counter."""

    def __init__(
        self,
        spec: BenchSpec,
        baseline: str,
        reference: Encoder,
        backend: AskedBackend,
        kernels: str,
    ) -> None:
        """Measure the device's peaks, and start to count the load of other programs."""
        self._spec, self._baseline = spec, baseline
        self._reference, self._backend, self._kernels = reference, backend, kernels
        self._peaks, self._meter = (
            peak_gflops(reference.device),
            open_energy_meter(reference.device),
        )
        self._load = LoadMeter()

    def report(self, variants: Mapping[str, VariantBench]) -> BenchReport:
        """The report on the variants measured so far."""
        return BenchReport(
            spec=self._spec,
            baseline=self._baseline,
            variants=dict(variants),
            device=str(self._reference.device),
            n_threads=torch.get_num_threads(),
            machine=describe_machine(),
            versions={
                **read_library_versions(),
                "baseline dtype": str(self._reference.dtype).removeprefix("torch."),
                "backend": self._backend,
                **({} if self._kernels == "deterministic" else {"kernels": self._kernels}),
            },
            peak_gflops=self._peaks,
            energy=self._meter.source,
            other_load=self._load.of_others(),
        )

    def measure(
        self, name: str, encoder: Encoder, footprint: Footprint, progress: Progress
    ) -> VariantBench:
        """Measure latency and throughput of a variant that takes turns with the baseline."""
        spec = self._spec
        n_rounds = (spec.warmup + spec.repeats) * len(spec.workloads)
        n_steps = spec.warmup + spec.n_queries + n_rounds
        steps = iter(range(1, n_steps + 1))

        def step() -> None:
            progress(f"measuring speed of {name}", next(steps), n_steps)

        latency = self._latency(encoder, step)
        throughput = tuple(self._throughput(encoder, workload, step) for workload in spec.workloads)
        bytes_per_vector, recorded = encoder.vectors.bytes_per_vector, encoder.cuda_graphs
        return VariantBench(
            artifact_sha256=encoder.sha256,
            weight_bytes=encoder.weight_bytes,
            load_s=footprint.load_s,
            imports_process_bytes=footprint.imports_process_bytes,
            peak_process_bytes=footprint.peak_process_bytes,
            peak_device_bytes=footprint.peak_device_bytes,
            latency=latency,
            throughput=throughput,
            kernels=encoder.kernels,
            backend=encoder.backend,
            dims=encoder.dims,
            code=encoder.vectors.code,
            bytes_per_vector=bytes_per_vector,
            index_bytes_per_million=bytes_per_vector * 1_000_000,
            graph_bytes=recorded.n_bytes if recorded is not None and recorded.lengths else None,
        )

    def _latency(self, encoder: Encoder, step: Callable[[], None]) -> LatencyRecord:
        spec = self._spec
        n_texts = spec.warmup + spec.n_queries
        pairs = zip(
            exact_texts(self._reference, n_texts, spec.query_tokens, seed=0),
            exact_texts(encoder, n_texts, spec.query_tokens, seed=0),
            strict=True,
        )
        turns = [
            (_query(self._reference, baseline_text), _query(encoder, variant_text))
            for baseline_text, variant_text in pairs
        ]
        seconds = [
            variant for _, variant in time_in_turns(turns, spec.warmup, encoder.device, step)
        ]
        p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
        return LatencyRecord(
            tokens=spec.query_tokens,
            n_queries=spec.n_queries,
            p50_ms=float(p50),
            p95_ms=float(p95),
            p99_ms=float(p99),
            weight_gb_per_s=encoder.block_bytes / float(p50) / 1e6,
            joules=self._meter.per_call(turns[-1][1], float(p50) / 1e3),
        )

    def _throughput(
        self, encoder: Encoder, workload: Workload, step: Callable[[], None]
    ) -> ThroughputRecord:
        spec = self._spec
        turn = (workload_call(self._reference, workload), workload_call(encoder, workload))
        turns = [turn] * (spec.warmup + spec.repeats)
        seconds = list(time_in_turns(turns, spec.warmup, encoder.device, step))
        batch_s = median(variant for _, variant in seconds)
        lengths = text_lengths(workload)
        ratios = tuple(baseline / variant for baseline, variant in seconds)
        gflops = encoder.operations(lengths) / batch_s / 1e9
        peak = self._peaks.get(encoder.number_type)
        joules = self._meter.per_call(turn[1], batch_s)
        return ThroughputRecord(
            batch_size=workload.batch_size,
            tokens=workload.tokens,
            lengths=workload.lengths,
            texts_per_s=workload.batch_size / batch_s,
            tokens_per_s=sum(lengths) / batch_s,
            baseline_ratio=median(ratios),
            ratios=ratios,
            gflops=gflops,
            peak_ratio=None if peak is None else gflops / peak,
            joules_per_million_tokens=None if joules is None else joules / sum(lengths) * 1e6,
        )


def _query(encoder: Encoder, text: str) -> Callable[[], object]:
    return lambda: encoder.vectors.quantize(encoder.encode([text]))
