"""Speed and memory of variants, each measured side by side with the baseline.

Hides: child processes, clocks, texts of an exact length, interleaving. Refuses to know: whether an
encoder is quantized, and what a number is good enough for.

The protocol:

- **Before anything is measured**, every source is opened and checked, and every length in the spec
  is compared with every model's limit.
- **Load time and peak memory**: one fresh child process a variant, before this process holds any
  weights. The child first imports everything that the load will need (it builds the model without
  weights), notes its resident set, then times the way from path to the first vector and runs one
  batch of the largest workload. Imports are therefore not in `load_s`, and the files come from the
  page cache; the verification of an artifact's hashes is in it. The peak of the process contains
  interpreter and libraries, which `imports_process_bytes` states, and weight files that are mapped
  rather than read. It is VmHWM on Linux: `ru_maxrss` survives `exec` there, so a child would report
  its parent's peak. The device's peak is `torch.cuda.max_memory_allocated`.
- **Latency**: single texts of exactly `query_tokens` tokens (end token included, no instruction:
  its tokens would only lengthen the text), each another, end to end: tokenize, encode, shorten,
  code. Percentiles interpolate linearly between order statistics.
- **Throughput**: batches of texts of exactly `tokens` tokens, or of seeded log-normal lengths of
  that median, from token ids to vectors at the model's full dimension in this process's memory.
  Only real tokens count. Tokenization is left out, as it is the same for
  all variants of a base and can be overlapped.
- **Side by side**: the baseline and one variant are in memory at a time, and they take turns, query
  by query and round by round, with the first turn changing sides, so that a machine that slows down
  hits both. `baseline_ratio` is the median of the ratios within a round. The baseline's own row
  pairs it with itself: how far its ratio is from 1 is the noise of the measurement.
- **Peaks**: products of 1024 x 1024 by 1024 x 4096 matrices in float32, bfloat16 and int8 (on a
  GPU 8192 x 8192 by 8192 x 8192, and 8-bit floats), the fastest of five. A variant's share is of
  the number type that its quantized layers multiply in (weights of fewer bits are multiplied as the
  baseline's number type).
- **Energy**, where the device counts it: behind the timed turns a variant alone repeats queries,
  and each workload, for two seconds or more (the counter moves some ten times a second).
- **Clock**: the monotonic clock on a CPU, CUDA events on a GPU. Python's cyclic garbage collector
  is off while the clock runs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from gteopt.build import quantize
from gteopt.checkpoint import Checkpoint, open_checkpoint
from gteopt.dummy import shape_of, write_dummy
from gteopt.encoder import Backend, Encoder
from gteopt.energy import Meter, meter
from gteopt.errors import GteoptError, InputError, UnsupportedError, join_problems, suggest
from gteopt.kernels import make_linear
from gteopt.kernels.cpu import Int8LinearCpu
from gteopt.loading import build_skeleton, load, load_checkpoint, load_tokenizer, pick_device
from gteopt.machine import machine, versions
from gteopt.openvino import refuse_unknown
from gteopt.quant.affine import pack, quantize_rtn
from gteopt.recipe import (
    BenchSpec,
    Frozen,
    LayerScheme,
    Progress,
    Workload,
    WorkloadSet,
    load_recipe,
    quiet,
)
from gteopt.records import BenchReport, DummyRecord, LatencyRecord, ThroughputRecord, VariantBench


def bench(
    sources: Mapping[str, str],
    *,
    baseline: str,
    spec: BenchSpec,
    skip_too_long: bool = False,
    device: str = "auto",
    backend: Backend = "torch",
    hub_dir: Path | None = None,
    keep: Callable[[BenchReport], object] = lambda report: None,
    progress: Progress = quiet,
) -> BenchReport:
    """Measure every variant side by side with the baseline; see the module for the protocol.

    Args:
        sources: variant name -> base, folder or artifact, the baseline's among them.
        baseline: name of the variant that the others are compared with.
        spec: what is measured, how often.
        skip_too_long: leave out workloads beyond a model's limit, rather than refuse them; the
            report's `spec` is then without them.
        device: as for `load`.
        backend: of the variants, as for `load`; the baseline runs on torch.
        hub_dir: as for `load`.
        keep: told after each variant what has been measured so far.
        progress: told after each child process and after each query or round.

    Raises:
        InputError: an unknown device; or an unknown baseline, a source that cannot be opened, or a
            length beyond a model's limit; all of them at once, before anything is measured.
        GteoptError: the child process of a variant died; carries its last line.
    """
    pick_device(device)
    checkpoints, spec = open_all(sources, baseline, spec, hub_dir, skip_too_long, backend)
    order = [baseline, *(name for name in sources if name != baseline)]
    largest = max(spec.workloads, key=lambda workload: workload.batch_size * workload.tokens)
    footprints: dict[str, _Footprint] = {}
    for name in order:
        question = _Question(
            source=sources[name],
            device=device,
            backend="torch" if name == baseline else backend,
            hub_dir=hub_dir,
            workload=largest,
        )
        footprints[name] = _ask_child(name, question)
        progress("measuring load time and memory", len(footprints), len(order))

    reference = load_checkpoint(checkpoints[baseline], device=device, graphs=True)
    peaks, counter = peak_gflops(reference.device), meter(reference.device)
    variants: dict[str, VariantBench] = {}

    def so_far() -> BenchReport:
        return BenchReport(
            spec=spec,
            baseline=baseline,
            variants=dict(variants),
            device=str(reference.device),
            n_threads=torch.get_num_threads(),
            machine=machine(),
            versions={
                **versions(),
                "baseline dtype": str(reference.dtype).removeprefix("torch."),
                "backend": backend,
            },
            peak_gflops=peaks,
            energy=counter.source,
        )

    for name in order:
        encoder = (
            reference
            if name == baseline
            else load_checkpoint(
                checkpoints[name], device=str(reference.device), backend=backend, graphs=True
            )
        )
        limits = _Limits(peaks, counter)
        variants[name] = _measure(
            name, encoder, reference, footprints[name], spec, limits, progress
        )
        del encoder  # before the next one is loaded
        _release()
        keep(so_far())
    return so_far()


def bench_dummy(
    base: str,
    recipes: Sequence[str],
    *,
    spec: BenchSpec,
    skip_too_long: bool = False,
    n_layers: int | None = None,
    device: str = "auto",
    backend: Backend = "torch",
    progress: Progress = quiet,
) -> BenchReport:
    """Measure what recipes would make of a published model, on random weights of its shape.

    Nothing is downloaded; the model and its variants lie in a temporary folder while they are
    measured. Fewer blocks than the model has are measured as they are: nothing is extrapolated.

    Args:
        base: see `write_dummy`.
        recipes: names of recipes that need no calibration, in the order of the report.
        spec: what is measured, how often.
        skip_too_long: see `bench`.
        n_layers: blocks to build; all when None.
        device: as for `load`.
        backend: see `bench`.
        progress: told about writing, building and measuring.

    Raises:
        InputError: see `write_dummy` and `bench`; a recipe that needs calibration.
        UnsupportedError: a backend that does not know this architecture.
    """
    pick_device(device)
    wanted = {name: load_recipe(name) for name in recipes}
    if learned := [name for name, each in wanted.items() if each.weights.method == "gptq"]:
        raise InputError(
            f"recipes that need calibration learn nothing from random weights "
            f"({', '.join(learned)}); take their rounded relatives, which run on the same kernels "
            f"(rtn-int8, rtn-fp8, rtn-int4, nf4)"
        )
    if backend == "openvino":
        refuse_unknown(shape_of(base, n_layers)[0])
    with tempfile.TemporaryDirectory(prefix="gteopt-") as scratch:
        folder = Path(scratch) / "bf16"
        on_gpu = device != "cpu" and torch.cuda.is_available()
        n, whole = write_dummy(
            base, folder, n_layers=n_layers, device="cuda" if on_gpu else "cpu", progress=progress
        )
        sources = {"bf16": str(folder)}
        for name, recipe in wanted.items():
            sources[name] = str(Path(scratch) / f"variant-{len(sources)}")
            quantize(folder, recipe, sources[name], device=device, progress=progress)
        report = bench(
            sources,
            baseline="bf16",
            spec=spec,
            skip_too_long=skip_too_long,
            device=device,
            backend=backend,
            progress=progress,
        )
    dummy = DummyRecord(base=base, n_layers=n, of_layers=whole)
    return report.model_copy(update={"dummy": dummy})


def default_workloads(device: str) -> WorkloadSet:
    """The set that is measured on a device where nobody says: "long" on a GPU."""
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    return "long" if on_gpu else "short"


def fitting(spec: BenchSpec, max_tokens: int) -> BenchSpec:
    """The spec without the workloads that have texts of more tokens than this."""
    fits = tuple(each for each in spec.workloads if each.longest <= max_tokens)
    return spec.model_copy(update={"workloads": fits})


def peak_gflops(device: torch.device) -> dict[str, float]:
    """10^9 operations a second of large products, by number type; see the module."""
    kinds: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    m, k, n = (1024, 1024, 4096) if device.type == "cpu" else (8192, 8192, 8192)
    peaks: dict[str, float] = {}
    if device.type == "cuda":
        for name, product in _short_products(n, device).items():
            _seconds(product, device)  # libraries choose and load
            peaks[name] = 2 * n**3 / min(_seconds(product, device) for _ in range(5)) / 1e9
    for name, kind in kinds.items():
        x, w = (torch.randn(shape, device=device).to(kind) for shape in ((m, k), (n, k)))
        seconds = [_seconds(partial(nn.functional.linear, x, w), device) for _ in range(5)]
        peaks[name] = 2 * m * k * n / min(seconds) / 1e9
    if device.type == "cpu":
        codes = quantize_rtn(torch.randn(n, k), _INT8)
        layer = make_linear(pack(codes), None, device=device, dtype=torch.float32)
        if not isinstance(layer, Int8LinearCpu):  # a build of torch without such a product
            return peaks
        tokens = layer.quantize(torch.randn(m, k))
        seconds = [
            _seconds(partial(layer.multiply, tokens, torch.float32), device) for _ in "12345"
        ]
        peaks["int8"] = 2 * m * k * n / min(seconds) / 1e9
    return peaks


_INT8 = LayerScheme(bits=8, group_size="row", symmetric=True, activation_bits=8)


def _short_products(n: int, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Products of n x n matrices of 8-bit numbers that torch has for a GPU of this capability."""
    found: dict[str, Callable[[], Tensor]] = {}
    if torch.version.cuda is None:
        return found
    x = torch.randn(n, n, device=device)
    codes = (x * 40).clamp_(-127, 127).to(torch.int8)
    found["int8"] = lambda: torch._int_mm(codes, codes.t())
    if torch.cuda.get_device_capability(device) >= (8, 9):
        floats, ones = x.to(torch.float8_e4m3fn), torch.ones((n, 1), device=device)
        found["fp8"] = lambda: torch._scaled_mm(
            *(floats, floats.t()),
            scale_a=ones,
            scale_b=ones.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return found


def exact_texts(encoder: Encoder, n_texts: int, n_tokens: int, seed: int) -> list[str]:
    """Seeded texts of English words that this encoder's tokenizer makes exactly `n_tokens` of.

    Raises:
        InputError: so few tokens that none is left for the text beside the model's own.
        UnsupportedError: this tokenizer's tokens do not add up to the length.
    """
    source = random.Random(seed)
    return [_exact_text(encoder, n_tokens, source) for _ in range(n_texts)]


def _exact_text(encoder: Encoder, n_tokens: int, source: random.Random) -> str:
    def count(words: list[str]) -> int:
        return encoder.lengths([" ".join(words)])[0]

    if (own := count([])) >= n_tokens:
        raise InputError(
            f"{n_tokens} tokens are too few to measure {encoder.name} with: it adds {own} of its "
            f"own to each text; give at least {own + 1}"
        )
    words = source.choices(_PROSE.split(), k=n_tokens)  # a word is at least one token
    fits, too_long = 0, n_tokens + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if count(words[:middle]) <= n_tokens:
            fits = middle
        else:
            too_long = middle
    words = words[:fits]
    while (found := count(words)) < n_tokens:
        words.append("a")  # one token in nearly every vocabulary
    if found != n_tokens:
        raise UnsupportedError(
            f"no text of exactly {n_tokens} tokens was found for the tokenizer of {encoder.name}; "
            f"give another length"
        )
    return " ".join(words)


def open_all(
    sources: Mapping[str, str],
    baseline: str,
    spec: BenchSpec,
    hub_dir: Path | None,
    skip_too_long: bool,
    backend: Backend = "torch",
) -> tuple[dict[str, Checkpoint], BenchSpec]:
    """The models, and what of the spec they can all be measured on; arguments as for `bench`.

    Raises:
        InputError: see `bench`.
    """
    if baseline not in sources:
        raise InputError(f"the baseline '{baseline}' is not measured: {suggest(baseline, sources)}")
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
                refuse_unknown(checkpoints[name].config)
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
    shortest = min((each.max_tokens for each in checkpoints.values()), default=0)
    fits = fitting(spec, shortest)
    if skip_too_long and checkpoints and not fits.workloads:
        problems.append(f"every workload is beyond the models' limit of {shortest} tokens")
    if problems:
        raise InputError(join_problems("the bench cannot start", problems))
    return checkpoints, fits


@dataclass(frozen=True)
class _Limits:
    """What the device can do, by number type (10^9 operations a second), and what it consumes."""

    peaks: Mapping[str, float]
    meter: Meter


def _measure(
    name: str,
    encoder: Encoder,
    reference: Encoder,
    footprint: _Footprint,
    spec: BenchSpec,
    limits: _Limits,
    progress: Progress,
) -> VariantBench:
    n_steps = spec.warmup + spec.n_queries + (spec.warmup + spec.repeats) * len(spec.workloads)
    steps = iter(range(1, n_steps + 1))

    def step() -> None:
        progress(f"measuring speed of {name}", next(steps), n_steps)

    latency = _latency(encoder, reference, spec, limits, step)
    throughput = tuple(
        _throughput(encoder, reference, workload, spec, limits, step) for workload in spec.workloads
    )
    bytes_per_vector = encoder.vectors.bytes_per_vector
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
        dims=encoder.dims,
        code=encoder.vectors.code,
        bytes_per_vector=bytes_per_vector,
        index_bytes_per_million=bytes_per_vector * 1_000_000,
        graph_bytes=encoder.graphs.n_bytes if encoder.graphs and encoder.graphs.lengths else None,
    )


def _latency(
    encoder: Encoder,
    reference: Encoder,
    spec: BenchSpec,
    limits: _Limits,
    step: Callable[[], None],
) -> LatencyRecord:
    n_texts = spec.warmup + spec.n_queries
    pairs = zip(
        exact_texts(reference, n_texts, spec.query_tokens, seed=0),
        exact_texts(encoder, n_texts, spec.query_tokens, seed=0),
        strict=True,
    )
    turns = [(_query(reference, theirs), _query(encoder, ours)) for theirs, ours in pairs]
    seconds = [variant for _, variant in _take_turns(turns, spec.warmup, encoder.device, step)]
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e3
    return LatencyRecord(
        tokens=spec.query_tokens,
        n_queries=spec.n_queries,
        p50_ms=float(p50),
        p95_ms=float(p95),
        p99_ms=float(p99),
        weight_gb_per_s=encoder.block_bytes / float(p50) / 1e6,
        joules=limits.meter.per_call(turns[-1][1], float(p50) / 1e3),
    )


def _query(encoder: Encoder, text: str) -> Callable[[], object]:
    return lambda: encoder.vectors.quantize(encoder.encode([text]))


def _throughput(
    encoder: Encoder,
    reference: Encoder,
    workload: Workload,
    spec: BenchSpec,
    limits: _Limits,
    step: Callable[[], None],
) -> ThroughputRecord:
    turn = (_batch(reference, workload), _batch(encoder, workload))
    turns = [turn] * (spec.warmup + spec.repeats)
    seconds = list(_take_turns(turns, spec.warmup, encoder.device, step))
    once = median(variant for _, variant in seconds)
    lengths = text_lengths(workload)
    gflops = encoder.operations(lengths) / once / 1e9
    peak = limits.peaks.get(encoder.number_type)
    joules = limits.meter.per_call(turn[1], once)
    return ThroughputRecord(
        batch_size=workload.batch_size,
        tokens=workload.tokens,
        lengths=workload.lengths,
        texts_per_s=workload.batch_size / once,
        tokens_per_s=sum(lengths) / once,
        baseline_ratio=median(baseline / variant for baseline, variant in seconds),
        gflops=gflops,
        peak_ratio=None if peak is None else gflops / peak,
        joules_per_million_tokens=None if joules is None else joules / sum(lengths) * 1e6,
    )


def text_lengths(workload: Workload) -> list[int]:
    """Tokens of each of a workload's texts; the same in each call."""
    if workload.lengths == "equal":
        return [workload.tokens] * workload.batch_size
    source = random.Random(0)
    least = max(workload.tokens // 8, 4)
    drawn = [workload.tokens * source.lognormvariate(0, 0.8) for _ in range(workload.batch_size)]
    return [min(max(round(each), least), workload.longest) for each in drawn]


def _batch(encoder: Encoder, workload: Workload) -> Callable[[], object]:
    source = random.Random(1)
    texts = [_exact_text(encoder, length, source) for length in text_lengths(workload)]
    tokens = encoder.tokenize(texts)
    if workload.lengths == "equal":
        return lambda: encoder.embed_tokens(tokens)
    return lambda: [encoder.embed_tokens(batch) for _, batch in encoder.batches(tokens, _MIXED)]


_MIXED = 32
"""Texts of differing lengths that are computed together."""


def _take_turns(
    turns: list[tuple[Callable[[], object], Callable[[], object]]],
    warmup: int,
    device: torch.device,
    step: Callable[[], None],
) -> Iterator[tuple[float, float]]:
    """Seconds of (baseline, variant) in each turn after the first `warmup`."""
    with _garbage_collector_off():
        for index, (baseline, variant) in enumerate(turns):
            if index % 2:
                variant_s, baseline_s = _seconds(variant, device), _seconds(baseline, device)
            else:
                baseline_s, variant_s = _seconds(baseline, device), _seconds(variant, device)
            step()
            if index >= warmup:
                yield baseline_s, variant_s


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3  # milliseconds


@contextlib.contextmanager
def _garbage_collector_off() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Question(Frozen):
    """What a child process is to load and run."""

    source: str
    device: str
    backend: Backend = "torch"
    hub_dir: Path | None
    workload: Workload


class _Footprint(Frozen):
    """What it answers; see `VariantBench`."""

    load_s: float
    imports_process_bytes: int
    peak_process_bytes: int
    peak_device_bytes: int | None


def _ask_child(name: str, question: _Question) -> _Footprint:
    # The parent's package must be the child's, also when it is run from a source folder; -P keeps
    # files in the user's working directory from being imported as modules.
    package_root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-P", "-m", "gteopt.bench", question.model_dump_json()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines()
        if child.returncode < 0:
            killed_by = signal.Signals(-child.returncode).name
            why = f"it was killed by {killed_by}"
            if killed_by == "SIGKILL":
                why += ", most likely because memory ran out"
        else:
            why = lines[-1] if lines else f"it ended with status {child.returncode}"
        raise GteoptError(
            f"the memory of {name} ({question.source}) cannot be measured: the child process that "
            f"loads it and runs a batch of {question.workload.batch_size} x "
            f"{question.workload.tokens} tokens died: {why}"
        )
    return _Footprint.model_validate_json(child.stdout.strip().splitlines()[-1])


def _footprint(question: _Question) -> _Footprint:
    """Load and run once in this process, which has done nothing before."""
    checkpoint = open_checkpoint(question.source, hub_dir=question.hub_dir)
    build_skeleton(checkpoint)  # imports the model's code and allocates no weights
    load_tokenizer(checkpoint)
    gc.collect()
    imports_process_bytes = _resident_bytes("VmRSS")
    start = time.perf_counter()
    encoder = load(
        question.source,
        device=question.device,
        backend=question.backend,
        hub_dir=question.hub_dir,
    )
    encoder.vectors.quantize(encoder.encode(["the first text after the load"]))
    load_s = time.perf_counter() - start
    _batch(encoder, question.workload)()
    on_gpu = encoder.device.type == "cuda"
    return _Footprint(
        load_s=load_s,
        imports_process_bytes=imports_process_bytes,
        peak_process_bytes=_resident_bytes("VmHWM"),
        peak_device_bytes=torch.cuda.max_memory_allocated(encoder.device) if on_gpu else None,
    )


def _resident_bytes(field: str) -> int:
    """Resident set now ("VmRSS") or at its highest ("VmHWM") of this process."""
    with contextlib.suppress(OSError):  # not Linux
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows

    # macOS counts in bytes and knows only the highest.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Plain prose, so that the tokenizer meets what it was made for. What the words say has no influence
# on the time that a dense model takes.
_PROSE = """
every morning the ferry crosses from the old harbour to the island and brings bread letters
newspapers and a few visitors who want to walk along the cliffs before noon while fishermen repair
their nets near the lighthouse and children count the boats that return with mackerel later the
wind turns clouds gather over the hills and people close their shutters because rain is near but
nobody hurries for the evening train leaves only when the last passenger has found a seat and the
conductor has checked his watch twice against the clock of the station
"""


def _main() -> None:
    try:
        answer = _footprint(_Question.model_validate_json(sys.argv[1]))
    except GteoptError as error:
        sys.exit(" ".join(str(error).split()))
    sys.stdout.write(f"{answer.model_dump_json()}\n")


if __name__ == "__main__":
    _main()
