"""What a base or an artifact is, and what every recipe would make of it, before anything is built.

Hides: how sizes follow from shapes. Refuses to know: weights; only headers and configs are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from gteopt import tuning
from gteopt.build import plan_layers
from gteopt.checkpoint import Checkpoint, open_checkpoint
from gteopt.encoder import build_skeleton, parse_dtype
from gteopt.errors import GteoptError
from gteopt.quant.affine import packed_bytes
from gteopt.recipe import GptqWeights, LayerScheme, Recipe, load_recipe, shipped_names
from gteopt.records import Inspection, RecipeEstimate

# float32 copies that a solve holds at once: of the Hessian (itself, permuted, its inverse, the
# factor) and of the weight matrix (itself, permuted, errors, result).
_HESSIAN_COPIES = 4
_WEIGHT_COPIES = 4


def inspect(
    source: str | Path,
    *,
    hub_dir: Path | None = None,
    revision: str | None = None,
    dtype: str = "bfloat16",
) -> Inspection:
    """Describe a base (with an estimate for every shipped recipe) or an artifact.

    Raises:
        InputError, IntegrityError, UnsupportedError: see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(source, hub_dir=hub_dir, revision=revision)
    manifest = checkpoint.manifest
    template = checkpoint.query_template
    recipes = [] if manifest else [load_recipe(name) for name in shipped_names("recipes")]
    return Inspection(
        schema="gteopt.inspection/1",
        id=checkpoint.id,
        sha256=checkpoint.sha256,
        architecture=str(checkpoint.config["model_type"]),
        family=checkpoint.family.name if checkpoint.family else None,
        attention=checkpoint.attention,
        pooling=checkpoint.pooling,
        normalised=checkpoint.normalise,
        end_token=checkpoint.end_token,
        query_prompt=template or checkpoint.prompts.get("query", ""),
        document_prompt="" if template else checkpoint.prompts.get("document", ""),
        dims=manifest.vectors.dims if manifest else checkpoint.dims,
        matryoshka_dims=checkpoint.matryoshka_dims,
        max_tokens=checkpoint.max_tokens,
        license=checkpoint.license,
        n_parameters=manifest.base.n_parameters if manifest else _n_parameters(checkpoint),
        published_scores=dict(checkpoint.published.scores) if checkpoint.published else {},
        notes=checkpoint.notes,
        estimates=tuple(estimate(checkpoint, recipes, dtype=dtype)),
        manifest=manifest,
    )


def estimate(
    checkpoint: Checkpoint, recipes: Iterable[Recipe], *, dtype: str = "bfloat16"
) -> Iterable[RecipeEstimate]:
    """Size and build memory of each recipe applied to this base."""
    item_bytes = parse_dtype(dtype).itemsize
    skeleton = build_skeleton(checkpoint)
    linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    full_bytes = sum(p.numel() for p in skeleton.parameters()) * item_bytes
    buffer_bytes = sum(b.numel() * b.element_size() for b in skeleton.buffers())
    for recipe in recipes:
        try:
            schemes = plan_layers(checkpoint, recipe).schemes
            if recipe.dims is not None and recipe.dims.n > checkpoint.dims:
                raise ValueError(f"the model has only {checkpoint.dims} dimensions")
        except (GteoptError, ValueError) as error:
            yield RecipeEstimate(
                recipe=recipe.name,
                summary=recipe.summary,
                weight_bytes=None,
                build_bytes=None,
                bytes_per_vector=None,
                problem=str(error),
            )
            continue
        whole = sum(linears[name].weight.numel() for name in schemes)
        packed = sum(
            packed_bytes(linears[name].out_features, linears[name].in_features, scheme)
            for name, scheme in schemes.items()
        )
        if isinstance(recipe.weights, GptqWeights) and recipe.weights.budget is not None:
            packed = int(whole * recipe.weights.budget / 8)
        saved = whole * item_bytes - packed
        if recipe.embedding == "int8":
            table = skeleton.get_input_embeddings().weight  # type: ignore[operator]
            saved += table.numel() * (item_bytes - 1) - 2 * len(table)
        yield RecipeEstimate(
            recipe=recipe.name,
            summary=recipe.summary,
            weight_bytes=full_bytes - saved + buffer_bytes,
            build_bytes=full_bytes + _work_bytes(checkpoint, recipe, linears, schemes, item_bytes),
            bytes_per_vector=_vector_bytes(checkpoint, recipe),
            problem=None,
        )


def _n_parameters(checkpoint: Checkpoint) -> int:
    return sum(math.prod(shape) for shape in checkpoint.tensors.values())


def _work_bytes(
    checkpoint: Checkpoint,
    recipe: Recipe,
    linears: Mapping[str, nn.Linear],
    schemes: Mapping[str, LayerScheme],
    item_bytes: int,
) -> int:
    """What the build holds beside the model: one layer's solve and the texts' hidden states."""
    if not schemes:
        return 0
    matrix = max(linears[name].weight.numel() for name in schemes) * 4 * _WEIGHT_COPIES
    if not isinstance(recipe.weights, GptqWeights):
        return matrix
    widest = max(linears[name].in_features for name in schemes)
    n_tokens = recipe.calibration.n_texts * recipe.calibration.max_tokens
    hidden_size = int(checkpoint.config["hidden_size"])
    hidden = n_tokens * hidden_size * item_bytes
    solving = matrix + widest * widest * 4 * _HESSIAN_COPIES + 2 * hidden
    if recipe.weights.effort == "fast":
        return solving
    n_weights = sum(linears[name].weight.numel() for name in schemes)
    n_other = _n_parameters(checkpoint) - n_weights
    n_layers = int(checkpoint.config["num_hidden_layers"])
    return max(solving, tuning.work_bytes(n_weights, n_other, n_layers, hidden_size))


def _vector_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    dims = recipe.dims.n if recipe.dims else checkpoint.dims
    return {"float32": 4 * dims, "int8": dims, "binary": -(-dims // 8)}[recipe.vectors.code]
