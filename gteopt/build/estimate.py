"""Estimate memory, disk and time of a build, and the size of the artifact.

Hides: how sizes follow from shapes and from a recipe. Refuses to know: weights; it reads
configs and headers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from torch import nn

from gteopt.build import output_hessians, tuning
from gteopt.build.bit_budget import SENSITIVITY_TEXTS
from gteopt.build.build_time import estimate_build_seconds
from gteopt.build.calibration_texts import (
    check_calibration_tokens,
    count_random_texts,
    draw_calibration_texts,
    draw_random_texts,
    tokenize_calibration,
)
from gteopt.build.layer_plan import (
    LayerPlan,
    count_latent_parameters,
    needs_original_blocks,
    plan_layers,
    shortens_vectors,
)
from gteopt.build.output_hessians import N_TEXTS, output_hessian_bytes
from gteopt.build.quantize import ACTIVATION_BYTES
from gteopt.build.replay import BATCH_TOKENS, batch_replay_texts, emulates_bfloat16
from gteopt.build.sensitivity import DEEP_BLOCKS, N_PROBES
from gteopt.config.recipe import Calibration, GptqWeights, LayerScheme, Recipe
from gteopt.encoder.description import parse_dtype
from gteopt.encoder.engines import engines_of_variant
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

# Bytes for each weight that a kernel without packed products needs: the codes, the unpacked codes,
# and the float32 weight.
_DEQUANT_BYTES = 1 + 2 + 4
_WRITE_BYTES = 2 * 256 << 20
"""Memory for a file of several blocks while it is converted to another format."""
_KEPT_BYTES, _KEPT_SHARE, _MOST_KEPT_BYTES = 40_000_000, 0.36, 220_000_000
"""Memory of libraries, and freed memory that the C library's allocator keeps. It grows with the
peak up to a limit. The numbers were measured: benchmarks/results/scale.json."""


def estimate_builds(
    checkpoint: Checkpoint,
    recipes: Iterable[Recipe],
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    activation_bytes: int = ACTIVATION_BYTES,
    hub_dir: Path | None = None,
) -> Iterable[RecipeEstimate]:
    """Size, memory, disk and time of a build with each recipe on this base.

    Args:
        checkpoint: the base.
        recipes: the recipes to estimate.
        dtype: see `quantize`.
        device: "cpu" or "cuda".
        activation_bytes: see `quantize`.
        hub_dir: folder in the Hub's layout with calibration data sets. If texts cannot be read, the
            estimate uses the most tokens that the recipe allows.
    """
    base = _Base(checkpoint, build_skeleton(checkpoint), parse_dtype(dtype).itemsize)
    n_tokens: dict[tuple[Calibration, int], int] = {}
    for recipe in recipes:
        texts = recipe.calibration, count_random_texts(recipe)
        try:
            plan = plan_layers(checkpoint, recipe, base.skeleton)
            if texts not in n_tokens:
                n_tokens[texts] = _padded_tokens(checkpoint, recipe, hub_dir)
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
        build = _Build(base, recipe, plan, device, activation_bytes, n_tokens[texts])
        yield _estimate_build(build)


def _estimate_build(build: _Build) -> RecipeEstimate:
    """Size, memory, disk and time of one build that can be made."""
    base, recipe, schemes = build.base, build.recipe, build.plan.schemes
    memory = _memory(build)
    solves = isinstance(recipe.weights, GptqWeights)
    widest = max((base.linears[name].in_features for name in schemes), default=0)
    return RecipeEstimate(
        recipe=recipe.name,
        summary=recipe.summary,
        weight_bytes=base.full_bytes - build.saved_bytes + base.buffer_bytes,
        build_bytes=base.buffer_bytes + memory.host,
        device_bytes=base.buffer_bytes + memory.device if build.on_gpu else None,
        disk_bytes=_disk_bytes(build),
        bytes_per_vector=_vector_bytes(base.checkpoint, recipe),
        build_s=estimate_build_seconds(
            recipe,
            [
                (layer.out_features, layer.in_features)
                for layer in (base.linears[name] for name in schemes)
            ],
            build.n_tokens,
            n_choices=max(map(len, build.plan.choices.values()), default=1),
            gradient_tokens=_gradient_tokens(build) if build.plan.corrects_rows else 0,
            device=build.device,
        ),
        format=build.plan.format,
        engines=engines_of_variant(base.checkpoint, recipe, build.plan.format, schemes.values()),
        n_tokens=build.n_tokens if solves else None,
        warning=check_calibration_tokens(build.n_tokens, widest) if solves else None,
        problem=None,
    )


def _wider_scale_bytes(linears: Mapping[str, nn.Linear], schemes: Mapping[str, LayerScheme]) -> int:
    """More bytes that NF4's scales take in bitsandbytes' format, in float32 instead of float16."""
    return sum(
        2
        * linears[name].weight.numel()
        // group_width(linears[name].in_features, scheme.group_size)
        for name, scheme in schemes.items()
        if scheme.number_format == "nf4" and not scheme.double_quantization
    )


def count_parameters(checkpoint: Checkpoint) -> int:
    """Parameters of the encoder, without a head such as `lm_head` that the files may hold."""
    n_parameters = sum(p.numel() for p in build_skeleton(checkpoint).parameters())
    return n_parameters + count_latent_parameters(checkpoint)


@dataclass(frozen=True)
class _Base:
    """A base without its weights.

    Attributes:
        item_bytes: bytes of a weight in the dtype of the build.
    """

    checkpoint: Checkpoint
    skeleton: nn.Module
    item_bytes: int

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """Linear layers by their name in the model."""
        modules = self.skeleton.named_modules()
        return {name: module for name, module in modules if isinstance(module, nn.Linear)}

    @cached_property
    def full_bytes(self) -> int:
        """Bytes of all weights without quantization."""
        n_parameters = sum(p.numel() for p in self.skeleton.parameters())
        return (n_parameters + count_latent_parameters(self.checkpoint)) * self.item_bytes

    @cached_property
    def buffer_bytes(self) -> int:
        """Bytes of buffers, which the model computes from its config when it is loaded."""
        return sum(b.numel() * b.element_size() for b in self.skeleton.buffers())

    @property
    def hidden_size(self) -> int:
        """Features of a hidden state."""
        return int(self.checkpoint.config["hidden_size"])

    @property
    def table(self) -> nn.Parameter:
        """The token embedding's weight."""
        weight: nn.Parameter = self.skeleton.get_input_embeddings().weight  # type: ignore[operator]
        return weight


@dataclass(frozen=True)
class _Build:
    """The facts that determine memory and disk of a build.

    Attributes:
        n_tokens: tokens of the calibration texts, including padding.
    """

    base: _Base
    recipe: Recipe
    plan: LayerPlan
    device: str
    activation_bytes: int
    n_tokens: int

    @cached_property
    def n_quantized(self) -> int:
        """Weights of the layers that are quantized."""
        return sum(self.base.linears[name].weight.numel() for name in self.plan.schemes)

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of the packed layers; with a budget, the bytes that it allows."""
        linears, schemes, weights = self.base.linears, self.plan.schemes, self.recipe.weights
        if isinstance(weights, GptqWeights) and weights.budget is not None:
            n_bytes = int(self.n_quantized * weights.budget / 8)
        else:
            n_bytes = sum(
                packed_bytes(linears[name].out_features, linears[name].in_features, scheme)
                for name, scheme in schemes.items()
            )
        if self.plan.format == "bitsandbytes":
            n_bytes += _wider_scale_bytes(linears, schemes)
        return n_bytes

    @cached_property
    def saved_bytes(self) -> int:
        """How many bytes smaller the artifact's weights are than the base's."""
        saved = self.n_quantized * self.base.item_bytes - self.packed_bytes
        if self.recipe.embedding == "int8":
            table = self.base.table
            saved += table.numel() * (self.base.item_bytes - 1) - 2 * len(table)
        return saved

    @property
    def on_gpu(self) -> bool:
        """Whether the build runs on a GPU."""
        return self.device == "cuda"

    @property
    def replay_bytes(self) -> int:
        """Bytes of a number in the dtype in which blocks are replayed."""
        item_bytes = self.base.item_bytes
        return 4 if item_bytes == 2 and emulates_bfloat16(self.device) else item_bytes

    @property
    def n_hidden_kinds(self) -> int:
        """2 if the original model's hidden states are kept beside the quantized model's, else 1."""
        return 2 if needs_original_blocks(self.recipe, self.plan) else 1


def _padded_tokens(checkpoint: Checkpoint, recipe: Recipe, hub_dir: Path | None) -> int:
    """Tokens of the calibration texts, including padding."""
    spec = recipe.calibration
    try:
        tokenization = Tokenization(checkpoint)
        texts = draw_calibration_texts(spec, hub_dir=hub_dir) + draw_random_texts(
            recipe, tokenization
        )
        tokens = tokenize_calibration(tokenization, texts, spec.max_tokens)
    except GteoptError:
        return spec.n_texts * spec.max_tokens
    return sum(len(batch) * max(map(len, batch)) for batch in batch_replay_texts(tokens))


@dataclass(frozen=True)
class _Memory:
    """Peak memory of a build in bytes; without a GPU, all of it is on the host."""

    host: int
    device: int = 0


def _memory(build: _Build) -> _Memory:
    """Peak memory of a build: loading, one block's work, tuning, or writing files.

    Weights outside of the blocks, mostly the token embedding, are in memory all the time; a block's
    weights only in its turn. A GPU holds weights and hidden states in use. The host holds tensors
    that are read and written.
    """
    base, plan = build.base, build.plan
    blocks_name = plan.blocks
    if blocks_name is None:  # the model, and a copy of it while it is written
        full = base.full_bytes
        return _Memory(full, full) if build.on_gpu else _Memory(2 * full)
    modules = base.skeleton.get_submodule(blocks_name)
    sizes = [sum(p.numel() for p in block.parameters()) for block in modules.children()]
    frame = base.full_bytes - sum(sizes) * base.item_bytes
    table = base.table.numel()
    read = table * _stored_item_bytes(base.checkpoint)
    load = frame + read
    if build.recipe.embedding == "int8":
        frame -= table * (base.item_bytes - 1)
    largest = max(range(len(sizes)), key=lambda i: sizes[i])
    inside = f"{blocks_name}.{largest}."
    linears = {name: layer for name, layer in base.linears.items() if name.startswith(inside)}
    resident = frame
    if shortens_vectors(build.recipe):
        resident += build.packed_bytes
    work = resident + _block_bytes(build, linears, sizes[largest])
    if plan.choices:
        measuring = _measuring_bytes(build, linears, len(sizes), sizes[largest])
        work = max(work, frame + measuring)
    if plan.corrects_rows:
        rows = [layer.out_features for name, layer in linears.items() if name in plan.schemes]
        n_tokens = _gradient_tokens(build)
        gradients = min(n_tokens, BATCH_TOKENS) * sum(rows) * build.replay_bytes
        walking = sizes[largest] * build.replay_bytes + output_hessian_bytes(rows, item_bytes=6)
        walking += _walk_back_bytes(build, linears, n_tokens, output_hessians.N_PROBES)
        states = len(sizes) * _state_bytes(build, n_tokens)
        walking += min(states, build.activation_bytes, output_hessians.STATE_BYTES)
        work = max(work, frame + walking + gradients)
    written = min(_WRITE_BYTES, 2 * build.packed_bytes) + frame
    host = written if build.on_gpu else max(work, resident + written)
    host += min(_KEPT_BYTES + int(_KEPT_SHARE * host), _MOST_KEPT_BYTES)
    # Without the allocator's share, because a mapped file leaves no freed memory behind.
    host, work = max(host, read if build.on_gpu else load), max(work, load)
    if plan.tune_by == "model":
        n_other = count_parameters(base.checkpoint) - build.n_quantized
        n_layers = int(base.checkpoint.config["num_hidden_layers"])
        tuned = frame + tuning.estimate_tuning_bytes(
            build.n_quantized, n_other, n_layers, base.hidden_size
        )
        work, host = max(work, tuned), host if build.on_gpu else max(host, tuned)
    return _Memory(host, work if build.on_gpu else 0)


def _stored_item_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of a number in the weight files; the token table is mapped from them when it loads."""
    n_numbers = sum(prod(shape) for shape in checkpoint.tensors.values())
    return max(1, round(checkpoint.stored_bytes / n_numbers))


def _disk_bytes(build: _Build) -> int:
    """Peak disk of a build: at its end, or while hidden states are on disk.

    Finished blocks stay until the artifact is complete, beside the files of another library's
    format. If the model was tuned, the solver's blocks stay as well.
    """
    base, plan = build.base, build.plan
    side = sum(path.stat().st_size for path in base.checkpoint.side_files)
    weights = base.full_bytes - build.saved_bytes
    if plan.blocks is None:
        return side + weights
    modules = base.skeleton.get_submodule(plan.blocks)
    in_blocks = sum(p.numel() for p in modules.parameters())
    blocks = build.packed_bytes + (in_blocks - build.n_quantized) * base.item_bytes
    at_the_end = weights + side
    if plan.format != "gteopt":
        at_the_end += blocks
        if weights - blocks <= _WRITE_BYTES // 2:
            at_the_end += weights - blocks  # may be copied into a file with blocks, not renamed
    if plan.tune_by == "model":
        at_the_end += blocks
    if not isinstance(build.recipe.weights, GptqWeights):
        return at_the_end
    hidden = build.n_hidden_kinds * build.n_tokens * base.hidden_size * build.replay_bytes
    fed = gradients = 0
    n_blocks = len(list(modules.children()))
    # The inputs of all blocks, before any is finished.
    if plan.choices and n_blocks > DEEP_BLOCKS:
        fed = n_blocks * _state_bytes(build, _sensitivity_tokens(build)) - build.activation_bytes
    if plan.corrects_rows:
        rows = [base.linears[name].out_features for name in plan.schemes]
        gradients = output_hessian_bytes(rows, item_bytes=2)
        states = n_blocks * _state_bytes(build, _gradient_tokens(build))
        in_memory = min(build.activation_bytes, output_hessians.STATE_BYTES)
        fed = max(fed, gradients + max(0, states - in_memory))
    return max(at_the_end, blocks + gradients + max(0, hidden - build.activation_bytes), fed)


def _state_bytes(build: _Build, n_tokens: int) -> int:
    """Bytes of the hidden states of some tokens between two blocks."""
    return n_tokens * build.base.hidden_size * build.replay_bytes


def _sensitivity_tokens(build: _Build) -> int:
    """Tokens of the texts that sensitivities are measured on."""
    share = min(1.0, SENSITIVITY_TEXTS / build.recipe.calibration.n_texts)
    return int(build.n_tokens * share)


def _gradient_tokens(build: _Build) -> int:
    """Tokens of the texts that gradients are measured on."""
    n_texts = build.recipe.calibration.n_texts + count_random_texts(build.recipe)
    return build.n_tokens // max(1, n_texts // N_TEXTS)


def _walk_back_bytes(
    build: _Build, linears: Mapping[str, nn.Linear], n_tokens: int, n_probes: int
) -> int:
    """Peak bytes of gradients, without the block's weights and the inputs of blocks."""
    running = 2 * _running_bytes(build, linears, n_tokens)  # activations and their gradients
    return n_probes * _state_bytes(build, n_tokens) + running


def _running_bytes(build: _Build, linears: Mapping[str, nn.Linear], n_tokens: int) -> int:
    """Bytes of a block's activations for one batch."""
    widest = max(max(layer.weight.shape) for layer in linears.values())
    n_batch = min(n_tokens, BATCH_TOKENS)
    return n_batch * (4 * widest + 4 * build.base.hidden_size) * build.replay_bytes


def _measuring_bytes(
    build: _Build, linears: Mapping[str, nn.Linear], n_blocks: int, n_parameters: int
) -> int:
    """Peak bytes of measuring sensitivities: a block, and the hidden states of trials.

    If sensitivities are estimated, memory holds the input of each block and gradients instead of
    trials. At the same time a layer is rounded (original, codes and rounded weight), or the block
    runs.

    Args:
        build: the build.
        linears: linear layers of the largest block.
        n_blocks: number of blocks.
        n_parameters: parameters of the largest block.
    """
    item = build.replay_bytes
    n_tokens = _sensitivity_tokens(build)
    state = _state_bytes(build, n_tokens)
    counts = [len(schemes) for schemes in build.plan.choices.values()]
    trials = max(min(sum(counts) * state, build.activation_bytes), max(counts) * state)
    # The base's hidden states: at the first block, at the start of this walk, and at the current
    # block before and after it runs.
    base_states = 4 * state
    running = _running_bytes(build, linears, n_tokens)
    most = max(layer.weight.numel() for layer in linears.values())
    rounding = (4 + 1 + 4) * most + search_bytes(most)
    if n_blocks > DEEP_BLOCKS:
        base_states = 2 * state  # the block's output, original and with a rounded layer
        running = 0
        trials = min(n_blocks * state, build.activation_bytes)
        trials += _walk_back_bytes(build, linears, n_tokens, N_PROBES)
    return n_parameters * item + trials + base_states + max(running + item * most, rounding)


def _block_bytes(build: _Build, linears: Mapping[str, nn.Linear], n_parameters: int) -> int:
    """Peak bytes of one block's turn: its weights, the texts' hidden states, the solver."""
    weights, hidden_size = build.recipe.weights, build.base.hidden_size
    planned = [layer.weight for name, layer in linears.items() if name in build.plan.schemes]
    if not isinstance(weights, GptqWeights):
        codes = max((w.numel() for w in planned), default=0)
        return n_parameters * build.base.item_bytes + 2 * codes + search_bytes(codes)
    item = build.replay_bytes
    uses_gptaq = weights.gptaq_strength > 0
    hidden = min(build.n_hidden_kinds * build.n_tokens * hidden_size * item, build.activation_bytes)
    widest = max(max(w.shape) for w in planned)
    n_batch = min(build.n_tokens, BATCH_TOKENS)
    # An MLP's gate, its activation, the up projection and their product; beside them queries, keys,
    # values and their rotations.
    running = n_batch * (4 * widest + 4 * hidden_size) * item
    peak = running
    loaded = build.n_hidden_kinds * n_parameters * item  # weights that are not packed yet
    readers = Counter(weight.shape[1] for weight in planned)
    for weight in planned:
        rows, columns = weight.shape
        n_cross_rows = 0
        if uses_gptaq:
            n_cross_rows = min(rows, columns) if readers[columns] == 1 else columns
        solving = gptq.gptq_work_bytes(rows, columns, n_cross_rows=n_cross_rows)
        if build.plan.corrects_rows:  # the factors, and rows that wait for their turn
            solving += output_hessian_bytes([rows], item_bytes=2 + 4)
            solving += 4 * min(rows, output_hessians.MOST_OUTPUTS) * columns
        accumulating = 4 * columns * (columns + n_cross_rows) + running
        accumulating += (3 if uses_gptaq else 1) * 4 * n_batch * columns
        peak = max(peak, loaded + solving, loaded + accumulating)
        loaded -= weight.numel() * item - packed_bytes(rows, columns, weights.scheme)
    most = max(w.numel() for w in planned)
    peak = max(peak, loaded + running + _DEQUANT_BYTES * most)
    if build.plan.tune_by == "block":
        n_weights = sum(w.numel() for w in planned)
        n_other = n_parameters - n_weights
        peak = max(
            peak, loaded + tuning.estimate_block_tuning_bytes(n_weights, n_other, hidden_size)
        )
    return hidden + peak


def _vector_bytes(checkpoint: Checkpoint, recipe: Recipe) -> int:
    dims = recipe.dims.n if recipe.dims else checkpoint.dims
    vectors = recipe.vectors
    if vectors.code == "auto" or vectors.code == "pq":
        assert vectors.bytes is not None
        return vectors.bytes
    return code_bytes(vectors.code, dims, vectors.bits or 1)
