"""What each part of our 4-bit methods is worth: one added at a time, the same texts and bits.

    .venv/bin/python benchmarks/ablation.py --hub-dir ../shared/hub \
        --out benchmarks/results/ablation.json

Models, calibration texts and test sentences are those of `peers_quality.py`; the error is
1 - mean cosine to the float32 original. Rows that the file already holds stay until they are
measured again (`--only`). Tuning takes most of the time; `--steps 0` leaves it out.

Rotation (QuaRot) is measured here and in no recipe: it needs a product with the back rotation
behind the pooling, and gains little where activations stay whole.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peers_quality import CALIBRATION, model_folder
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from torch import Tensor

import gteopt
from gteopt.calibration import draw_texts, tokenize
from gteopt.encoder import Encoder
from gteopt.machine import machine, versions
from gteopt.quant.affine import PackedWeight, QuantizedWeight
from gteopt.recipe import Recipe, load_recipe
from gteopt.tuning import Schedule, tune

INT4 = {"bits": 4, "group_size": 128, "symmetric": False}
NF4 = {"bits": 4, "group_size": 64, "symmetric": True, "element": "nf4"}
INT8 = {"bits": 8, "group_size": "row", "symmetric": True, "activation_bits": 8}
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
    "GPTQ + both": {"method": "gptq", "scheme": INT4},
    "gptq-int4: GPTAQ too (compensate)": {"method": "gptq", "scheme": INT4, **GPTAQ},
    "NF4, round to nearest": {"method": "rtn", "scheme": NF4},
    "NF4, GPTQ + both": {"method": "gptq", "scheme": NF4},
    "gptq-nf4: GPTAQ too": {"method": "gptq", "scheme": NF4, **GPTAQ},
    "W8A8, round to nearest (rtn-int8)": {"method": "rtn", "scheme": INT8},
}
ROTATED = {
    f"{name}, rotated": SOLVED[name]
    for name in (
        "round to nearest",
        "GPTQ + both",
        "gptq-int4: GPTAQ too (compensate)",
        "gptq-nf4: GPTAQ too",
        "W8A8, round to nearest (rtn-int8)",
    )
}
"""Of models with RMSNorm decoders."""
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
    turned = {name: _recipe(weights) for name, weights in ROTATED.items()}
    rows: list[Row] = []
    if options.out.is_file():
        rows = [Row(**each) for each in json.loads(options.out.read_text())["rows"]]
    for model in options.models:
        source = model_folder(model)
        base = gteopt.load(source, dtype="float32")
        wanted = base.encode(texts)
        rotates = base.checkpoint.config["model_type"] == "qwen2"
        rotations = turned if rotates else ()
        for parts in [*recipes, *rotations, *(TUNED if options.steps else ())]:
            if options.only and parts not in options.only:
                continue
            started = time.perf_counter()
            if parts in recipes:
                encoder, bits = solved(source, recipes[parts], options.hub_dir)
                found = encoder.encode(texts)
            elif parts in turned:
                folder, back = rotated(source)
                encoder, bits = solved(folder, turned[parts], options.hub_dir)
                found = _unit(encoder.encode(texts) @ back)
            else:
                schedule = TUNED[parts](options.steps)
                encoder, bits = tuned(base, load_recipe("gptq-int4"), schedule, options.hub_dir)
                found = encoder.encode(texts)
            build_s = time.perf_counter() - started
            error = 1 - float((found * wanted).sum(axis=1).mean())
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


def solved(source: Path, recipe: Recipe, hub_dir: Path) -> tuple[Encoder, float]:
    """A variant built in full, and its bits a weight."""
    recipe = recipe.model_copy(update={"calibration": CALIBRATION, "layout": "gteopt"})
    out = Path(tempfile.mkdtemp()) / "variant"
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
    variant, bits = solved(base.checkpoint.folder, recipe, hub_dir)
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


def rotated(source: Path) -> tuple[Path, NDArray[np.float64]]:
    """The same Qwen2 with its residual stream rotated (QuaRot, Ashkboos et al. 2024, 2404.00456).

    Norms are folded into the layers behind them; what stands on the residual stream, the token
    table first, is multiplied by a randomised Hadamard matrix Q. The final norm's scale has no
    layer behind it: vectors come out as y Q without it.

    Returns:
        A float32 model folder, and the matrix [D, D] that turns its vectors back.
    """
    weights = {name: w.double() for name, w in load_file(source / "model.safetensors").items()}
    n = weights["embed_tokens.weight"].shape[1]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], n)
    q = torch.from_numpy(signs[:, None] * hadamard(n) / np.sqrt(n))
    norms = {
        "self_attn": "input_layernorm.weight",
        "mlp": "post_attention_layernorm.weight",
    }

    def turned(name: str, weight: Tensor) -> Tensor:
        if name == "embed_tokens.weight":
            return weight @ q
        if name.endswith("norm.weight"):
            return torch.ones_like(weight)
        *block, part, layer, kind = name.split(".")
        if layer in ("o_proj", "down_proj"):
            return q.T @ weight
        return weight * weights[".".join([*block, norms[part]])] @ q if kind == "weight" else weight

    folder = Path(tempfile.mkdtemp()) / "rotated"
    shutil.copytree(source, folder)
    tensors = {name: turned(name, w).float().contiguous() for name, w in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, (q.T * weights["norm.weight"]).numpy()


def _unit(x: NDArray[np.float64]) -> NDArray[np.float32]:
    unit: NDArray[np.float64] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit.astype(np.float32)


def unpacked(module: Any) -> QuantizedWeight:
    """Codes of a layer that dequantizes (what float32 variants have)."""
    packed = PackedWeight(
        module.qweight, module.scale, module.qzero, module.scheme, module.in_features
    )
    return packed.unpack()


if __name__ == "__main__":
    main()
