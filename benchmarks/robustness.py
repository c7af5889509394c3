"""What the solver's settings are worth on kinds of text that it was not calibrated on.

One setting at a time differs from the recipe as it is; the calibration texts are the same. Prints a
line a build and writes one JSON, row by row:

    .venv/bin/python benchmarks/robustness.py --hub-dir ../shared/hub \
        --beir ../shared/beir/cranfield --out benchmarks/results/robustness.json

The error is 1 - mean cosine to the float32 original, by the kinds of `text_kinds.py`. With
--without a language is left out of the calibration texts; its kinds say what new languages meet.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from model_folders import model_folder
from results_files import conditions, read_results, write_results
from text_kinds import encode_kinds, judged_texts, kind_errors, mean_and_worst
from torch import Tensor

import gteopt
from gteopt.build.calibration_texts import draw_calibration_texts, tokenize_calibration
from gteopt.build.replay import batch_replay_texts
from gteopt.config.recipe import Calibration, Recipe, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.paths import ASSETS
from gteopt.quant import gptq
from gteopt.quant.hessian import HessianAccumulator
from gteopt.records.manifest import Manifest

Weigh = Callable[[int, str, Counter[str]], float]


@dataclass(frozen=True)
class Setting:
    """What differs from the recipe.

    Attributes:
        weights: fields of the recipe's weights.
        calibration: fields of the recipe's calibration.
        largest_loss: above which a layer with static activations rounds by token.
        shrinkage: share of the Hessian's off-diagonal elements that is taken away.
        weigh: weight of a text's tokens by its length, its kind and the tokens of each kind.
    """

    weights: tuple[tuple[str, Any], ...] = ()
    calibration: tuple[tuple[str, Any], ...] = ()
    largest_loss: float | None = None
    shrinkage: float = 0.0
    weigh: Weigh | None = None


SETTINGS = {
    "as it is": Setting(),
    "shrinkage 0.02": Setting(shrinkage=0.02),
    "shrinkage 0.05": Setting(shrinkage=0.05),
    "shrinkage 0.1": Setting(shrinkage=0.1),
    "shrinkage 0.2": Setting(shrinkage=0.2),
    "no random texts": Setting(calibration=(("random_texts", 0),)),
    "24 random texts": Setting(calibration=(("random_texts", 24),)),
    "48 random texts": Setting(calibration=(("random_texts", 48),)),
    "96 random texts": Setting(calibration=(("random_texts", 96),)),
    "every layer static": Setting(largest_loss=math.inf),
    "static to a loss of 4": Setting(largest_loss=4),
    "static, no random texts": Setting(calibration=(("random_texts", 0),), largest_loss=math.inf),
    "damping 0.05": Setting((("damping", 0.05),)),
    "tokens weigh 1/L^0.5": Setting(weigh=lambda length, _kind, _all: length**-0.5),
    "tokens weigh 1/L": Setting(weigh=lambda length, _kind, _all: 1 / length),
    "kinds weigh alike": Setting(weigh=lambda _length, kind, tokens: 1 / tokens[kind]),
    "GPTAQ 0": Setting((("gptaq_strength", 0.0),)),
    "GPTAQ 0.25": Setting((("gptaq_strength", 0.25),)),
    "GPTAQ 0.75": Setting((("gptaq_strength", 0.75),)),
    "row feedback 0": Setting((("row_feedback", 0.0),)),
    "row feedback 0.25": Setting((("row_feedback", 0.25),)),
    "row feedback 0.75": Setting((("row_feedback", 0.75),)),
    "shrinkage 0.05, 1/L^0.5": Setting(
        shrinkage=0.05, weigh=lambda length, _kind, _all: length**-0.5
    ),
    "shrinkage 0.1, 1/L^0.5": Setting(
        shrinkage=0.1, weigh=lambda length, _kind, _all: length**-0.5
    ),
}


@dataclass(frozen=True)
class Row:
    """One setting on one model.

    Attributes:
        calibration: the texts, and what is left out of them.
        errors: kind -> 1 - mean cosine.
        n_layers: quantized layers.
        n_static: those among them with static activations.
        cpu_s: CPU time of the build.
    """

    model: str
    recipe: str
    calibration: str
    setting: str
    errors: dict[str, float]
    mean: float
    worst: float
    n_layers: int
    n_static: int
    cpu_s: float


def main() -> None:
    """Measure every setting that was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--beir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["all-MiniLM-L6-v2", "gte-nano"])
    parser.add_argument("--recipes", nargs="+", default=["gptq-int4"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--n-texts", type=int, default=512)
    parser.add_argument("--without", nargs="*", default=[], help="languages to leave out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    judged = judged_texts(options.hub_dir, options.beir)
    spec = calibration(options.n_texts, options.without)
    label = f"builtin, {options.n_texts} texts" + "".join(f", no {x}" for x in options.without)
    rows: list[Row] = []
    if options.out:
        rows = [Row(**row) for row in read_results(options.out).get("rows", ())]
    for model in options.models:
        source = model_folder(model)
        base = gteopt.load(source, dtype="float32")
        reference = encode_kinds(base, judged)
        for name in options.recipes:
            recipe = load_recipe(name).model_copy(update={"calibration": spec})
            for setting in options.settings:
                folder = Path(tempfile.mkdtemp())
                started = time.process_time()
                layers = build(base, recipe, SETTINGS[setting], folder / "out").layers
                cpu_s = time.process_time() - started
                variant = gteopt.load(folder / "out")
                by_kind = kind_errors(reference, encode_kinds(variant, judged))
                shutil.rmtree(folder)
                mean, worst, _ = mean_and_worst(by_kind)
                errors = {kind: of_kind.error for kind, of_kind in by_kind.items()}
                n_static = sum(layer.scheme.activation_static for layer in layers)
                counts = len(layers), n_static
                row = Row(model, name, label, setting, errors, mean, worst, *counts, cpu_s)
                key = (model, name, label, setting)
                rows = [r for r in rows if (r.model, r.recipe, r.calibration, r.setting) != key]
                rows.append(row)
                cells = " ".join(f"{error:8.5f}" for error in errors.values())
                print(f"{model:18}{name:12}{label:30}{setting:26}", end="")
                print(f"{cpu_s:6.0f} s{mean:9.5f}{worst:9.5f}  {cells}", flush=True)
                if options.out:
                    write(options.out, rows)


def calibration(n_texts: int, without: Sequence[str]) -> Calibration:
    """The built-in texts, or a file of them without some languages."""
    if not without:
        return Calibration(n_texts=n_texts)
    rows = builtin()
    kept = {row["text"] for row in rows if row["language"] not in without}
    texts = [t for t in draw_calibration_texts(Calibration(n_texts=len(rows))) if t.text in kept][
        :n_texts
    ]
    path = Path(tempfile.mkdtemp()) / "texts.jsonl"
    path.write_text("\n".join(json.dumps(asdict(text)) for text in texts) + "\n")
    return Calibration(texts=str(path), n_texts=n_texts)


def builtin() -> list[dict[str, Any]]:
    """The rows of the built-in set."""
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def build(base: Encoder, recipe: Recipe, setting: Setting, out: Path) -> Manifest:
    """Write a variant, solved with one setting changed."""
    assert recipe.weights.method == "gptq"
    weights = recipe.weights.model_copy(update=dict(setting.weights))
    texts = recipe.calibration.model_copy(update=dict(setting.calibration))
    recipe = recipe.model_copy(update={"weights": weights, "calibration": texts})
    with ExitStack() as stack:
        if setting.largest_loss is not None:
            stack.enter_context(patch("gteopt.build.blocks.LARGEST_LOSS", setting.largest_loss))
        if setting.shrinkage:
            shrunk = _shrinking(setting.shrinkage)
            stack.enter_context(patch("gteopt.quant.gptq.prepare_gptq", shrunk))
        if setting.weigh is not None:
            accumulator = _weighing(text_weights(base, recipe.calibration, setting.weigh))
            stack.enter_context(patch("gteopt.build.replay.HessianAccumulator", accumulator))
        return gteopt.quantize(base.checkpoint.folder, recipe, out, dtype="float32")


def text_weights(base: Encoder, spec: Calibration, weigh: Weigh) -> list[Tensor]:
    """A weight for each token of each batch, as the build cuts batches."""
    texts = draw_calibration_texts(spec)
    tokens = tokenize_calibration(base.tokenization, texts, spec.max_tokens)
    kind_of = {row["text"]: f"{row['kind']} {row['language']}" for row in builtin()}
    kinds = {id(ids): kind_of[text.text] for ids, text in zip(tokens, texts, strict=True)}
    n_tokens: Counter[str] = Counter()
    for ids in tokens:
        n_tokens[kinds[id(ids)]] += len(ids)
    return [
        torch.cat([torch.full((len(x),), weigh(len(x), kinds[id(x)], n_tokens)) for x in batch])
        for batch in batch_replay_texts(tokens)
    ]


def _weighing(weights: Sequence[Tensor]) -> type[HessianAccumulator]:
    """An accumulator that weighs tokens; batches come in order."""
    typical = torch.cat(list(weights)).mean()

    class Weighing(HessianAccumulator):
        n_batches = 0

        def add(self, x: Tensor, original: Tensor | None = None) -> None:
            root = (weights[self.n_batches] / typical).sqrt()[:, None]
            self.n_batches += 1
            super().add(root * x, None if original is None else root * original)

    return Weighing


def _shrinking(share: float) -> Callable[..., Any]:
    """`gptq.prepare_gptq` on (1 - share) H + share diag(H)."""
    plain = gptq.prepare_gptq

    def prepare(hessian: Tensor, options: gptq.GptqOptions) -> Any:
        return plain((1 - share) * hessian + share * hessian.diagonal().diag(), options)

    return prepare


def write(path: Path, rows: list[Row]) -> None:
    """Everything measured so far, and where."""
    rows_in_json = [asdict(row) for row in rows]
    write_results(path, {"schema": "gteopt.robustness/1", "rows": rows_in_json, **conditions()})


if __name__ == "__main__":
    main()
