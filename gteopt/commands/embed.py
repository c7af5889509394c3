"""`gteopt embed` and `gteopt.embed`: turn a corpus into vectors, on one device or many."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gteopt.corpus.embed_workers import embed_on_workers, start_local_embedders
from gteopt.corpus.estimate import EmbedEstimate, estimate_embedding
from gteopt.corpus.exports import Export, export_embedding
from gteopt.corpus.jobs import (
    EmbedJob,
    EmbedReport,
    Events,
    JobRequest,
    JobWishes,
    RunShards,
    embed_in_process,
    ignore_job_event,
    lock_job,
    prepare_job,
    run_job,
)
from gteopt.corpus.options import EmbedOptions
from gteopt.corpus.plan import read_embedding_record
from gteopt.corpus.ray_data import embed_on_ray, open_ray_cluster
from gteopt.corpus.storage import StorageFolder
from gteopt.corpus.verify import VerifiedCounts, verify_shards
from gteopt.encoder.description import EncoderDescription, describe_encoder, pick_device
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load
from gteopt.errors import InputError
from gteopt.machine import parse_devices
from gteopt.progress import Progress, ignore_progress
from gteopt.speed.peaks import peak_gflops


@dataclass(frozen=True)
class EmbedDevices:
    """The devices that embed.

    Attributes:
        device: device of this process; see `gteopt.load`.
        devices: devices with one process each: "cuda:0,cuda:1", or "cpu,cpu".
        ray: address of a Ray cluster: "auto", HOST:PORT, or "local".
        actors: least and most actors on the cluster; None is as many as fit.
    """

    device: str = "auto"
    devices: str | None = None
    ray: str | None = None
    actors: tuple[int, int] | None = None


_WORTH_MEASURING_S = 60.0
"""Seconds of a run from which on the device's peak is measured, which takes a second."""


class EmbedTerminated(Exception):
    """The process received SIGTERM, for example from a scheduler or before a spot machine ends."""


def embed(
    inputs: str | Sequence[str],
    model: str | Path,
    out: str | Path,
    *,
    progress: Progress = ignore_progress,
    events: Events = ignore_job_event,
    **options: Any,
) -> EmbedReport:
    """Embed a corpus into a folder; the same call resumes a job that was stopped.

    Example: `gteopt.embed("corpus.jsonl.gz", "artifacts/gptq-int4", "vectors", text="body")`

    Args:
        inputs: files, folders, globs, URLs or data set names.
        model: see `gteopt.load`.
        out: folder of the job: a local path, s3:// or gs://.
        progress: receives the number of finished rows.
        events: receives an event for each shard and one at the end.
        options: fields of `EmbedOptions`, `EmbedDevices` and `JobWishes` by name, and
            `export`.

    Raises:
        InputError: an unknown option, inputs that cannot be read, or a folder of another job.
        IntegrityError: some rows have neither a vector nor a dead letter.
        GteoptError: see `gteopt.load`.
    """
    exports = tuple(options.pop("export", ()))
    settings, where, wishes = parse_embed_options(options)
    request = make_embed_request(inputs, model, out, settings)
    with open_embed_job(request, where, wishes, progress) as (job, runner):
        report = run_job(job, runner, wishes=wishes, progress=progress, events=events)
        if where.devices is None and where.ray is None:
            report = report.model_copy(update={"peak_ratio": _peak_ratio(report, where.device)})
        if exports:
            record = read_embedding_record(job.folder)
            assert record is not None
            export_embedding(job.folder, record, exports, progress)
    return report


def _peak_ratio(report: EmbedReport, device: str) -> float | None:
    """Operations per second of a run, over those of the device's fastest large product."""
    if report.seconds < _WORTH_MEASURING_S:
        return None
    fastest = max(peak_gflops(pick_device(device)).values())
    return report.operations_now / report.seconds / 1e9 / fastest


def parse_embed_options(options: dict[str, Any]) -> tuple[EmbedOptions, EmbedDevices, JobWishes]:
    """Sort options by name into the three objects that hold them.

    Raises:
        InputError: an unknown option.
    """
    from dataclasses import fields

    from gteopt.errors import suggest_names

    kinds = {
        "settings": set(EmbedOptions.model_fields),
        "where": {field.name for field in fields(EmbedDevices)},
        "wishes": {field.name for field in fields(JobWishes)},
    }
    known = set().union(*kinds.values())
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"unknown option {unknown[0]}: {suggest_names(unknown[0], known)}")
    parts = {
        kind: {name: value for name, value in options.items() if name in names}
        for kind, names in kinds.items()
    }
    if isinstance(parts["wishes"].get("hub_dir"), str):
        parts["wishes"]["hub_dir"] = Path(parts["wishes"]["hub_dir"])
    settings = EmbedOptions.model_validate(parts["settings"])
    return settings, EmbedDevices(**parts["where"]), JobWishes(**parts["wishes"])


def make_embed_request(
    inputs: str | Sequence[str], model: str | Path, out: str | Path, options: EmbedOptions
) -> JobRequest:
    """A request with an absolute path to the model, so that every worker finds it.

    With "auto", a job that goes on keeps the backend that it began with.
    """
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    source = str(Path(model).absolute()) if Path(model).is_dir() else str(model)
    if (
        options.backend == "auto"
        and (begun := read_embedding_record(StorageFolder(out))) is not None
    ):
        options = options.model_copy(update={"backend": begun.settings["backend"]})
    return JobRequest(names, source, out, options)


@contextmanager
def open_embed_job(
    request: JobRequest,
    where: EmbedDevices,
    wishes: JobWishes,
    progress: Progress = ignore_progress,
    *,
    reads_only: bool = False,
) -> Iterator[tuple[EmbedJob, RunShards]]:
    """A job and the function that runs it, with the folder locked; see `jobs.prepare_job`."""
    if where.devices is not None and where.ray is not None:
        raise InputError(
            "--devices is for this machine, --ray for a cluster; give only one of them"
        )
    with ExitStack() as stack:
        stack.enter_context(lock_job(request.out))
        stack.enter_context(_terminating())
        encoder = None
        description: EncoderDescription
        if where.devices is None and where.ray is None:
            description = encoder = _loaded(request, where, wishes)
        else:
            kind: Literal["cuda", "cpu"] = "cpu"
            if where.ray is not None:
                kind = stack.enter_context(open_ray_cluster(where.ray, where.device))
            elif (where.devices or "").startswith("cuda"):
                kind = "cuda"
            description = _described(request, kind, wishes)
        job = prepare_job(
            request, description, wishes=wishes, reads_only=reads_only, progress=progress
        )
        runner: RunShards
        if where.devices is not None:
            workers = stack.enter_context(start_local_embedders(parse_devices(where.devices)))
            runner = embed_on_workers(workers)
        elif where.ray is not None:
            runner = embed_on_ray(
                where.ray, device=where.device, actors=where.actors, cpus=job.task.n_threads
            )
        else:
            assert encoder is not None
            runner = embed_in_process(encoder)
        yield job, runner


def dry_run_embed(
    inputs: str | Sequence[str],
    model: str | Path,
    out: str | Path,
    *,
    price_per_hour: float | None = None,
    progress: Progress = ignore_progress,
    **options: Any,
) -> EmbedEstimate:
    """Estimate the tokens, hours, dollars and bytes of a job; no vectors are written.

    The rows are counted, and the split of the files into shards is kept in the job's folder.

    Args:
        inputs: see `embed`.
        model: see `embed`.
        out: see `embed`.
        price_per_hour: price of all devices together, in dollars.
        progress: receives the number of bytes and shards.
        options: see `embed`.

    Raises:
        GteoptError: see `embed`.
    """
    options.pop("export", None)
    settings, where, wishes = parse_embed_options(options)
    request = make_embed_request(inputs, model, out, settings)
    n_devices = 1 if where.devices is None else len(parse_devices(where.devices))
    here = EmbedDevices(
        device=where.device if where.devices is None else where.devices.split(",")[0]
    )
    with open_embed_job(request, here, wishes, progress) as (job, _):
        encoder = _loaded(request, here, wishes)
        return estimate_embedding(
            job, encoder, price_per_hour=price_per_hour, n_devices=n_devices, progress=progress
        )


def verify(
    inputs: str | Sequence[str],
    model: str | Path,
    out: str | Path,
    *,
    progress: Progress = ignore_progress,
    **options: Any,
) -> VerifiedCounts:
    """Check a finished folder: bytes, counts, and 64 random rows embedded again.

    Args:
        inputs: see `embed`.
        model: see `embed`.
        out: see `embed`.
        progress: receives the number of shards.
        options: see `embed`.

    Raises:
        IntegrityError: lists every fault of the folder.
        GteoptError: see `embed`.
    """
    options.pop("export", None)
    settings, where, wishes = parse_embed_options(options)
    request = make_embed_request(inputs, model, out, settings)
    if read_embedding_record(StorageFolder(out)) is None:
        raise InputError(f"{out} has no embedding.json; there is nothing to verify")
    here = EmbedDevices(
        device=where.device if where.devices is None else where.devices.split(",")[0]
    )
    with open_embed_job(request, here, wishes, progress, reads_only=True) as (job, _):
        encoder = _loaded(request, here, wishes)
        return verify_shards(job, encoder, progress=progress)


def _loaded(request: JobRequest, where: EmbedDevices, wishes: JobWishes) -> Encoder:
    return load(
        request.model,
        device=where.device,
        dtype=request.options.dtype,
        backend=request.options.backend,
        kernels=request.options.kernels,
        hub_dir=wishes.hub_dir,
    )


def _described(
    request: JobRequest, kind: Literal["cuda", "cpu"], wishes: JobWishes
) -> EncoderDescription:
    return describe_encoder(
        request.model,
        device=kind,
        dtype=request.options.dtype,
        backend=request.options.backend,
        hub_dir=wishes.hub_dir,
    )


@contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM end the job like Ctrl-C, without the shards that are being embedded."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return

    def stop(number: int, frame: object) -> None:
        raise EmbedTerminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


__all__ = ["EmbedTerminated", "Export", "dry_run_embed", "embed", "ignore_job_event", "verify"]
