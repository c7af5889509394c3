"""Inputs and outputs on an S3-compatible server: the same shards as on a disk."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

import gteopt
from gteopt.corpus.storage import StorageFolder
from gteopt.errors import InputError
from tests.support.embedding import embed_with, folder_bytes, write_jsonl

pytest.importorskip("moto", reason="comes with the test extra")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urlopen(address, timeout=1).close()
            break
        except (URLError, OSError):
            time.sleep(0.2)
    yield address
    server.kill()
    server.wait()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    import pyarrow.fs as pafs

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    system = pafs.S3FileSystem(
        endpoint_override=endpoint, region="us-east-1", allow_bucket_creation=True
    )
    system.create_dir("bucket")
    return system


def test_a_bucket_holds_the_bytes_that_a_folder_would(bucket: Any, tmp_path: Path) -> None:
    nano = gteopt.load("nano", device="cpu")
    corpus = write_jsonl(tmp_path / "corpus.jsonl")
    with bucket.open_output_stream("bucket/in/corpus.jsonl") as out:
        out.write(corpus.read_bytes())
    report = embed_with(nano, ["s3://bucket/in/*.jsonl"], "s3://bucket/vectors", id="id")
    assert (report.n_embedded, report.shards_now) == (40, 3)
    names = StorageFolder("s3://bucket/vectors").names("data")
    assert len(names) == 3
    bucket.delete_file(f"bucket/vectors/data/{names[1]}")
    again = embed_with(nano, ["s3://bucket/in/*.jsonl"], "s3://bucket/vectors", id="id")
    assert (again.shards_now, again.shards_before) == (1, 2)
    embed_with(nano, corpus, tmp_path / "out", id="id")
    local = folder_bytes(tmp_path / "out" / "data")
    remote = {n: StorageFolder("s3://bucket/vectors").read(f"data/{n}") for n in names}
    # Only the input's identity differs, because it holds the time of the last change.
    assert [len(content or b"") for content in remote.values()] == [len(c) for c in local.values()]


@pytest.mark.parametrize("library", ["pyarrow alone", "s3fs"])
def test_a_shard_that_another_worker_wrote_first_stays(
    bucket: Any, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "s3fs":
        pytest.importorskip("s3fs", reason="comes with the test extra")
    folder = StorageFolder(f"s3://bucket/first/{library.partition(' ')[0]}")
    if library == "pyarrow alone":
        monkeypatch.setitem(folder.__dict__, "_refusing", None)
    assert folder.create("data/a", b"first")
    assert not folder.create("data/a", b"second")
    assert folder.read("data/a") == b"first"


def test_one_of_several_writers_at_the_same_moment_wins(bucket: Any) -> None:
    pytest.importorskip("s3fs", reason="comes with the test extra")
    folder = StorageFolder("s3://bucket/moment")
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda i: folder.create("data/a", b"%d" % i), range(8)))
    assert sum(wrote) == 1
    assert folder.read("data/a") == b"%d" % wrote.index(True)


def test_a_bucket_that_is_not_there_is_told(bucket: Any) -> None:
    with pytest.raises(InputError, match="s3://nobody/x"):
        embed_with(gteopt.load("nano", device="cpu"), ["s3://nobody/x/"], "s3://bucket/v2")
