"""A real Ray cluster of two nodes loses one and still writes the bytes of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gteopt
from gteopt.corpus.jobs import RunShards
from gteopt.corpus.ray_data import embed_on_ray
from gteopt.encoder.description import describe_encoder
from tests.support.embedding import TEXTS, embed_with, folder_bytes, write_jsonl

pytest.importorskip("ray", reason="comes with the ray extra")


def test_the_command_starts_a_cluster_of_its_own_and_prints_only_its_own_lines(
    tmp_path: Path,
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    place = ("--out", str(tmp_path / "ray"), "--device", "cpu", "--ray", "local", "--actors", "1")
    ran = subprocess.run(
        [sys.executable, "-m", "gteopt", "embed", str(corpus), "--model", "nano", *place],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert ran.returncode == 0, ran.stderr
    assert "40 rows = 40 embedded" in ran.stdout
    assert "Execution plan" not in ran.stderr
    assert "Progress bars disabled" not in ran.stderr


def test_a_cluster_that_loses_a_node_leaves_the_bytes_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.cluster_utils import Cluster

    corpus = write_jsonl(tmp_path / "corpus.jsonl", [*TEXTS, ""])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second_node = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    encoder = describe_encoder("nano", device="cpu")
    embedded: list[str] = []

    def losing_a_node() -> RunShards:
        run = embed_on_ray(cluster.address, device="cpu", actors=(1, 2))

        def embed(*arguments: Any) -> Any:
            for done in run(*arguments):
                embedded.append(done.name)
                if len(embedded) == 3:
                    cluster.remove_node(second_node, allow_graceful=False)
                yield done

        return embed

    try:
        report = embed_with(encoder, corpus, tmp_path / "ray", shard_rows=2, runner=losing_a_node())
        assert (report.n_embedded, report.n_bad) == (40, 1)
        assert len(embedded) == len(set(embedded)) == 21

        dataset = ray.data.from_items([{"body": text} for text in TEXTS[:6]])
        rows = dataset.map_batches(
            gteopt.ray.Embedder,
            fn_constructor_args=["nano"],
            fn_constructor_kwargs={"text": "body"},
            concurrency=1,
            batch_size=6,
        ).take_all()
    finally:
        ray.shutdown()
        cluster.shutdown()
    nano = gteopt.load("nano", device="cpu")
    vectors = {row["body"]: row["vector"] for row in rows}
    expected = nano.encode(TEXTS[:6])
    np.testing.assert_allclose([vectors[text] for text in TEXTS[:6]], expected, atol=2e-2)
    embed_with(nano, corpus, tmp_path / "here", shard_rows=2)
    assert folder_bytes(tmp_path / "ray") == folder_bytes(tmp_path / "here")
