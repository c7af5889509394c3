"""Measure throughput and latency of `gteopt serve` beside other servers and offline encoding.

    python benchmarks/serving.py run --seconds 8 --rounds 3
    python benchmarks/serving.py run --infinity ~/venv/bin/infinity_emb     # one more peer
    python benchmarks/serving.py run --model qwen2                          # a decoder's shape
    python benchmarks/serving.py cpu --model wide             # processor time beside the device
    python benchmarks/serving.py soak --requests 100000 --connections 2000 --minutes 20
    python benchmarks/serving.py soak --mixed --minutes 20                  # texts of all lengths

All servers have the same model in float32 and the same number of threads. All are in memory at once
and take turns. One round measures each server under each load, and a ratio is between figures of
one round.

- alone: an open loop of short queries with Poisson arrivals, and no other load.
- bulk: closed loops that send requests of 16 texts of lognormal length, one after another.
- mixed: both. Latency counts from the moment at which a query is due, so a server that stalls also
  pays for the queries that wait.

`cpu` measures the processor time of a server beside its device thread, with answers in base64.
`soak` counts lost and wrong answers while connections are opened and dropped, and samples memory.

`offline` is `Encoder.encode` on the same texts in a separate process; no server can be faster.
`st-fastapi` is sentence-transformers in a FastAPI route, as its users write it.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
from model_folders import NAMES, folder_of
from results_files import write_part

from gteopt.machine import describe_machine

RESULTS = Path(__file__).parent / "results" / "serving.json"
BULK_TEXTS, N_BULK = 16, 8
QUERIES_PER_S = 4.0
NOTE = (
    "other work used most of the machine (load_average of each round). The system gave a server "
    "with many computing threads more of the cores than a server with one. So only ratios of one "
    "round mean something."
)
_SAMPLE_S = 10.0
LIBRARIES = ("gteopt", "torch", "transformers", "sentence-transformers", "fastapi", "uvicorn")


def corpus(n_texts: int, seed: int) -> list[str]:
    """Texts of lognormal length: median 60 words, at most 180, all within MiniLM's limit."""
    generator = random.Random(seed)
    prose = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    words = [word for word in prose.split() if word.isalpha() and word.islower()]
    texts = []
    for i in range(n_texts):
        n_words = min(180, max(3, int(generator.lognormvariate(4.1, 0.6))))
        texts.append(f"{i} " + " ".join(generator.choices(words, k=n_words)))
    return texts


@dataclass
class Server:
    """A process that serves the model under the name `bench`."""

    name: str
    port: int
    process: subprocess.Popen[bytes]

    def post(self, texts: Sequence[str], connection: http.client.HTTPConnection) -> bytes:
        body = json.dumps({"model": "bench", "input": list(texts), "encoding_format": "base64"})
        connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{self.name}: {answer.status} {content[:300]!r}")
        return content

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)


def free_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(name: str, command: Sequence[str], port: int, threads: int) -> Iterator[Server]:
    """Start a server, wait for its first answer, and stop it at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
    environment["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    server = Server(name, port, process)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                server.post(["ready"], server.connect())
                break
            except (OSError, http.client.HTTPException, RuntimeError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def percentile(values: Sequence[float], share: float) -> float | None:
    """A percentile in the unit of the values; None if there are no values."""
    return float(np.percentile(np.array(values), 100 * share)) if values else None


def load(
    server: Server,
    texts: Sequence[str],
    lengths: dict[str, int],
    seconds: float,
    *,
    bulk: bool,
    queries: bool,
    seed: int,
) -> dict[str, float | None]:
    """Figures of one server under one load."""
    end = time.monotonic() + seconds
    tokens: list[int] = []
    latencies: list[float] = []
    errors: list[Exception] = []

    def bulk_loop(number: int) -> None:
        generator, connection = random.Random(seed + number), server.connect()
        while (began := time.monotonic()) < end:
            chosen = generator.sample(texts, BULK_TEXTS)
            server.post(chosen, connection)
            took = time.monotonic() - began
            inside = min(1.0, (end - began) / took)  # share of the last request before the end
            tokens.append(int(inside * sum(lengths[text] for text in chosen)))

    def query(due: float, text: str) -> None:
        connection = server.connect()
        server.post([text], connection)
        connection.close()
        latencies.append(time.monotonic() - due)

    def guarded(task: Callable[..., None], *arguments: Any) -> None:
        try:
            task(*arguments)
        except Exception as error:
            errors.append(error)

    before = device_totals(server)
    with ThreadPoolExecutor(N_BULK + 64) as pool:
        if bulk:
            for number in range(N_BULK):
                pool.submit(guarded, bulk_loop, number)
        if queries:
            generator, due = random.Random(seed), time.monotonic()
            while (due := due + generator.expovariate(QUERIES_PER_S)) < end:
                time.sleep(max(0.0, due - time.monotonic()))
                pool.submit(guarded, query, due, f"what is word {generator.random():.6f}")
    after = device_totals(server)
    if errors:
        raise errors[0]
    n_passes = after[1] - before[1]
    return {
        "tokens_per_s": sum(tokens) / seconds if bulk else None,
        "n_queries": len(latencies),
        "query_p50_ms": milliseconds(percentile(latencies, 0.5)),
        "query_p95_ms": milliseconds(percentile(latencies, 0.95)),
        "batch_ms": 1000 * (after[0] - before[0]) / n_passes if n_passes else None,
    }


def milliseconds(seconds: float | None) -> float | None:
    """Milliseconds; None stays None."""
    return None if seconds is None else 1000 * seconds


def device_totals(server: Server) -> tuple[float, float]:
    """Seconds of the device and passes so far; zeros for other servers."""
    if not server.name.startswith("gteopt"):
        return 0.0, 0.0
    connection = server.connect()
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()

    def total(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    return total("gteopt_device_seconds_total"), total("gteopt_batch_texts_count")


def thread_seconds(process: psutil.Process) -> dict[int, float]:
    """CPU time of each thread, by its id."""
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


class Offline:
    """`Encoder.encode` in a separate process."""

    def __init__(self, threads: int, model: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "offline", "--folder", model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._ask("ready")

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def tokens_per_s(self, seconds: float) -> float:
        """Tokens per second, measured for about this time."""
        return float(self._ask(str(seconds)))

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def offline(model: str) -> None:
    """The child process of `Offline`."""
    import gteopt

    encoder = gteopt.load(model, dtype="float32")
    texts = corpus(2000, seed=0)
    lengths = dict(zip(texts, encoder.tokenization.lengths(texts), strict=True))
    encoder.encode(texts[:64])
    generator = random.Random(1)
    for line in sys.stdin:
        if line.strip() == "ready":
            print("ready", flush=True)
            continue
        began, n_tokens = time.monotonic(), 0
        while time.monotonic() - began < float(line):
            # As many texts as all clients together have in their requests.
            chosen = generator.sample(texts, N_BULK * BULK_TEXTS)
            encoder.encode(chosen)
            n_tokens += sum(lengths[text] for text in chosen)
        print(n_tokens / (time.monotonic() - began), flush=True)


def st_fastapi(port: int, folder: str) -> None:
    """sentence-transformers behind FastAPI, as its users write it."""
    import uvicorn
    from fastapi import FastAPI  # type: ignore[import-not-found, unused-ignore]
    from pydantic import BaseModel
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")

    class Body(BaseModel):
        model: str
        input: list[str]
        encoding_format: str = "float"

    # Annotations are strings in this file, and the route looks them up in the globals.
    globals()["Body"] = Body
    app = FastAPI()

    @app.post("/v1/embeddings")  # type: ignore[untyped-decorator, unused-ignore]
    def embeddings(body: Body) -> dict[str, Any]:
        vectors = model.encode(body.input)
        data = [
            {
                "object": "embedding",
                "index": i,
                "embedding": base64.b64encode(row.tobytes()).decode(),
            }
            for i, row in enumerate(vectors)
        ]
        return {"object": "list", "data": data, "model": body.model, "usage": {}}

    uvicorn.run(app, port=port, log_level="error")


def commands(arguments: argparse.Namespace) -> dict[str, tuple[list[str], int]]:
    """Command line and port of each server."""
    by_name: dict[str, tuple[list[str], int]] = {}
    port = free_port()
    serve = [
        sys.executable,
        "-m",
        "gteopt",
        "serve",
        f"bench={arguments.folder}",
        "--dtype",
        "float32",
    ]
    by_name["gteopt"] = ([*serve, "--port", str(port), "--max-queue-seconds", "600"], port)
    try:
        version("fastapi")
        port = free_port()
        peer = [sys.executable, __file__, "st-fastapi"]
        by_name["st-fastapi"] = ([*peer, str(port), "--folder", arguments.folder], port)
    except PackageNotFoundError:
        print("st-fastapi is left out: fastapi is not installed", file=sys.stderr)
    if arguments.infinity:
        port = free_port()
        options = ["--host", "127.0.0.1", "--url-prefix", "/v1", "--device", "cpu"]
        options += ["--dtype", "float32"]
        options += ["--engine", "torch", "--no-bettertransformer", "--port", str(port)]
        command = [arguments.infinity, "v2", "--model-id", arguments.folder]
        by_name["infinity"] = ([*command, "--served-model-name", "bench", *options], port)
    return by_name


def run(arguments: argparse.Namespace) -> None:
    """Measure all servers in turns, and write rounds and medians."""
    from gteopt.encoder.tokenization import Tokenization
    from gteopt.model.checkpoint import open_checkpoint

    texts = corpus(2000, seed=0)
    tokenization = Tokenization(open_checkpoint(arguments.folder))
    lengths = dict(zip(texts, tokenization.lengths(texts), strict=True))
    rounds: list[dict[str, Any]] = []
    with ExitStack() as stack:
        limit = Offline(arguments.threads, arguments.folder)
        stack.callback(limit.close)
        servers = []
        for name, (command, port) in commands(arguments).items():
            try:
                servers.append(stack.enter_context(started(name, command, port, arguments.threads)))
            except (OSError, http.client.HTTPException, RuntimeError):
                if name == "gteopt":
                    raise
                print(f"{name} is left out: it does not start with this model", file=sys.stderr)
        for number in range(arguments.rounds):
            measured: dict[str, Any] = {
                "load_average": os.getloadavg()[0],
                "offline_tokens_per_s": limit.tokens_per_s(arguments.seconds),
            }
            for server in servers:
                process = psutil.Process(server.process.pid)
                threads = thread_seconds(process)
                loads = {
                    name: load(
                        server,
                        texts,
                        lengths,
                        arguments.seconds,
                        bulk=name != "alone",
                        queries=name != "bulk",
                        seed=100 * number,
                    )
                    for name in ("bulk", "mixed", "alone")
                }
                spent = [
                    seconds - threads.get(thread, 0.0)
                    for thread, seconds in thread_seconds(process).items()
                ]
                measured[server.name] = {
                    **loads,
                    "cpu_outside_busiest_thread": 1 - max(spent) / sum(spent),
                }
            measured["offline_again_tokens_per_s"] = limit.tokens_per_s(arguments.seconds)
            rounds.append(measured)
            print(json.dumps(measured, indent=1), flush=True)
    write("run", {"rounds": rounds, "medians": medians(rounds)}, arguments)
    print(json.dumps(medians(rounds), indent=1))


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds for each server; a ratio is between figures of one round."""
    by_server: dict[str, Any] = {}
    names = [name for name, part in rounds[0].items() if isinstance(part, dict)]
    for name in names:

        def middle(
            of: Callable[[dict[str, Any]], float | None], server: str = name
        ) -> float | None:
            values = [value for r in rounds if (value := of({**r, "own": r[server]}))]
            return median(values) if values else None

        by_server[name] = {
            "bulk_tokens_per_s": middle(lambda r: r["own"]["bulk"]["tokens_per_s"]),
            "share_of_offline": middle(
                lambda r: (
                    r["own"]["bulk"]["tokens_per_s"]
                    / ((r["offline_tokens_per_s"] + r["offline_again_tokens_per_s"]) / 2)
                )
            ),
            "mixed_tokens_per_s": middle(lambda r: r["own"]["mixed"]["tokens_per_s"]),
            "query_under_bulk_p50_ms": middle(lambda r: r["own"]["mixed"]["query_p50_ms"]),
            "query_under_bulk_p95_ms": middle(lambda r: r["own"]["mixed"]["query_p95_ms"]),
            "query_alone_p50_ms": middle(lambda r: r["own"]["alone"]["query_p50_ms"]),
            "query_alone_p95_ms": middle(lambda r: r["own"]["alone"]["query_p95_ms"]),
            "batch_ms": middle(lambda r: r["own"]["mixed"]["batch_ms"]),
            "p95_in_batches": middle(
                lambda r: (
                    r["own"]["mixed"]["query_p95_ms"] / r["own"]["mixed"]["batch_ms"]
                    if r["own"]["mixed"]["batch_ms"]
                    else None
                )
            ),
            "cpu_outside_busiest_thread": middle(lambda r: r["own"]["cpu_outside_busiest_thread"]),
        }
    return by_server


def cpu(arguments: argparse.Namespace) -> None:
    """Measure processor time outside the busiest thread, which is the device thread."""
    texts = corpus(500, seed=5)
    command, port = commands(arguments)["gteopt"]
    with started("gteopt", command, port, arguments.threads) as server:
        process, end = psutil.Process(server.process.pid), time.monotonic() + arguments.seconds
        before, answer_bytes = thread_seconds(process), []

        def client(number: int) -> None:
            generator, connection = random.Random(number), server.connect()
            while time.monotonic() < end:
                chosen = generator.sample(texts, BULK_TEXTS)
                answer_bytes.append(len(server.post(chosen, connection)))

        with ThreadPoolExecutor(N_BULK) as pool:
            list(pool.map(client, range(N_BULK)))
        after = thread_seconds(process)
    spent = sorted(seconds - before.get(thread, 0.0) for thread, seconds in after.items())
    result = {
        "texts": BULK_TEXTS * len(answer_bytes),
        "bytes_per_text": round(sum(answer_bytes) / len(answer_bytes) / BULK_TEXTS),
        "device_thread_cpu_s": round(spent[-1], 2),
        "other_threads_cpu_s": round(sum(spent[:-1]), 2),
        "share_outside_device_thread": round(sum(spent[:-1]) / sum(spent), 4),
    }
    write("cpu", result, arguments)
    print(json.dumps(result, indent=1))


def soak(arguments: argparse.Namespace) -> None:
    """Send many requests, some of which hang up; check the answers and sample memory."""
    import gteopt

    encoder = gteopt.load(arguments.folder, dtype="float32")
    texts = corpus(200, seed=3)
    if not arguments.mixed:
        texts = [text[:60] for text in texts]  # short texts, for many requests
    expected = encoder.encode(texts)
    command, port = commands(arguments)["gteopt"]
    with started("gteopt", command, port, arguments.threads) as server:
        process = psutil.Process(server.process.pid)
        counts = {"sent": 0, "answered": 0, "wrong": 0, "failed": 0, "dropped": 0}
        lock, memory, began = threading.Lock(), [(0.0, process.memory_info().rss)], time.monotonic()

        def count(kind: str) -> None:
            with lock:
                counts[kind] += 1
                passed = time.monotonic() - began
                if passed > memory[-1][0] + _SAMPLE_S:
                    memory.append((passed, process.memory_info().rss))

        def client(number: int) -> None:
            generator, connection = random.Random(number), server.connect()
            every = max(1, arguments.requests // max(1, arguments.connections))
            for i in range(arguments.requests // N_BULK):
                if time.monotonic() - began > 60 * arguments.minutes:
                    return
                if i % every == 0:
                    drop(server, generator.choice(texts))
                    count("dropped")
                chosen = generator.sample(range(len(texts)), generator.choice((1, 1, 1, 4)))
                count("sent")
                try:
                    answer = json.loads(server.post([texts[j] for j in chosen], connection))
                    vectors = np.array(
                        [
                            np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
                            for item in answer["data"]
                        ]
                    )
                    close = np.abs(vectors - expected[chosen]).max() <= 1e-5
                    count("answered" if close else "wrong")
                except Exception:
                    count("failed")
                    connection = server.connect()

        with ThreadPoolExecutor(N_BULK) as pool:
            list(pool.map(client, range(N_BULK)))
        n_open = len(process.net_connections())
    result = {
        **counts,
        "lost": counts["sent"] - counts["answered"] - counts["wrong"] - counts["failed"],
        "open_connections_at_the_end": n_open,
        "seconds": round(time.monotonic() - began, 1),
        "memory_mb": [(round(at), round(n_bytes / 2**20, 1)) for at, n_bytes in memory],
        "memory_growth_after_two_minutes": growth(memory),
        "memory_slope_mb_per_minute": slope(memory),
    }
    write("soak", result, arguments)
    print(json.dumps(result, indent=1))


def slope(memory: Sequence[tuple[float, int]]) -> float | None:
    """MB per minute: slope of a line through the second half of the samples; None of too few."""
    late = [(at / 60, n_bytes / 2**20) for at, n_bytes in memory[len(memory) // 2 :]]
    if len(late) < 3:
        return None
    minutes, megabytes = np.array(late).T
    return round(float(np.polyfit(minutes, megabytes, 1)[0]), 3)


def growth(memory: Sequence[tuple[float, int]]) -> float | None:
    """Share by which the last sample is above the first after two minutes; None without one."""
    late = [n_bytes for at, n_bytes in memory if at >= 120]
    return round(late[-1] / late[0] - 1, 4) if late else None


def drop(server: Server, text: str) -> None:
    """Send a request, and close the connection before its answer."""
    body = json.dumps({"model": "bench", "input": text}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)


def write(part: str, content: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Put one part into the results file, with the machine and versions."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    part = f"{part}_mixed" if part == "soak" and arguments.mixed else part
    part = part if arguments.model == "minilm" else f"{part}_{arguments.model}"
    described = {
        "command": f"python benchmarks/serving.py {' '.join(sys.argv[1:])}",
        "model": NAMES[arguments.model],
        "threads": arguments.threads,
        "machine": describe_machine().model_dump(),
        "versions": versions,
        "note": arguments.note,
        **content,
    }
    write_part(Path(arguments.out), part, described)


def main() -> None:
    """Run one task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("task", choices=("run", "cpu", "soak", "offline", "st-fastapi"))
    parser.add_argument("port", nargs="?", type=int)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=2_000, help="opened and dropped")
    parser.add_argument("--mixed", action="store_true", help="a soak's texts have all lengths")
    parser.add_argument("--minutes", type=float, default=60, help="end a soak after this time")
    parser.add_argument("--model", choices=tuple(NAMES), default="minilm")
    parser.add_argument("--folder", help="folder of the model, if it exists already")
    parser.add_argument("--note", default=NOTE)
    parser.add_argument("--infinity", help="executable of infinity")
    parser.add_argument("--out", default=str(RESULTS))
    arguments = parser.parse_args()
    if arguments.task == "offline":
        offline(arguments.folder)
    elif arguments.task == "st-fastapi":
        st_fastapi(arguments.port, arguments.folder)
    else:
        arguments.folder = arguments.folder or folder_of(arguments.model)
        {"run": run, "cpu": cpu, "soak": soak}[arguments.task](arguments)


if __name__ == "__main__":
    main()
