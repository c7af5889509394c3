"""The comparison for GPUs runs to its end without one: all but the device, on a small shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gteopt.checkpoint import open_checkpoint
from gteopt.dummy import shapes

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
}


def compared(folder: Path, *engines: str) -> dict[str, Any]:
    """The JSON after a run of some engines beside the reference."""
    shape = folder / "small"
    shape.mkdir(exist_ok=True)
    config = {**shapes()["gte-Qwen2-7B-instruct"], **SMALL}
    config["vocab_size"] = open_checkpoint("nano").config["vocab_size"]
    (shape / "config.json").write_text(json.dumps(config))
    script = str(ROOT / "benchmarks" / "peers_speed.py")
    places = ["--models", str(shape), "--scratch", str(folder), "--out", str(folder / "out.json")]
    what = ["--device", "cuda", "--where", "cpu", "--rounds", "1", "--only", *engines]
    done = subprocess.run(
        [sys.executable, script, *places, *what],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_rows_are_added_run_by_run_and_bars_follow_from_them(tmp_path: Path) -> None:
    peer, four = "torchao int8 dynamic, compiled", "gteopt 4-bit, table in int8"
    first = compared(tmp_path, "gteopt bf16", peer)
    assert {row["engine"] for row in first["rows"]} >= {"gteopt bf16", peer}
    record = compared(tmp_path, four)
    rows = {row["engine"]: row for row in record["rows"]}
    assert set(rows) == {"sentence-transformers bf16", "gteopt bf16", four, peer}
    if find_spec("torchao") is None:
        assert "No module named 'torchao'" in rows[peer]["error"]
    assert rows["sentence-transformers bf16"]["cosine"] > 0.9999
    # Another implementation: attention direction, end token and pooling agree.
    assert rows["gteopt bf16"]["cosine"] > 0.999
    assert rows[four]["weight_bytes"] < rows["gteopt bf16"]["weight_bytes"] / 1.8
    bars = {bar["what"]: bar for bar in record["bars"]}
    query = rows["gteopt bf16"]["timings"]["query"]
    assert bars["bf16, query: ms, median"]["found"] == query["median_s"] * 1e3
    assert bars["bf16, query: ms, median"]["met"] == (query["median_s"] < 6e-3)
    assert bars["4-bit, table in int8: GB of weights"]["met"]
    assert bars["4-bit, query: ms, median"]["met"] is None  # its engine was left out
    assert "NVIDIA GPUs only" in record["energy"]
