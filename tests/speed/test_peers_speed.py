"""The speed comparison for GPUs runs to its end on a CPU, on a small shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gteopt.model.checkpoint import open_checkpoint
from gteopt.speed.random_model import read_model_shapes

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
}


def compared(folder: Path, *options: str) -> dict[str, Any]:
    """The JSON after a run on a small shape."""
    shape = folder / "small"
    shape.mkdir(exist_ok=True)
    config = {**read_model_shapes()["gte-Qwen2-7B-instruct"], **SMALL}
    config["vocab_size"] = open_checkpoint("nano").config["vocab_size"]
    (shape / "config.json").write_text(json.dumps(config))
    script = str(ROOT / "benchmarks" / "peers_speed.py")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    fixed = ["--device", "cuda", "--where", "cpu", "--rounds", "1"]
    places = ["--models", str(shape), "--out", str(folder / "out.json")]
    done = subprocess.run(
        [sys.executable, script, *fixed, *places, *options],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return record


def test_rows_are_added_run_by_run_and_bars_follow_from_them(tmp_path: Path) -> None:
    peer, four = "torchao fp8 dynamic, compiled", "gteopt 4-bit, table in int8"
    first = compared(tmp_path, "--only", "gteopt bf16", peer)
    assert {row["engine"] for row in first["rows"]} >= {"gteopt bf16", peer}
    record = compared(tmp_path, "--only", four)
    rows = {row["engine"]: row for row in record["rows"]}
    assert set(rows) == {"sentence-transformers bf16", "gteopt bf16", four, peer}
    assert record["layers_of_random_models"] == 2
    assert rows[peer]["error"]  # it needs a GPU, with or without torchao
    assert rows["sentence-transformers bf16"]["cosine"] > 0.9999
    # Another implementation: attention direction, end token and pooling agree.
    assert rows["gteopt bf16"]["cosine"] > 0.999
    assert rows[four]["weight_bytes"] < rows["gteopt bf16"]["weight_bytes"] / 1.8
    table, block = 20480 * 256, 256 * 256 * 3 + 256 * 512 * 3  # by hand, biases and norms left out
    whole = rows["sentence-transformers bf16"]["weight_bytes"]
    assert abs(whole / (2 * (table + 2 * block)) - 1) < 0.01
    bars = {bar["what"]: bar for bar in record["bars"]}
    query = rows["gteopt bf16"]["timings"]["query"]
    assert bars["bf16, query: ms, median"]["found"] == query["median_s"] * 1e3
    assert bars["bf16, query: ms, median"]["met"] == (query["median_s"] < 6e-3)
    assert bars["4-bit, table in int8: GB of weights"]["met"]
    assert bars["4-bit, query: ms, median"]["met"] is None  # its engine was left out
    assert "NVIDIA GPUs only" in record["energy"]


def test_rows_beyond_the_time_say_so_and_are_what_a_later_run_measures(tmp_path: Path) -> None:
    ours = ("gteopt bf16", "gteopt int8")
    record = compared(tmp_path, "--minutes", "0", "--layers", "1", "--only", *ours)
    rows = {row["engine"]: row for row in record["rows"]}
    assert rows["sentence-transformers bf16"]["timings"]  # all others are compared with it
    assert all("minutes" in rows[name]["error"] for name in ours)
    assert record["layers_of_random_models"] == 1
    record = compared(tmp_path, "--missing", "--layers", "1", "--only", *ours)
    rows = {row["engine"]: row for row in record["rows"]}
    assert all(rows[name]["timings"] and rows[name]["error"] is None for name in ours)
