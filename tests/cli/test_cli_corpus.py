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
    asked = ("embed", corpus, "--model", "nano", "--out", out, "--id", "id", "--device", "cpu")
    code, said, noted = call(*asked, "--keep", "n,text")
    assert code == 3
    assert "41 rows = 40 embedded + 1 dead letters" in said
    assert "dead letters (1 empty)" in noted
    allowed = (*asked, "--keep", "n,text", "--max-bad", 1)
    assert call(*allowed)[0] == 0
    code, said, _ = call(*allowed, "--verify")
    assert code == 0
    assert "1 shards intact; 41 rows, 40 vectors, 1 dead letters" in said
    code, said, _ = call("search", out, TEXTS[7], "--top", 2, "--device", "cpu")
    assert code == 0
    assert "  d7  7  entry 7" in said.splitlines()[1]
    found = json.loads(
        call("search", out, TEXTS[7], "--compare", out, "--json", "--device", "cpu")[1]
    )
    assert found["comparison"]["kept"] == 1.0
    assert len(found["found"][0]["hits"]) == 10


def test_json_is_an_event_a_line_and_a_dry_run_embeds_nothing(call: Call, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl")
    asked = ("embed", corpus, "--model", "nano", "--out", tmp_path / "v", "--device", "cpu")
    code, said, _ = call(*asked, "--dry-run", "--price-per-hour", 3, "--json")
    told = json.loads(said)
    nano = gteopt.load("nano", device="cpu")
    assert code == 0
    assert told["n_tokens"] == sum(nano.tokenization.lengths(TEXTS))
    assert told["dollars"] == pytest.approx(3 * told["hours"])
    assert told["n_bytes"] == len(TEXTS) * nano.dims * 4
    assert not (tmp_path / "v" / "data").exists()
    code, said, _ = call(*asked, "--json", "--shard-rows", 16, "--price-per-hour", 3)
    events = [json.loads(line) for line in said.splitlines()]
    assert [each["event"] for each in events] == ["start", "shard", "shard", "shard", "end"]
    assert events[3]["rows_done"] == events[0]["rows"] == 40
    assert events[-1]["dollars"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
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
        (["--devices", "cpu", "--ray", "auto"], "give one of them"),
        (["--long", "chunk:999999"], "give at most"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_exit_code_1(
    options: list[str], said: str, call: Call, tmp_path: Path
) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl")
    asked = ("embed", corpus, "--model", "nano", "--out", tmp_path / "v", "--device", "cpu")
    code, _, noted = call(*asked, *options)
    assert code == 1
    assert said in " ".join(noted.split())


def test_sigterm_keeps_what_is_finished(tmp_path: Path, call: Call) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", [f"{text} {i}" for i, text in enumerate(TEXTS * 20)])
    out = tmp_path / "v"
    asked = ["embed", str(corpus), "--model", "nano", "--out", str(out), "--shard-rows", "8"]
    asked += ["--device", "cpu"]
    job = subprocess.Popen(
        [sys.executable, "-m", "gteopt", *asked], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any((out / "data").glob("*")):
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, noted = job.communicate(timeout=120)
    assert job.returncode == 143
    assert "terminated; finished work is kept" in noted
    kept = folder_bytes(out / "data")
    assert 0 < len(kept) < 100
    assert not any((out / "_tmp").glob("*"))
    assert call(*asked)[0] == 0
    assert kept.items() <= folder_bytes(out / "data").items()
