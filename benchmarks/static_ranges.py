"""What fixed input scales lose on a language that calibration did not see, layer by layer.

Fits the grids of `int8-static` on built-in texts without one language, and rounds the inputs of
every layer of the original model by them: of like texts, and of texts in that language. Rounding by
each token's own range, as `int8` does, is the yardstick. Seconds a model; the result is one JSON:

    .venv/bin/python benchmarks/static_ranges.py --out benchmarks/results/static_ranges.json

The error of a layer is the squared change of its outputs over their variance, weights untouched.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peers_quality import model_folder
from torch import Tensor, nn

import gteopt
from gteopt.encoder.encoder import Encoder
from gteopt.machine import machine, versions
from gteopt.paths import ASSETS
from gteopt.quant.static_activations import SeenInputs, fit_inputs

MODELS = ("all-MiniLM-L6-v2", "gte-nano")
GRIDS = {
    "as built": {},
    "room 1.5, strength 0.5": {"_ROOM": 1.5, "_STRENGTH": 0.5},
    "room 2.5, strength 0.5": {"_ROOM": 2.5, "_STRENGTH": 0.5},
}
"""Constants of `static_activations.py` that differ."""
N_FITTED, N_JUDGED = 40, 12


@dataclass(frozen=True)
class Row:
    """One grid of one model.

    Attributes:
        language: left out of the texts that the grid was fitted on.
        like: mean error over layers, of texts like those.
        new: of texts in the language.
        like_per_token: of like texts, inputs rounded by each token's own range.
        new_per_token: of texts in the language, rounded so.
    """

    model: str
    language: str
    grid: str
    like: float
    new: float
    like_per_token: float
    new_per_token: float


def main() -> None:
    """Measure every grid on every model and language."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--languages", nargs="+", default=["zh", "pl"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    if options.out.is_file():
        rows = [Row(**row) for row in json.loads(options.out.read_text())["rows"]]
    for model in options.models:
        encoder = gteopt.load(model_folder(model), dtype="float32")
        for language in options.languages:
            rows = [r for r in rows if (r.model, r.language) != (model, language)]
            found = measured(encoder, model, language)
            for row in found:
                print(f"{model:18}{language:4}{row.grid:24}", end="")
                print(f"like {row.like:.6f} ({row.like_per_token:.6f} by token)", end="")
                print(f"  new {row.new:.6f} ({row.new_per_token:.6f} by token)", flush=True)
            rows += found
            record = {
                "schema": "gteopt.static-ranges/1",
                "rows": [asdict(row) for row in rows],
                "machine": machine().model_dump(),
                "versions": versions(),
                "n_threads": 1,
            }
            options.out.write_text(json.dumps(record, indent=2) + "\n")


@torch.inference_mode()
def measured(encoder: Encoder, model: str, language: str) -> list[Row]:
    """Every grid, fitted without a language."""
    texts = short_texts()
    known = [text for text, own in texts if own != language]
    new = [text for text, own in texts if own == language][:N_JUDGED]
    fitted = layer_inputs(encoder, known[:N_FITTED])
    judged = [layer_inputs(encoder, own) for own in (known[N_FITTED : N_FITTED + N_JUDGED], new)]
    weights = {
        name: module.weight
        for name, module in encoder.module.named_modules()
        if isinstance(module, nn.Linear) and name in fitted
    }

    def mean_error(inputs: dict[str, Tensor], rounded: dict[str, Tensor]) -> float:
        errors = [error(inputs[name], rounded[name], weights[name]) for name in weights]
        return sum(errors) / len(errors)

    by_token = [
        mean_error(inputs, {name: per_token(x) for name, x in inputs.items()}) for inputs in judged
    ]
    rows: list[Row] = []
    for label, constants in GRIDS.items():
        with ExitStack() as stack:
            for name, value in constants.items():
                stack.enter_context(patch(f"gteopt.quant.static_activations.{name}", value))
            grids = {}
            for name, x in fitted.items():
                seen = SeenInputs(x.shape[1])
                seen.add(x)
                grids[name] = fit_inputs(seen)
        fixed = [
            mean_error(
                inputs,
                {name: grids[name].steps(x) * grids[name].scale for name, x in inputs.items()},
            )
            for inputs in judged
        ]
        rows.append(Row(model, language, label, *fixed, *by_token))
    return rows


def short_texts() -> list[tuple[str, str]]:
    """The built-in texts that are short and written by hand, each with its language."""
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    own = [row for row in rows if row["source"] == "written for gteopt" and row["kind"] != "long"]
    random.Random(0).shuffle(own)
    return [(row["text"], row["language"]) for row in own]


def layer_inputs(encoder: Encoder, texts: Sequence[str]) -> dict[str, Tensor]:
    """What each linear layer of the blocks reads: [n, I], text by text, so without padding."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in encoder.module.named_modules():
        if isinstance(module, nn.Linear) and "layer" in name:
            own = found.setdefault(name, [])

            def note(_module: nn.Module, args: Any, own: list[Tensor] = own) -> None:
                own.append(args[0].reshape(-1, args[0].shape[-1]).clone())

            handles.append(module.register_forward_pre_hook(note))
    for text in texts:
        encoder.encode([text])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def per_token(x: Tensor) -> Tensor:
    """Inputs [n, I] rounded to 256 steps of each row's range."""
    low, high = x.aminmax(dim=1, keepdim=True)
    step = (high - low) / 255
    return ((x - low) / step).round() * step + low


def error(x: Tensor, rounded: Tensor, weight: Tensor) -> float:
    """|(x_q - x) W^T|^2 over the variance of x W^T."""
    outputs = x @ weight.T
    change = (rounded - x) @ weight.T
    return float(change.square().sum() / (outputs - outputs.mean(0)).square().sum())


if __name__ == "__main__":
    main()
