"""What a build will take: memory, disk, and the size of the artifact.

Hides: how sizes follow from shapes and from a recipe. Refuses to know: weights; it reads
configs and headers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import nn

from gteopt.build import tuning
from gteopt.build.build_time import build_seconds
from gteopt.build.calibration_texts import draw_texts, few_tokens, tokenize
from gteopt.build.layer_plan import (
    SENSITIVITY_TEXTS,
    LayerPlan,
    n_latent_parameters,
    needs_original,
    plan_layers,
    shortens,
)
from gteopt.build.quantize import ACTIVATION_BYTES
from gteopt.build.replay import BATCH_TOKENS, emulates_bfloat16, token_batches
from gteopt.build.sensitivity import DEEP_BLOCKS, N_PROBES
from gteopt.config.engines import engines_of
from gteopt.config.recipe import Calibration, GptqWeights, LayerScheme, Recipe
from gteopt.encoder.description import parse_dtype
from gteopt.encoder.skeleton import build_skeleton
from gteopt.encoder.tokenization import Tokenization
from gteopt.errors import GteoptError
from gteopt.model.checkpoint import Checkpoint
from gteopt.quant import gptq
from gteopt.quant.affine import packed_bytes
from gteopt.quant.grid import group_width
from gteopt.quant.grid_search import search_bytes
from gteopt.records.inspection import RecipeEstimate
from gteopt.vectors.codes import code_bytes

# What a build holds beside tensors of the model, in bytes a weight: codes, their spread bytes and
# the float32 weight that a portable kernel makes in each call.
_DEQUANT_BYTES = 1 + 2 + 4
_WRITE_BYTES = 2 * 256 << 20
"""Files that blocks are put together in, while they are converted."""
_KEPT_BYTES, _KEPT_SHARE, _MOST_KEPT_BYTES = 40_000_000, 0.36, 220_000_000
"""What libraries hold for themselves, and freed memory that the allocator keeps (the C library
returns only what is larger than 32 MB at once): grows with the peak up to a limit. Measured, not
derived: benchmarks/results/scale.json."""


def estimate(
    checkpoint: Checkpoint,
    recipes: Iterable[Recipe],
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    activation_bytes: int = ACTIVATION_BYTES,
    hub_dir: Path | None = None,
) -> Iterable[RecipeEstimate]:
    """Size, build memory and disk of each recipe applied to this base.

    Args:
        checkpoint: the base.
        recipes: what to estimate.
        dtype: see `quantize`.
        device: "cpu" or "cuda": whether bfloat16 is computed in float32 depends on it.
        activation_bytes: see `quantize`.
        hub_dir: where calibration data sets lie; texts that cannot be read count with the most
            tokens that the recipe allows.
    """
    item_bytes = parse_dtype(dtype).itemsize
    skeleton = build_skeleton(checkpoint)
    linears = {n: m for n, m in skeleton.named_modules() if isinstance(m, nn.Linear)}
    full_bytes = sum(p.numel() for p in skeleton.parameters()) * item_bytes
    full_bytes += n_latent_parameters(checkpoint) * item_bytes
    buffer_bytes = sum(b.numel() * b.element_size() for b in skeleton.buffers())
    padded: dict[Calibration, int] = {}
    for recipe in recipes:
        try:
            plan = plan_layers(checkpoint, recipe, skeleton)
            schemes = plan.schemes
            if recipe.calibration not in padded:
                padded[recipe.calibration] = _padded_tokens(checkpoint, recipe.calibration, hub_dir)
            if recipe.dims is not None and recipe.dims.n > checkpoint.dims:
                raise ValueError(f"the model has only {checkpoint.dims} dimensions")
        except (GteoptError, ValueError) as error:
            yield RecipeEstimate(
                recipe=recipe.name,
                summary=recipe.summary,
                weight_bytes=None,
                build_bytes=None,
                disk_bytes=None,
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
        if plan.format == "bitsandbytes":
            packed += _wider_scale_bytes(linears, schemes)
        saved = whole * item_bytes - packed
        if recipe.embedding == "int8":
            table = skeleton.get_input_embeddings().weight  # type: ignore[operator]
            saved += table.numel() * (item_bytes - 1) - 2 * len(table)
        solves = isinstance(recipe.weights, GptqWeights)
        widest = max((linears[name].in_features for name in schemes), default=0)
        sizes = _Sizes(
            skeleton=skeleton,
            full_bytes=full_bytes,
            saved_bytes=saved,
            packed_bytes=packed,
            item_bytes=item_bytes,
            replay_bytes=4 if item_bytes == 2 and emulates_bfloat16(device) else item_bytes,
            activation_bytes=activation_bytes,
            n_tokens=padded[recipe.calibration],
            on_gpu=device == "cuda",
        )
        memory = _memory(checkpoint, recipe, plan, sizes)
        yield RecipeEstimate(
            recipe=recipe.name,
            summary=recipe.summary,
            weight_bytes=full_bytes - saved + buffer_bytes,
            build_bytes=buffer_bytes + memory.host,
            device_bytes=buffer_bytes + memory.device if sizes.on_gpu else None,
            disk_bytes=_disk_bytes(checkpoint, recipe, plan, sizes),
            bytes_per_vector=_vector_bytes(checkpoint, recipe),
            build_s=build_seconds(
                recipe,
                schemes,
                {name: (each.out_features, each.in_features) for name, each in linears.items()},
                padded[recipe.calibration],
                n_choices=max((len(each) for each in plan.choices.values()), default=1),
                device=device,
            ),
            format=plan.format,
            engines=engines_of(recipe, plan.format),
            n_tokens=padded[recipe.calibration] if solves else None,
            warning=few_tokens(padded[recipe.calibration], widest) if solves else None,
            problem=None,
        )


def _wider_scale_bytes(linears: Mapping[str, nn.Linear], schemes: Mapping[str, LayerScheme]) -> int:
    """Bytes that bitsandbytes' scales of NF4 take beyond ours: it stores float32, not float16."""
    return sum(
        2
        * linears[name].weight.numel()
        // group_width(linears[name].in_features, scheme.group_size)
        for name, scheme in schemes.items()
        if scheme.number_format == "nf4" and not scheme.double_quantization
    )


def count_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of the encoder; a head that files may also hold, such as `lm_head`, is no part."""
    n_parameters = sum(p.numel() for p in build_skeleton(checkpoint).parameters())
    return n_parameters + n_latent_parameters(checkpoint)


@dataclass(frozen=True)
class _Sizes:
    """What memory and disk of a build follow from, besides recipe and plan."""

    skeleton: nn.Module
    full_bytes: int
    saved_bytes: int
    packed_bytes: int
    item_bytes: int
    replay_bytes: int
    activation_bytes: int
    n_tokens: int
    on_gpu: bool


@dataclass(frozen=True)
class _Memory:
    """Most that a build holds at once, in bytes; without a GPU the host has all of it."""

    host: int
    device: int = 0


def _padded_tokens(checkpoint: Checkpoint, spec: Calibration, hub_dir: Path | None) -> int:
    """Tokens of the calibration texts, padding included."""
    try:
        tokens = tokenize(
            Tokenization(checkpoint), draw_texts(spec, hub_dir=hub_dir), spec.max_tokens
        )
    except GteoptError:
        return spec.n_texts * spec.max_tokens
    return sum(len(batch) * max(map(len, batch)) for batch in token_batches(tokens))


def _memory(checkpoint: Checkpoint, recipe: Recipe, plan: LayerPlan, sizes: _Sizes) -> _Memory:
    """Most that a build holds: loading, one block's work, tuning, or putting files together.

    What is outside the blocks (nearly all of it the token embedding) is there all the time, a
    block's weights only in its turn. A GPU holds what is computed with, hidden states too, and the
    host what is read and written.
    """
    blocks_name = plan.blocks
    if blocks_name is None:  # the model, and its bytes while they are written
        full = sizes.full_bytes
        return _Memory(full, full) if sizes.on_gpu else _Memory(2 * full)
    module = sizes.skeleton.get_submodule(blocks_name)
    blocks = [dict(block.named_parameters()) for block in module.children()]
    in_blocks = sum(p.numel() for block in blocks for p in block.values())
    frame = sizes.full_bytes - in_blocks * sizes.item_bytes
    table = int(sizes.skeleton.get_input_embeddings().weight.numel())  # type: ignore[operator]
    read = table * _stored_item_bytes(checkpoint)
    load = frame + read
    if recipe.embedding == "int8":
        frame -= table * (sizes.item_bytes - 1)
    largest = max(range(len(blocks)), key=lambda i: sum(p.numel() for p in blocks[i].values()))
    linears = {
        f"{blocks_name}.{largest}.{name}": each
        for name, each in module[largest].named_modules()  # type: ignore[index]
        if isinstance(each, nn.Linear)
    }
    block = _block_bytes(checkpoint, recipe, plan, linears, blocks[largest], sizes)
    held = frame
    if shortens(recipe):
        held += sizes.packed_bytes
    work = held + block
    if plan.choices:
        n_block = sum(p.numel() for p in blocks[largest].values())
        measuring = _measuring_bytes(checkpoint, recipe, plan, linears, len(blocks), n_block, sizes)
        work = max(work, frame + measuring)
    written = min(_WRITE_BYTES, 2 * sizes.packed_bytes) + frame
    host = written if sizes.on_gpu else max(work, held + written)
    host += min(_KEPT_BYTES + int(_KEPT_SHARE * host), _MOST_KEPT_BYTES)
    # A mapped file leaves nothing behind.
    host, work = max(host, read if sizes.on_gpu else load), max(work, load)
    if plan.tune_by == "model":
        n_weights = sum(
            each.weight.numel()
            for name, each in sizes.skeleton.named_modules()
            if isinstance(each, nn.Linear) and name in plan.schemes
        )
        n_other = count_parameters(checkpoint) - n_weights
        n_layers = int(checkpoint.config["num_hidden_layers"])
        hidden_size = int(checkpoint.config["hidden_size"])
        tuned = frame + tuning.work_bytes(n_weights, n_other, n_layers, hidden_size)
        work, host = max(work, tuned), host if sizes.on_gpu else max(host, tuned)
    return _Memory(host, work if sizes.on_gpu else 0)


def _stored_item_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a number in the weight files: a table is mapped from them while it is converted."""
    n_numbers = sum(prod(shape) for shape in checkpoint.tensors.values())
    return max(1, round(checkpoint.stored_bytes / n_numbers))


def _disk_bytes(checkpoint: Checkpoint, recipe: Recipe, plan: LayerPlan, sizes: _Sizes) -> int:
    """Most that a build has on disk: at its end, or while hidden states lie there.

    Finished blocks stay until the artifact is whole, beside the files that another library's format
    makes of them, and beside the solver's where the model was tuned.
    """
    side = sum(path.stat().st_size for path in checkpoint.side_files)
    weights = sizes.full_bytes - sizes.saved_bytes
    if plan.blocks is None:
        return side + weights
    module = sizes.skeleton.get_submodule(plan.blocks)
    in_blocks = sum(p.numel() for p in module.parameters())
    planned = sum(
        each.weight.numel()
        for name, each in sizes.skeleton.named_modules()
        if isinstance(each, nn.Linear) and name in plan.schemes
    )
    blocks = sizes.packed_bytes + (in_blocks - planned) * sizes.item_bytes
    at_the_end = weights + side
    if plan.format != "gteopt":
        at_the_end += blocks
        if weights - blocks <= _WRITE_BYTES // 2:
            at_the_end += weights - blocks  # may be put together with blocks, not just renamed
    if plan.tune_by == "model":
        at_the_end += blocks
    if not isinstance(recipe.weights, GptqWeights):
        return at_the_end
    n_kinds = 2 if needs_original(recipe, plan) else 1
    hidden_size = int(checkpoint.config["hidden_size"])
    hidden = n_kinds * sizes.n_tokens * hidden_size * sizes.replay_bytes
    fed = 0
    n_blocks = len(list(module.children()))
    if plan.choices and n_blocks > DEEP_BLOCKS:  # all that blocks are fed, before one is finished
        fed = n_blocks * _state_bytes(checkpoint, recipe, sizes) - sizes.activation_bytes
    return max(at_the_end, blocks + max(0, hidden - sizes.activation_bytes), fed)


def _state_bytes(checkpoint: Checkpoint, recipe: Recipe, sizes: _Sizes) -> int:
    """Hidden states between two blocks of the texts that sensitivities are found on."""
    hidden_size = int(checkpoint.config["hidden_size"])
    return _sensitivity_tokens(recipe, sizes) * hidden_size * sizes.replay_bytes


def _sensitivity_tokens(recipe: Recipe, sizes: _Sizes) -> int:
    return int(sizes.n_tokens * min(1.0, SENSITIVITY_TEXTS / recipe.calibration.n_texts))


def _measuring_bytes(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: LayerPlan,
    linears: Mapping[str, nn.Linear],
    n_blocks: int,
    n_block: int,
    sizes: _Sizes,
) -> int:
    """Most that measuring sensitivities takes: a block, and the hidden states of trials; where they
    are estimated, what is fed to each block, and gradients.

    Beside them a layer is being rounded (whole, as codes, and in place), or the block runs.

    Args:
        checkpoint: the base.
        recipe: says how many texts there are.
        plan: says how many trials.
        linears: of the largest block.
        n_blocks: how many there are.
        n_block: parameters of the largest.
        sizes: of everything else.
    """
    hidden_size = int(checkpoint.config["hidden_size"])
    item = sizes.replay_bytes
    n_tokens, state = (
        _sensitivity_tokens(recipe, sizes),
        _state_bytes(checkpoint, recipe, sizes),
    )
    counts = [len(each) for each in plan.choices.values()]
    trials = max(min(sum(counts) * state, sizes.activation_bytes), max(counts) * state)
    # The base's: at the first block, where this walk began, where it is, and moving on.
    own = 4 * state
    widest = max(max(each.weight.shape) for each in linears.values())
    running = min(n_tokens, BATCH_TOKENS) * (4 * widest + 4 * hidden_size) * item
    most = max(each.weight.numel() for each in linears.values())
    rounding = (4 + 1 + 4) * most + search_bytes(most)
    if n_blocks > DEEP_BLOCKS:
        trials = min(n_blocks * state, sizes.activation_bytes) + N_PROBES * state
        own = 2 * state  # what the block gives out, as it is and with a layer rounded
        running *= 2  # kept for the way back, and on it
    return n_block * item + trials + own + max(running + item * most, rounding)


def _block_bytes(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: LayerPlan,
    linears: Mapping[str, nn.Linear],
    parameters: Mapping[str, nn.Parameter],
    sizes: _Sizes,
) -> int:
    """Most that one block's turn takes: its weights, the texts' hidden states, the solver."""
    n_parameters = sum(p.numel() for p in parameters.values())
    planned = {name: each.weight for name, each in linears.items() if name in plan.schemes}
    if not isinstance(recipe.weights, GptqWeights):
        codes = max((w.numel() for w in planned.values()), default=0)
        return n_parameters * sizes.item_bytes + 2 * codes + search_bytes(codes)
    hidden_size = int(checkpoint.config["hidden_size"])
    item = sizes.replay_bytes
    uses_gptaq = recipe.weights.gptaq_strength > 0
    n_kinds = 2 if needs_original(recipe, plan) else 1
    hidden = min(n_kinds * sizes.n_tokens * hidden_size * item, sizes.activation_bytes)
    widest = max(max(w.shape) for w in planned.values())
    n_batch = min(sizes.n_tokens, BATCH_TOKENS)
    # An MLP's gate, its activation, the other half and their product; queries, keys, values and
    # their rotations beside them.
    running = n_batch * (4 * widest + 4 * hidden_size) * item
    worst = running
    left = n_kinds * n_parameters * item
    readers = Counter(weight.shape[1] for weight in planned.values())
    for weight in planned.values():
        rows, columns = weight.shape
        n_cross_rows = 0
        if uses_gptaq:
            n_cross_rows = min(rows, columns) if readers[columns] == 1 else columns
        solving = gptq.work_bytes(rows, columns, n_cross_rows=n_cross_rows)
        seeing = 4 * columns * (columns + n_cross_rows) + running
        seeing += (3 if uses_gptaq else 1) * 4 * n_batch * columns
        worst = max(worst, left + solving, left + seeing)
        left -= weight.numel() * item - packed_bytes(rows, columns, recipe.weights.scheme)
    most = max(w.numel() for w in planned.values())
    worst = max(worst, left + running + _DEQUANT_BYTES * most)
    if plan.tune_by == "block":
        n_weights = sum(w.numel() for w in planned.values())
        n_other = n_parameters - n_weights
        worst = max(worst, left + tuning.block_work_bytes(n_weights, n_other, hidden_size))
    return hidden + worst


def _vector_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    dims = recipe.dims.n if recipe.dims else checkpoint.dims
    vectors = recipe.vectors
    if vectors.code == "auto" or vectors.code == "pq":
        assert vectors.bytes is not None
        return vectors.bytes
    return code_bytes(vectors.code, dims, vectors.bits or 1)
