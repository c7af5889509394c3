"""Measure what each part of our 4-bit methods is worth, at the same texts and bits.

    .venv/bin/python benchmarks/ablation.py --hub-dir ../shared/hub \
        --out benchmarks/results/ablation.json

Each row adds one part to another row. Calibration texts are `ONE_SOURCE` of `text_kinds.py`, and
test sentences are those of STS-B. The error is 1 - mean cosine to the float32 original. The file
keeps its rows until they are measured again: `--only "GPTQ + both, rotated"` names the rows to
measure. Tuning takes most of the time; `--steps 0` leaves it out.

Two methods are measured here and are in no recipe, because they gain too little. Rotation (QuaRot)
needs a product with the inverse rotation after the pooling. GuidedQuant (Kim et al. 2025) weights
Hessians by how much a token moves the vector, which needs a backward pass through the model.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from model_folders import model_folder
from numpy.typing import NDArray
from results_files import conditions, write_results
from safetensors.torch import load_file, save_file
from scipy.linalg import hadamard
from text_kinds import ONE_SOURCE
from torch import Tensor, nn

import gteopt
from gteopt.build.calibration_texts import draw_calibration_texts, tokenize_calibration
from gteopt.build.replay import (
    Block,
    BlockInput,
    batch_replay_texts,
    copy_block,
    find_blocks,
    open_blocks,
    order_block_layers,
    replay_block_,
)
from gteopt.build.sensitivity import DEEP_BLOCKS
from gteopt.build.tuning import TuningSchedule, tune_model
from gteopt.config.recipe import LayerScheme, Recipe, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.quant.affine import PackedWeight, QuantizedWeight, pack
from gteopt.quant.gptq import GptqOptions, solve
from gteopt.quant.hessian import HessianAccumulator
from gteopt.speed.clock import Stopwatch

INT4 = {"bits": 4, "group_size": 128, "symmetric": False}
NF4 = {"bits": 4, "group_size": 64, "symmetric": True, "number_format": "nf4"}
INT8 = {"bits": 8, "group_size": "per_channel", "symmetric": True, "activation_bits": 8}
PLAIN = {"act_order": False, "clip_search": False}
GPTAQ = {"gptaq_strength": 0.5}
ROWS = {"row_feedback": 0.5}
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
    "GPTQ + both + GPTAQ": {"method": "gptq", "scheme": INT4, **GPTAQ},
    "gptq-int4: row feedback too": {"method": "gptq", "scheme": INT4, **GPTAQ, **ROWS},
    "NF4, round to nearest": {"method": "rtn", "scheme": NF4},
    "NF4, GPTQ + both": {"method": "gptq", "scheme": NF4},
    "NF4, GPTQ + both + GPTAQ": {"method": "gptq", "scheme": NF4, **GPTAQ},
    "gptq-nf4: row feedback too": {"method": "gptq", "scheme": NF4, **GPTAQ, **ROWS},
    "W8A8, round to nearest (rtn-int8)": {"method": "rtn", "scheme": INT8},
}
ROTATED = {
    f"{name}, rotated": SOLVED[name]
    for name in (
        "round to nearest",
        "GPTQ + both",
        "GPTQ + both + GPTAQ",
        "NF4, GPTQ + both + GPTAQ",
        "W8A8, round to nearest (rtn-int8)",
    )
}
"""Weights options by row, for decoders with RMSNorm."""
GUIDED = {
    f"{name}, Hessian guided{half}": (share, gptaq_strength)
    for name, gptaq_strength in (
        ("GPTQ + both", 0.0),
        ("GPTQ + both + GPTAQ", 0.5),
    )
    for share, half in ((1.0, ""), (0.5, " by half"))
}
"""Share of a token's weight that its gradient decides, and GPTAQ's strength, by row."""
BY_GRADIENTS = "both, bits chosen by gradients as in deep models"
RECIPES = {
    "bits by layer (as mixed-4.25)": "mixed-4.25",
    "both (as mixed-nf4)": "mixed-nf4",
    BY_GRADIENTS: "mixed-nf4",
}
TUNED: dict[str, Callable[[int], TuningSchedule]] = {
    "GPTQ + both, scales, norms, biases tuned": lambda n: TuningSchedule(n_steps=n, codes_rate=0.0),
    "GPTQ + both, codes too (gptq-int4-guided)": lambda n: TuningSchedule(n_steps=n),
    "GPTQ + both, codes too, no drift term": lambda n: TuningSchedule(n_steps=n, drift_weight=0.0),
}
"""Schedule by row, for a number of steps."""


@dataclass(frozen=True)
class Row:
    """One combination on one model."""

    model: str
    parts: str
    bits_per_weight: float
    error: float
    build_s: float
    tuning_steps: int = 0


def main() -> None:
    """Measure every combination on every model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["all-MiniLM-L6-v2", "gte-nano"])
    parser.add_argument("--steps", type=int, default=400, help="steps of tuning")
    parser.add_argument("--only", nargs="+", help="combinations to run instead of all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = options.hub_dir / "mteb" / "stsbenchmark-sts" / "test.jsonl"
    pairs = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    texts = list(dict.fromkeys([p["sentence1"] for p in pairs] + [p["sentence2"] for p in pairs]))
    recipes = {name: _recipe(weights) for name, weights in SOLVED.items()}
    for name, recipe in RECIPES.items():
        mixed = load_recipe(recipe)
        plain = {"gptaq_strength": 0.0, "row_feedback": 0.0}
        weights = mixed.weights.model_copy(update=plain)
        recipes[name] = mixed.model_copy(update={"weights": weights})
    rotated_recipes = {name: _recipe(weights) for name, weights in ROTATED.items()}
    rows: list[Row] = []
    if options.out.is_file():
        rows = [Row(**row) for row in json.loads(options.out.read_text())["rows"]]
    for model in options.models:
        source = model_folder(model)
        base = gteopt.load(source, dtype="float32")
        original = base.encode(texts)
        rotates = base.checkpoint.config["model_type"] == "qwen2"
        rotations = rotated_recipes if rotates else ()
        for parts in [*recipes, *GUIDED, *rotations, *(TUNED if options.steps else ())]:
            if options.only and parts not in options.only:
                continue
            watch = Stopwatch()
            if parts in recipes:
                # A model with more blocks than this has its sensitivities estimated by gradients.
                deep_blocks = 0 if parts == BY_GRADIENTS else DEEP_BLOCKS
                with patch("gteopt.build.bit_budget.DEEP_BLOCKS", deep_blocks):
                    encoder, bits = solved(source, recipes[parts], options.hub_dir)
                vectors = encoder.encode(texts)
            elif parts in rotated_recipes:
                folder, back = rotated(source)
                encoder, bits = solved(folder, rotated_recipes[parts], options.hub_dir)
                vectors = _unit(encoder.encode(texts) @ back)
            elif parts in GUIDED:
                encoder, bits = guided(source, *GUIDED[parts], options.hub_dir)
                vectors = encoder.encode(texts)
            else:
                schedule = TUNED[parts](options.steps)
                encoder, bits = tuned(base, recipes["GPTQ + both"], schedule, options.hub_dir)
                vectors = encoder.encode(texts)
            build_s = watch.wall_s
            error = 1 - float((vectors * original).sum(axis=1).mean())
            rows = [row for row in rows if (row.model, row.parts) != (model, parts)]
            n_steps = options.steps if parts in TUNED else 0
            rows.append(Row(model, parts, bits, error, build_s, n_steps))
            print(f"{model:18}{parts:42}{bits:6.2f}{error:10.5f}{build_s:8.0f} s", flush=True)
            record = {
                "schema": "gteopt.ablation/2",
                "calibration": ONE_SOURCE.model_dump(),
                "rows": [asdict(row) for row in rows],
                **conditions(),
                "n_threads": torch.get_num_threads(),
            }
            write_results(options.out, record, indent=2)


def _recipe(weights: dict[str, Any]) -> Recipe:
    content = {"schema": "gteopt.recipe/1", "name": "ablation", "weights": weights}
    return Recipe.model_validate(content)


def solved(source: Path, recipe: Recipe, hub_dir: Path) -> tuple[Encoder, float]:
    """Build a variant with all its steps; returns it with its bits per weight."""
    recipe = recipe.model_copy(update={"calibration": ONE_SOURCE, "format": "gteopt"})
    out = Path(tempfile.mkdtemp()) / "variant"
    manifest = gteopt.quantize(source, recipe, out, hub_dir=hub_dir, dtype="float32")
    if manifest.allocation is not None:
        return gteopt.load(out), manifest.allocation.bits_per_weight
    sizes = [layer.out_features * layer.in_features for layer in manifest.layers]
    bits = [layer.bits_per_weight for layer in manifest.layers]
    return gteopt.load(out), sum(s * b for s, b in zip(sizes, bits, strict=True)) / sum(sizes)


def tuned(
    base: Encoder, recipe: Recipe, schedule: TuningSchedule, hub_dir: Path
) -> tuple[Encoder, float]:
    """Tune the weights that a solver found; returns the encoder and its bits per weight."""
    variant, bits = solved(base.checkpoint.folder, recipe, hub_dir)
    start = {
        name: unpacked(module)
        for name, module in variant.module.named_modules()
        if hasattr(module, "qweight")
    }
    texts = draw_calibration_texts(ONE_SOURCE, hub_dir=hub_dir)
    result = tune_model(
        base, start, tokenize_calibration(base.tokenization, texts, ONE_SOURCE.max_tokens), schedule
    )
    encoder = gteopt.load(base.checkpoint.folder, dtype="float32")
    changed = {f"{name}.weight": codes.dequantize() for name, codes in result.weights.items()}
    encoder.module.load_state_dict({**changed, **result.rest}, strict=False)
    return encoder, bits


def rotated(source: Path) -> tuple[Path, NDArray[np.float64]]:
    """The same Qwen2 with its residual stream rotated (QuaRot, Ashkboos et al. 2024, 2404.00456).

    The scale of a norm is folded into the layers that follow it. The token table and each layer
    that reads or writes the residual stream are multiplied by a randomised Hadamard matrix Q. No
    layer follows the final norm, so the returned matrix contains its scale.

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


def guided(
    source: Path, share: float, gptaq_strength: float, hub_dir: Path
) -> tuple[Encoder, float]:
    """GPTQ with weighted tokens, stage by stage as in a build; returns the encoder and its bits.

    The weight of a token is (1 - share) + share * s, where s is its value in `saliences`.
    """
    encoder = gteopt.load(source, dtype="float32")
    texts = draw_calibration_texts(ONE_SOURCE, hub_dir=hub_dir)
    tokens = tokenize_calibration(encoder.tokenization, texts, ONE_SOURCE.max_tokens)
    parts = saliences(encoder, tokens)
    scheme = LayerScheme.model_validate(INT4)
    blocks, inputs = open_blocks(encoder, tokens)
    exact = [batch.copy() for batch in inputs]
    n_bits = n_weights = 0.0
    for block in blocks:
        original = copy_block(block)
        for names in order_block_layers(block, inputs):
            rows, rows_before = reads(block, names[0], inputs), reads(original, names[0], exact)
            statistics = HessianAccumulator(rows[0].shape[1])
            for i, (x, x0) in enumerate(zip(rows, rows_before, strict=True)):
                salience = torch.stack([parts[name][i] for name in names]).mean(0)
                root = ((1 - share) + share * salience).sqrt()[:, None]
                statistics.add(root * x, root * x0)
            for name in names:
                linear = encoder.module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                cross_term = statistics.cross_term(linear.weight.data) if gptaq_strength else None
                options = GptqOptions(gptaq_strength=gptaq_strength)
                codes = solve(
                    linear.weight.data, statistics.hessian, scheme, options, cross_term=cross_term
                ).weight
                linear.weight.data = codes.dequantize()
                n_weights += codes.codes.numel()
                n_bits += codes.codes.numel() * pack(codes).bits_per_weight
        replay_block_(original, exact)
        replay_block_(block, inputs)
    return encoder, n_bits / n_weights


@torch.inference_mode()
def reads(block: Block, layer: str, inputs: Sequence[BlockInput]) -> list[Tensor]:
    """Inputs of a layer for each batch, without padding: [n, I]."""
    inputs_read: list[Tensor] = []
    linear = block.linears()[layer]
    handle = linear.register_forward_pre_hook(lambda _module, args: inputs_read.append(args[0]))
    for i, batch in enumerate(inputs):
        block.run(i, batch.hidden)
    handle.remove()
    return [rows[batch.real] for rows, batch in zip(inputs_read, inputs, strict=True)]


def saliences(
    encoder: Encoder, tokens: Sequence[Sequence[int]], n_probes: int = 4
) -> dict[str, list[Tensor]]:
    """How much each token of each layer's output moves the vector; the mean of a layer is 1.

    The value of a token is the mean of |d(r v)/dy|^2 over random directions r (Gauss-Newton), with
    v the vector and y the token's output. Padding is left out.

    Returns:
        For each layer, one [n] per batch, in the order of `batch_replay_texts`.
    """
    prefix, blocks = find_blocks(encoder.module, encoder.checkpoint.config["num_hidden_layers"])
    linears = {f"{prefix}.{n}": m for n, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    by_layer: dict[str, list[Tensor]] = {name: [] for name in linears}
    generator = torch.Generator().manual_seed(0)
    for batch in batch_replay_texts(tokens):
        ids, mask = encoder.pad(batch)
        outputs: dict[str, Tensor] = {}
        handles = [
            linear.register_forward_hook(partial(_note, outputs, name))
            for name, linear in linears.items()
        ]
        embedding = encoder.module.get_input_embeddings()(ids)  # type: ignore[operator]
        hidden = encoder.module(
            inputs_embeds=embedding.detach().requires_grad_(True), attention_mask=mask
        ).last_hidden_state
        for handle in handles:
            handle.remove()
        vectors = encoder.pooled(hidden, encoder.pool_mask(batch, mask))
        sums = dict.fromkeys(linears, torch.zeros(mask.shape))
        for _ in range(n_probes):
            probe = torch.randn(vectors.shape, generator=generator)
            slopes = torch.autograd.grad(
                (vectors * probe).sum(), list(outputs.values()), retain_graph=True
            )
            for name, slope in zip(outputs, slopes, strict=True):
                sums[name] = sums[name] + slope.square().sum(-1)
        for name in linears:
            by_layer[name].append(sums[name][mask.bool()])
    means = {name: torch.cat(batches).mean() for name, batches in by_layer.items()}
    return {name: [batch / means[name] for batch in parts] for name, parts in by_layer.items()}


def _note(outputs: dict[str, Tensor], name: str, _module: nn.Module, _args: Any, out: Any) -> None:
    outputs[name] = out


def _unit(x: NDArray[np.float64]) -> NDArray[np.float32]:
    unit: NDArray[np.float64] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit.astype(np.float32)


def unpacked(module: Any) -> QuantizedWeight:
    """Codes of a layer that dequantizes, as all layers of float32 variants do."""
    packed = PackedWeight(
        module.qweight, module.scale, module.qzero, module.scheme, module.in_features
    )
    return packed.unpack()


if __name__ == "__main__":
    main()
