"""Measure `gteopt embed` beside other ways to embed a corpus, on one processor in the same run.

    python benchmarks/embedding.py throughput     # texts per second, beside peers
    python benchmarks/embedding.py throughput --model qwen2     # a decoder's shape
    python benchmarks/embedding.py share          # processor time of embed beside encode
    python benchmarks/embedding.py memory         # peak memory by rows of the corpus
    python benchmarks/embedding.py resume         # seconds to find 100,000 shards done
    python benchmarks/embedding.py kills          # folders of jobs that were killed 20 times

Each command adds its part to benchmarks/results/embedding.json (or --out), with the machine and the
versions. All ways take turns, in the same precision, with the same number of threads, on the same
texts. On a machine with other work, processor seconds are more reliable than seconds.

- `encode`: `Encoder.encode` of all texts in memory; nothing is stored.
- `embed`: a job from reading a .jsonl file to the last shard on disk; the model is loaded before.
- `st_encode_save`: sentence-transformers' `encode`, then `numpy.save`.
- `st_multi_process_save`: sentence-transformers' pool with one process, which is started before.
- `datasets_map`: `datasets.map` around sentence-transformers, then `save_to_disk`.
- `ray_data`: Ray Data's `map_batches` around sentence-transformers, then `write_parquet`.

`memory` and `resume` measure the job and not the model. `memory` uses only the first block of the
embedded model; `resume` writes 100,000 shards of one row with vectors of zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from killed_jobs import kill_jobs, rows_of
from model_folders import NAMES, folder_of
from results_files import conditions, write_part

import gteopt
from gteopt.build.calibration_texts import BUILTIN, draw_calibration_texts
from gteopt.commands.embed import parse_embed_options
from gteopt.config.recipe import Calibration
from gteopt.corpus.jobs import (
    EmbedJob,
    JobRequest,
    embed_in_process,
    lock_job,
    prepare_job,
    run_job,
)
from gteopt.corpus.plan import write_embedding_record
from gteopt.corpus.shard_files import DATA, ShardContent, ShardRecord, shard_to_parquet
from gteopt.encoder.encoder import Encoder
from gteopt.speed.clock import Stopwatch

ELSEWHERE = ("st_multi_process_save", "ray_data")
"""Ways that compute in other processes; the processor time of this process says nothing."""
MEASUREMENTS = ("throughput", "share", "memory", "resume", "kills")
RESULTS = Path(__file__).parent / "results" / "embedding.json"


def texts_of(n: int) -> list[str]:
    """Distinct texts of the builtin calibration set, of a dozen to a few hundred tokens."""
    drawn = draw_calibration_texts(Calibration(n_texts=1000, texts=BUILTIN))
    bare = [text.text for text in drawn]
    return [f"{bare[i % len(bare)]} {i}" for i in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Write one row per text."""
    with path.open("w", encoding="utf-8") as handle:
        for text in texts:
            handle.write(json.dumps({"text": text}) + "\n")
    return path


def job_of(encoder: Encoder, corpus: Path, out: Path, **options: Any) -> EmbedJob:
    """A planned job."""
    settings, _, wishes = parse_embed_options(options)
    return prepare_job(JobRequest((str(corpus),), "model", out, settings), encoder, wishes=wishes)


def share(model: str, n_texts: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Processor seconds of `Encoder.encode` / processor seconds of a job on the same texts.

    Other work on the machine changes processor seconds less than seconds. A job also reads its
    file, plans, writes and syncs. That time is smaller than the noise of the model's time, so it is
    measured a second time with a model that computes nothing.
    """
    texts = texts_of(n_texts)
    corpus = write_jsonl(folder / "corpus.jsonl", texts)
    encoder = gteopt.load(model, device="cpu", dtype="float32")
    encoder.encode(texts[:64])
    seconds: dict[str, list[float]] = {"encode": [], "embed": []}
    overheads_s: list[float] = []

    def spent(way: Callable[[], object]) -> float:
        watch = Stopwatch()
        way()
        return round(watch.cpu_s, 3)

    def embed() -> None:
        out = folder / "vectors"
        shutil.rmtree(out, ignore_errors=True)
        with lock_job(out):
            run_job(job_of(encoder, corpus, out, dtype="float32"), embed_in_process(encoder))

    for number in range(repeats):
        ways: list[tuple[str, Callable[[], object]]] = [
            ("encode", lambda: encoder.encode(texts)),
            ("embed", embed),
        ]
        for name, way in ways if number % 2 == 0 else ways[::-1]:
            seconds[name].append(spent(way))
            print(name, seconds[name][-1], flush=True)
    vectors = torch.full((64, encoder.full_dims), 0.1)
    encoder.forward = lambda tokens, **_: vectors[: len(tokens)]  # type: ignore[method-assign]
    for _ in range(1 + repeats):  # the first turn warms up
        job_s, encode_s = spent(embed), spent(lambda: encoder.encode(texts))
        overheads_s.append((job_s - encode_s) / n_texts)
    model_s = median(seconds["encode"]) / n_texts
    return {
        "n_texts": n_texts,
        "mean_tokens": round(float(np.mean(encoder.tokenization.lengths(texts))), 1),
        "threads": torch.get_num_threads(),
        "processor_seconds": seconds,
        "share_of_encode": round(median_ratio(seconds["encode"], seconds["embed"]), 4),
        "beside_the_model_us_per_text": round(1e6 * median(overheads_s[1:]), 1),
        "encode_us_per_text": round(1e6 * model_s, 1),
        "share_without_noise": round(model_s / (model_s + median(overheads_s[1:])), 4),
    }


def throughput(
    model: str, n_texts: int, repeats: int, folder: Path, with_ray: bool
) -> dict[str, Any]:
    """Seconds and processor seconds of each way; all ways take turns."""
    import datasets
    from sentence_transformers import SentenceTransformer

    texts = texts_of(n_texts)
    corpus = write_jsonl(folder / "corpus.jsonl", texts)
    encoder = gteopt.load(model, device="cpu", dtype="float32")
    st = SentenceTransformer(model, device="cpu")
    table = datasets.Dataset.from_dict({"text": texts})
    pool = st.start_multi_process_pool(["cpu"])

    def embed() -> None:
        out = folder / "vectors"
        shutil.rmtree(out, ignore_errors=True)
        with lock_job(out):
            run_job(job_of(encoder, corpus, out, dtype="float32"), embed_in_process(encoder))

    def multi_process() -> None:
        np.save(folder / "pool.npy", st.encode(texts, pool=pool, batch_size=32))

    def mapped() -> None:
        done = table.map(
            lambda batch: {"vector": st.encode(batch["text"], batch_size=32)},
            batched=True,
            batch_size=1000,
            load_from_cache_file=False,
            keep_in_memory=False,
        )
        shutil.rmtree(folder / "mapped", ignore_errors=True)
        done.save_to_disk(folder / "mapped")

    ways: dict[str, Callable[[], object]] = {
        "encode": lambda: encoder.encode(texts),
        "embed": embed,
        "st_encode_save": lambda: np.save(folder / "st.npy", st.encode(texts, batch_size=32)),
        "st_multi_process_save": multi_process,
        "datasets_map": mapped,
    }
    if with_ray:
        ways["ray_data"] = ray_pipeline(model, corpus, folder / "ray")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    encoder.encode(texts[:64])
    st.encode(texts[:64])
    st.encode(texts[:64], pool=pool)
    for _ in range(repeats):
        for name, way in ways.items():
            watch = Stopwatch()
            way()
            seconds[name].append(round(watch.wall_s, 3))
            processor[name].append(round(watch.cpu_s, 3))
            print(name, seconds[name][-1], processor[name][-1], flush=True)
    st.stop_multi_process_pool(pool)
    rates = {name: n_texts / median(turns) for name, turns in seconds.items()}
    processor_here = {name: processor[name] for name in ways if name not in ELSEWHERE}
    return {
        "n_texts": n_texts,
        "mean_tokens": round(float(np.mean(encoder.tokenization.lengths(texts))), 1),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "processor_seconds": processor_here,
        "embed_to_others_by_processor_seconds": {
            name: round(median_ratio(turns, processor_here["embed"]), 3)
            for name, turns in processor_here.items()
        },
        "texts_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "embed_to_others": {
            name: round(median_ratio(turns, seconds["embed"]), 3) for name, turns in seconds.items()
        },
    }


def median_ratio(turns: list[float], other_turns: list[float]) -> float:
    """Median over turns of the ratio of two ways in the same turn."""
    return median(a / b for a, b in zip(turns, other_turns, strict=True))


def ray_pipeline(model: str, corpus: Path, out: Path) -> Callable[[], None]:
    """A pipeline that reads, encodes with sentence-transformers in an actor, and writes."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    class Encode:
        def __init__(self) -> None:
            from sentence_transformers import SentenceTransformer

            torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
            self.model = SentenceTransformer(model, device="cpu")

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch["vector"] = self.model.encode(list(batch["text"]), batch_size=32)
            return batch

    def pipeline() -> None:
        shutil.rmtree(out, ignore_errors=True)
        (
            ray.data.read_json(str(corpus), lines=True)
            .map_batches(Encode, concurrency=1, batch_size=1024)
            .write_parquet(str(out))
        )

    return pipeline


def memory(rows: list[int], folder: Path) -> list[dict[str, Any]]:
    """Peak resident set of a process that embeds short texts, for each number of rows."""
    runs = []
    for n in rows:
        corpus = folder / f"{n}.jsonl"
        with corpus.open("w") as handle:
            for i in range(n):
                handle.write(f'{{"text": "row {i}"}}\n')
        child = subprocess.run(
            [sys.executable, __file__, "one-memory", str(corpus), str(folder / f"out{n}")],
            capture_output=True,
            text=True,
            check=True,
        )
        runs.append(json.loads(child.stdout.strip().splitlines()[-1]) | {"rows": n})
        print(runs[-1], flush=True)
    return runs


def one_memory(corpus: Path, out: Path) -> None:
    """The child process of `memory`: embed the corpus, and print peak memory and seconds."""
    encoder = gteopt.load("nano", device="cpu", dtype="float32")
    layers: Any = encoder.module.layers
    encoder.module.layers = layers[:1]
    encoder.module.config.num_hidden_layers = 1  # type: ignore[union-attr]
    watch = Stopwatch()
    with lock_job(out):
        run_job(
            job_of(encoder, corpus, out, dtype="float32", batch_size=512), embed_in_process(encoder)
        )
    seconds = watch.wall_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_mb": round(peak / 1000, 1), "seconds": round(seconds, 1)}))


def shard_of_one_row(job: EmbedJob, identity: str, first: int) -> bytes:
    """The bytes of a shard whose one vector is zero."""
    import pyarrow as pa

    vectors = np.zeros((1, job.record.decode.dims), np.float32)
    rows = np.array([first], np.int64)
    content = ShardContent("corpus.jsonl", rows, ["x"], None, vectors, pa.table({}))
    record = ShardRecord(
        fingerprint=job.plan.fingerprint,
        file=identity,
        first=first,
        n_rows=1,
        n_embedded=1,
        n_vectors=1,
        bad={},
        n_cut=0,
        n_tokens=1,
        sha256="",
    )
    shard: bytes = shard_to_parquet(content, record, job.record.decode, "list").to_pybytes()
    return shard


def resume(n_shards: int, folder: Path) -> dict[str, Any]:
    """Seconds that a finished job takes to find all its shards done."""
    corpus = folder / "corpus.jsonl"
    with corpus.open("w") as handle:
        for i in range(n_shards):
            handle.write(f'{{"text": "row {i}"}}\n')
    out = folder / "vectors"
    encoder = gteopt.load("nano", device="cpu")
    options: dict[str, Any] = {"shard_rows": 1}
    job = job_of(encoder, corpus, out, **options)
    (out / DATA).mkdir(parents=True)
    identity = job.plan.files[0].identity
    # Shards whose first row has equally many digits differ only in that number.
    shard_parts = {
        len(str(first)): shard_of_one_row(job, identity, first).split(b'"first":%d,' % first)
        for first in (10**n for n in range(len(str(n_shards))))
    }
    for name, shard in job.plan.shards.items():
        before, after = shard_parts[len(str(shard.first))]
        (out / DATA / name).write_bytes(before + b'"first":%d,' % shard.first + after)
    write_embedding_record(job.folder, job.record)
    watch = Stopwatch()
    with lock_job(out):
        planned = job_of(encoder, corpus, out, **options)
        seconds_plan = watch.wall_s
        report = run_job(planned, embed_in_process(encoder))
    seconds = watch.wall_s
    assert (report.shards_now, report.shards_before) == (0, n_shards)
    return {
        "n_shards": n_shards,
        "seconds": round(seconds, 2),
        "of_them_plan": round(seconds_plan, 2),
        "processor_seconds": round(watch.cpu_s, 2),
    }


def main() -> None:
    """Measure one part and add it to the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement", choices=[*MEASUREMENTS, "one-memory"])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--model", choices=[*NAMES], default="minilm")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of kills")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.measurement == "one-memory":
        one_memory(*arguments.paths)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        result: Any
        if arguments.measurement in ("throughput", "share"):
            model = folder_of(arguments.model)
            if arguments.measurement == "share":
                result = share(model, arguments.texts, arguments.repeats, folder)
            else:
                result = throughput(
                    model, arguments.texts, arguments.repeats, folder, not arguments.no_ray
                )
            result = {"model": NAMES[arguments.model], **result}
        elif arguments.measurement == "kills":
            result = kill_jobs(
                rows_of(folder / "corpus.jsonl", 402), folder, arguments.kills, arguments.seed
            )
        elif arguments.measurement == "memory":
            result = {
                "model": "first block of nano, float32",
                "runs": memory(arguments.rows, folder),
            }
        else:
            result = resume(arguments.shards, folder)
    part = (
        arguments.measurement
        if arguments.model == "minilm"
        else f"{arguments.measurement}_{arguments.model}"
    )
    content = {
        "command": " ".join(["python", "benchmarks/embedding.py", *sys.argv[1:]]),
        **conditions(),
        "note": arguments.note,
        **result,
    }
    write_part(arguments.out, part, content, indent=2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
