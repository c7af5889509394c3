"""A job that is killed at any moment ends with the bytes of a job that was never killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gteopt
from gteopt.corpus.embed_workers import embed_on_workers, start_local_embedders
from gteopt.corpus.jobs import RunShards
from gteopt.corpus.shard_encoder import ShardDone
from gteopt.encoder.description import describe_encoder
from tests.support.embedding import TEXTS, embed_with, folder_bytes, stored, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def test_sigkill_at_random_moments_leaves_no_trace(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*TEXTS, "", *TEXTS[::-1], 5])
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.killed_jobs"),
            *(str(corpus), str(tmp_path / "killed"), "4", "1"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split()[1:] == ["82", "2"]
    embed_with(gteopt.load("nano", device="cpu"), corpus, tmp_path / "never", shard_rows=4)
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "never")


def test_a_worker_that_is_killed_costs_only_the_shards_it_had(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS * 2)
    embedded: list[str] = []
    with start_local_embedders(["cpu"]) as workers:

        def killing() -> RunShards:
            run = embed_on_workers(workers)

            def embed(*arguments: Any) -> Any:
                for done in run(*arguments):
                    assert isinstance(done, ShardDone)
                    embedded.append(done.name)
                    if len(embedded) == 5:
                        opened: list[Any] = workers.opened()
                        opened[0].process.kill()
                    yield done

            return embed

        encoder = describe_encoder("nano", device="cpu")
        embed_with(encoder, corpus, tmp_path / "out", runner=killing(), shard_rows=4)
        assert workers.n_lost in (1, 2, 3)
    assert len(embedded) == len(set(embedded)) == 20
    assert stored(tmp_path / "out")["row"].to_pylist() == list(range(80))
    embed_with(gteopt.load("nano", device="cpu"), corpus, tmp_path / "never", shard_rows=4)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "never")
