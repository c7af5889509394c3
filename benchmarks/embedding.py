"""Embedding a corpus beside other ways to do it, on one processor in the same run.

    python benchmarks/embedding.py throughput     # texts a second, beside peers
    python benchmarks/embedding.py throughput --model qwen2     # a decoder's shape
    python benchmarks/embedding.py share          # processor seconds of embed beside encode
    python benchmarks/embedding.py memory         # peak memory by rows of the corpus
    python benchmarks/embedding.py resume         # seconds to find 100,000 shards done
    python benchmarks/embedding.py kills          # bytes of jobs that were killed 20 times

Each adds its part to benchmarks/results/embedding.json (or --out), with machine, versions and
command. Peers compute in the same precision, with as many threads, on the same texts, interleaved.
On a machine with other work, processor seconds say more than seconds.

- `encode`: `Encoder.encode` of all texts in memory; nothing is stored.
- `embed`: a job over a .jsonl file, from reading it to the last shard on disk, model loaded.
- `st_encode_save`: sentence-transformers' `encode`, then `numpy.save`.
- `st_multi_process_save`: its `encode_multi_process` with one process, pool started beforehand.
- `datasets_map`: `datasets.map` around sentence-transformers, then `save_to_disk`.
- `ray_data`: a plain Ray Data pipeline around it, then `write_parquet`; actors warm up beforehand.

`memory` and `resume` measure the job and not the model. `memory` uses the embedded model's first
block alone; `resume` writes 100,000 shards of one row with vectors of zeros.
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
from model_folders import SAID, folder_of

import gteopt
from gteopt.build.calibration_texts import BUILTIN, draw_texts
from gteopt.commands.embed import parse_options
from gteopt.config.recipe import Calibration
from gteopt.corpus.jobs import Job, Request, embed_here, prepare, run, working_alone
from gteopt.corpus.plan import write_record
from gteopt.corpus.shard_files import DATA, ShardContent, ShardRecord, to_parquet
from gteopt.encoder.encoder import Encoder
from gteopt.machine import machine, versions
from gteopt.speed.clock import Stopwatch

ELSEWHERE = ("st_multi_process_save", "ray_data")
"""Ways that compute in other processes, whose processor time is not this one's."""
WHATS = ("throughput", "share", "memory", "resume", "kills")
RESULTS = Path(__file__).parent / "results" / "embedding.json"


def texts_of(n: int) -> list[str]:
    """Different texts of the builtin calibration set, of a dozen to a few hundred tokens."""
    drawn = draw_texts(Calibration(n_texts=1000, texts=BUILTIN))
    bare = [each.text for each in drawn]
    return [f"{bare[i % len(bare)]} {i}" for i in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """A row a text."""
    with path.open("w", encoding="utf-8") as handle:
        for text in texts:
            handle.write(json.dumps({"text": text}) + "\n")
    return path


def job_of(encoder: Encoder, corpus: Path, out: Path, **options: Any) -> Job:
    """A planned job."""
    settings, _, wishes = parse_options(options)
    return prepare(Request((str(corpus),), "model", out, settings), encoder, wishes=wishes)


def share(model: str, n_texts: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Processor seconds of `Encoder.encode` / those of a job over the same texts, in turns.

    Other work on the machine changes them less than seconds. A job reads its file, plans, writes
    and syncs besides. What that takes is measured a second time with a model that computes nothing,
    since it is smaller than what the seconds of the model vary by.
    """
    texts = texts_of(n_texts)
    corpus = write_jsonl(folder / "corpus.jsonl", texts)
    encoder = gteopt.load(model, device="cpu", dtype="float32")
    encoder.encode(texts[:64])
    seconds: dict[str, list[float]] = {"encode": [], "embed": []}
    beside: list[float] = []

    def spent(way: Callable[[], object]) -> float:
        watch = Stopwatch()
        way()
        return round(watch.cpu_s, 3)

    def embed() -> None:
        out = folder / "vectors"
        shutil.rmtree(out, ignore_errors=True)
        with working_alone(out):
            run(job_of(encoder, corpus, out, dtype="float32"), embed_here(encoder))

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
    for _ in range(1 + repeats):  # the first one warms up
        whole, alone = spent(embed), spent(lambda: encoder.encode(texts))
        beside.append((whole - alone) / n_texts)
    model_s = median(seconds["encode"]) / n_texts
    ratios = [a / b for a, b in zip(seconds["encode"], seconds["embed"], strict=True)]
    return {
        "n_texts": n_texts,
        "mean_tokens": round(float(np.mean(encoder.tokenization.lengths(texts))), 1),
        "threads": torch.get_num_threads(),
        "processor_seconds": seconds,
        "share_of_encode": round(median(ratios), 4),
        "beside_the_model_us_per_text": round(1e6 * median(beside[1:]), 1),
        "encode_us_per_text": round(1e6 * model_s, 1),
        "share_without_noise": round(model_s / (model_s + median(beside[1:])), 4),
    }


def throughput(
    model: str, n_texts: int, repeats: int, folder: Path, with_ray: bool
) -> dict[str, Any]:
    """Seconds of each way, interleaved."""
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
        with working_alone(out):
            run(job_of(encoder, corpus, out, dtype="float32"), embed_here(encoder))

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
    rates = {name: n_texts / median(each) for name, each in seconds.items()}
    here = {name: processor[name] for name in ways if name not in ELSEWHERE}
    return {
        "n_texts": n_texts,
        "mean_tokens": round(float(np.mean(encoder.tokenization.lengths(texts))), 1),
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "processor_seconds": here,
        "embed_to_others_by_processor_seconds": {
            name: round(median(b / a for a, b in zip(here["embed"], each, strict=True)), 3)
            for name, each in here.items()
        },
        "texts_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "embed_to_others": {
            name: round(median(b / a for a, b in zip(seconds["embed"], each, strict=True)), 3)
            for name, each in seconds.items()
        },
    }


def ray_pipeline(model: str, corpus: Path, out: Path) -> Callable[[], None]:
    """Read, `map_batches` with an actor around sentence-transformers, write."""
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
    """Peak resident set of a process that embeds so many short texts."""
    found = []
    for n in rows:
        corpus = folder / f"{n}.jsonl"
        with corpus.open("w") as handle:
            for i in range(n):
                handle.write(f'{{"text": "row {i}"}}\n')
        ran = subprocess.run(
            [sys.executable, __file__, "one-memory", str(corpus), str(folder / f"out{n}")],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(ran.stdout.strip().splitlines()[-1]) | {"rows": n})
        print(found[-1], flush=True)
    return found


def one_memory(corpus: Path, out: Path) -> None:
    """What `memory` runs in a process of its own."""
    encoder = gteopt.load("nano", device="cpu", dtype="float32")
    layers: Any = encoder.module.layers
    encoder.module.layers = layers[:1]
    encoder.module.config.num_hidden_layers = 1  # type: ignore[union-attr]
    watch = Stopwatch()
    with working_alone(out):
        run(job_of(encoder, corpus, out, dtype="float32", batch_size=512), embed_here(encoder))
    seconds = watch.wall_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_mb": round(peak / 1000, 1), "seconds": round(seconds, 1)}))


def shard_of_one_row(job: Job, identity: str, first: int) -> bytes:
    """The bytes of a shard with a vector of zeros."""
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
    found: bytes = to_parquet(content, record, job.record.decode, "list").to_pybytes()
    return found


def resume(n_shards: int, folder: Path) -> dict[str, Any]:
    """Seconds from the start of a job to knowing that all its shards are done."""
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
    # A file for each number of digits; those of the others differ in their first row alone.
    models = {
        len(str(first)): shard_of_one_row(job, identity, first).split(b'"first":%d,' % first)
        for first in (10**n for n in range(len(str(n_shards))))
    }
    for name, shard in job.plan.shards.items():
        before, after = models[len(str(shard.first))]
        (out / DATA / name).write_bytes(before + b'"first":%d,' % shard.first + after)
    write_record(job.folder, job.record)
    watch = Stopwatch()
    with working_alone(out):
        planned = job_of(encoder, corpus, out, **options)
        seconds_plan = watch.wall_s
        report = run(planned, embed_here(encoder))
    seconds = watch.wall_s
    assert (report.shards_now, report.shards_before) == (0, n_shards)
    return {
        "n_shards": n_shards,
        "seconds": round(seconds, 2),
        "of_them_plan": round(seconds_plan, 2),
        "processor_seconds": round(watch.cpu_s, 2),
    }


def main() -> None:
    """Parse, measure, add to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*WHATS, "one-memory"])
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--model", choices=[*SAID], default="minilm")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if asked.what == "one-memory":
        one_memory(*asked.paths)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found: Any
        if asked.what in ("throughput", "share"):
            model = folder_of(asked.model)
            if asked.what == "share":
                found = share(model, asked.texts, asked.repeats, folder)
            else:
                found = throughput(model, asked.texts, asked.repeats, folder, not asked.no_ray)
            found = {"model": SAID[asked.model], **found}
        elif asked.what == "kills":
            found = kill_jobs(
                rows_of(folder / "corpus.jsonl", 402), folder, asked.kills, asked.seed
            )
        elif asked.what == "memory":
            found = {"model": "first block of nano, float32", "runs": memory(asked.rows, folder)}
        else:
            found = resume(asked.shards, folder)
    known = json.loads(asked.out.read_text()) if asked.out.is_file() else {}
    part = asked.what if asked.model == "minilm" else f"{asked.what}_{asked.model}"
    known[part] = {
        "command": " ".join(["python", "benchmarks/embedding.py", *sys.argv[1:]]),
        "machine": machine().model_dump(),
        "versions": versions(),
        "note": asked.note,
        **found,
    }
    asked.out.write_text(json.dumps(known, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
