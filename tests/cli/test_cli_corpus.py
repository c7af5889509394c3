"""`gteopt embed` and `gteopt search` as they are typed: output, events, exit codes, errors."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import gteopt
from gteopt.cli.app import main
from tests.support.embedding import TEXTS, folder_bytes, write_jsonl

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call `main` with these arguments; gives exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gteopt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_a_corpus_is_embedded_searched_and_verified(call: Call, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [*TEXTS, ""])
    out = tmp_path / "vectors"
    command = ("embed", corpus, "--model", "nano", "--out", out, "--id", "id", "--device", "cpu")
    code, stdout, stderr = call(*command, "--keep", "n,text")
    assert code == 3
    assert "41 rows = 40 embedded + 1 dead letters" in stdout
    assert "dead letters (1 empty)" in stderr
    allowed = (*command, "--keep", "n,text", "--max-bad", 1)
    assert call(*allowed)[0] == 0
    code, stdout, _ = call(*allowed, "--verify")
    assert code == 0
    assert "1 shards intact; 41 rows, 40 vectors, 1 dead letters" in stdout
    code, stdout, _ = call("search", out, TEXTS[7], "--top", 2, "--device", "cpu")
    assert code == 0
    assert "  d7  7  entry 7" in stdout.splitlines()[1]
    result = json.loads(
        call("search", out, TEXTS[7], "--compare", out, "--json", "--device", "cpu")[1]
    )
    assert result["comparison"]["kept"] == 1.0
    assert len(result["found"][0]["hits"]) == 10


def test_json_is_an_event_a_line_and_a_dry_run_embeds_nothing(call: Call, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl")
    command = ("embed", corpus, "--model", "nano", "--out", tmp_path / "v", "--device", "cpu")
    code, stdout, _ = call(*command, "--dry-run", "--price-per-hour", 3, "--json")
    estimate = json.loads(stdout)
    nano = gteopt.load("nano", device="cpu")
    assert code == 0
    assert estimate["n_tokens"] == sum(nano.tokenization.lengths(TEXTS))
    assert estimate["n_tokens_error"] == 0  # every row was counted
    assert estimate["dollars"] == pytest.approx(3 * estimate["hours"])
    assert estimate["n_bytes"] == len(TEXTS) * nano.dims * 4
    assert not (tmp_path / "v" / "data").exists()
    code, stdout, _ = call(*command, "--json", "--shard-rows", 16, "--price-per-hour", 3)
    events = [json.loads(line) for line in stdout.splitlines()]
    assert [event["event"] for event in events] == ["start", "shard", "shard", "shard", "end"]
    assert events[3]["rows_done"] == events[0]["rows"] == 40
    assert events[-1]["dollars"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "body"], "no column body; it has id, text, n"),
        (["--instruction", "find"], "--instruction is for queries only"),
        (["--long", "shorten"], "--long shorten: write error, truncate"),
        (["--pool", "mean"], "--long chunk"),
        (["--keep", "vector"], "the output's own columns"),
        (["--export", "npz"], "did you mean npy"),
        (["--actors", "0-2"], "MIN-MAX"),
        (["--verify"], "nothing to verify"),
        (["--unique-ids"], "needs --id"),
        (["--devices", "cpu", "--ray", "auto"], "give only one of them"),
        (["--long", "chunk:999999"], "give at most"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_exit_code_1(
    options: list[str], message: str, call: Call, tmp_path: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl")
    command = ("embed", corpus, "--model", "nano", "--out", tmp_path / "v", "--device", "cpu")
    code, _, stderr = call(*command, *options)
    assert code == 1
    assert message in " ".join(stderr.split())


def test_sigterm_keeps_what_is_finished(tmp_path: Path, call: Call) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [f"{text} {i}" for i, text in enumerate(TEXTS * 20)])
    out = tmp_path / "v"
    command = ["embed", str(corpus), "--model", "nano", "--out", str(out), "--shard-rows", "8"]
    command += ["--device", "cpu"]
    job = subprocess.Popen(
        [sys.executable, "-m", "gteopt", *command], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any((out / "data").glob("*")):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, stderr = job.communicate(timeout=120)
    assert job.returncode == 143
    assert "terminated; finished work is kept" in stderr
    shards_before = folder_bytes(out / "data")
    assert 0 < len(shards_before) < 100
    assert not any((out / "_tmp").glob("*"))
    assert call(*command)[0] == 0
    assert shards_before.items() <= folder_bytes(out / "data").items()
