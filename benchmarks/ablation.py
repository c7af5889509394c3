"""What each part of our 4-bit methods is worth: one added at a time, the same texts and bits.

    .venv/bin/python benchmarks/ablation.py --hub-dir ../shared/hub \
        --out benchmarks/results/ablation.json

Models, calibration texts and test sentences are those of `peers_quality.py`; the error is
1 - mean cosine to the float32 original. Rows that the file already holds stay until they are
measured again (`--only`). Tuning takes most of the time; `--steps 0` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers_quality import CALIBRATION, model_folder

import gteopt
from gteopt.calibration import draw_texts, tokenize
from gteopt.encoder import Encoder
from gteopt.machine import machine, versions
from gteopt.quant.affine import PackedWeight, QuantizedWeight
from gteopt.recipe import Recipe, load_recipe
from gteopt.tuning import Schedule, tune

INT4 = {"bits": 4, "group_size": 128, "symmetric": False}
NF4 = {"bits": 4, "group_size": 64, "symmetric": True, "element": "nf4"}
PLAIN = {"act_order": False, "clip_search": False}
GPTAQ = {"compensate": 0.5}
SOLVED: dict[str, dict[str, Any]] = {
    "round to nearest": {"method": "rtn", "scheme": INT4},
    "+ clip search": {"method": "rtn", "scheme": INT4, "clip_search": True},
    "GPTQ": {"method": "gptq", "scheme": INT4, **PLAIN},
    "GPTQ + act-order": {"method": "gptq", "scheme": INT4, **PLAIN, "act_order": True},
    "GPTQ + clip search under the Hessian": {
        "method": "gptq",
        "scheme": INT4,
        **PLAIN,
        "clip_search": True,
    },
    "GPTQ + both (gptq-int4)": {"method": "gptq", "scheme": INT4},
    "gptq-int4 + GPTAQ (compensate)": {"method": "gptq", "scheme": INT4, **GPTAQ},
    "NF4, round to nearest": {"method": "rtn", "scheme": NF4},
    "NF4, GPTQ + both (gptq-nf4)": {"method": "gptq", "scheme": NF4},
    "gptq-nf4 + GPTAQ": {"method": "gptq", "scheme": NF4, **GPTAQ},
}
RECIPES = {"bits by layer (mixed-4.25)": "mixed-4.25", "both (mixed-nf4)": "mixed-nf4"}
TUNED: dict[str, Callable[[int], Schedule]] = {
    "gptq-int4, scales, norms, biases tuned": lambda n: Schedule(n_steps=n, codes_rate=0.0),
    "gptq-int4, codes too": lambda n: Schedule(n_steps=n),
    "gptq-int4, codes too, no drift term": lambda n: Schedule(n_steps=n, drift_weight=0.0),
}
"""By steps."""


@dataclass(frozen=True)
class Row:
    """One combination on one model."""

    model: str
    parts: str
    bits_per_weight: float
    error: float
    build_s: float


def main() -> None:
    """Measure every combination on every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["all-MiniLM-L6-v2", "gte-nano"])
    parser.add_argument("--steps", type=int, default=400, help="of tuning")
    parser.add_argument("--only", nargs="+", help="combinations to run instead of all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = options.hub_dir / "mteb" / "stsbenchmark-sts" / "test.jsonl"
    pairs = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    texts = list(dict.fromkeys([p["sentence1"] for p in pairs] + [p["sentence2"] for p in pairs]))
    recipes = {name: _recipe(weights) for name, weights in SOLVED.items()}
    recipes |= {name: load_recipe(each) for name, each in RECIPES.items()}
    rows: list[Row] = []
    if options.out.is_file():
        rows = [Row(**each) for each in json.loads(options.out.read_text())["rows"]]
    for model in options.models:
        base = gteopt.load(model_folder(model), dtype="float32")
        wanted = base.encode(texts)
        for parts in [*recipes, *(TUNED if options.steps else ())]:
            if options.only and parts not in options.only:
                continue
            started = time.perf_counter()
            if parts in recipes:
                found, bits = solved(base, recipes[parts], options.hub_dir)
            else:
                schedule = TUNED[parts](options.steps)
                found, bits = tuned(base, load_recipe("gptq-int4"), schedule, options.hub_dir)
            build_s = time.perf_counter() - started
            error = 1 - float((found.encode(texts) * wanted).sum(axis=1).mean())
            rows = [each for each in rows if (each.model, each.parts) != (model, parts)]
            rows.append(Row(model, parts, bits, error, build_s))
            print(f"{model:18}{parts:42}{bits:6.2f}{error:10.5f}{build_s:8.0f} s", flush=True)
            record = {
                "schema": "gteopt.ablation/1",
                "calibration": CALIBRATION.model_dump(),
                "tuning_steps": options.steps,
                "rows": [asdict(row) for row in rows],
                "machine": machine().model_dump(),
                "versions": versions(),
                "n_threads": torch.get_num_threads(),
            }
            options.out.write_text(json.dumps(record, indent=2) + "\n")


def _recipe(weights: dict[str, Any]) -> Recipe:
    content = {"schema": "gteopt.recipe/1", "name": "ablation", "weights": weights}
    return Recipe.model_validate(content)


def solved(base: Encoder, recipe: Recipe, hub_dir: Path) -> tuple[Encoder, float]:
    """A variant built in full, and its bits a weight."""
    recipe = recipe.model_copy(update={"calibration": CALIBRATION, "layout": "gteopt"})
    out = Path(tempfile.mkdtemp()) / "variant"
    source = base.checkpoint.folder
    manifest = gteopt.quantize(source, recipe, out, hub_dir=hub_dir, dtype="float32")
    if manifest.allocation is not None:
        return gteopt.load(out), manifest.allocation.bits_per_weight
    sizes = [each.out_features * each.in_features for each in manifest.layers]
    bits = [each.bits_per_weight for each in manifest.layers]
    return gteopt.load(out), sum(s * b for s, b in zip(sizes, bits, strict=True)) / sum(sizes)


def tuned(
    base: Encoder, recipe: Recipe, schedule: Schedule, hub_dir: Path
) -> tuple[Encoder, float]:
    """The model with weights that a solver found and tuning changed, and its bits a weight."""
    variant, bits = solved(base, recipe, hub_dir)
    start = {
        name: unpacked(module)
        for name, module in variant.module.named_modules()
        if hasattr(module, "qweight")
    }
    texts = draw_texts(CALIBRATION, hub_dir=hub_dir)
    result = tune(base, start, tokenize(base, texts, CALIBRATION.max_tokens), schedule)
    encoder = gteopt.load(base.checkpoint.folder, dtype="float32")
    changed = {f"{name}.weight": each.dequantize() for name, each in result.weights.items()}
    encoder.module.load_state_dict({**changed, **result.rest}, strict=False)
    return encoder, bits


def unpacked(module: Any) -> QuantizedWeight:
    """Codes of a layer that dequantizes (what float32 variants have)."""
    packed = PackedWeight(
        module.qweight, module.scale, module.qzero, module.scheme, module.in_features
    )
    return packed.unpack()


if __name__ == "__main__":
    main()
