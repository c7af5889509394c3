"""Quantize a model block by block: read, calibrate, solve, pack, store and free each one.

Hides: the order in which layers are solved, and how tuned values replace the solver's. Finished
blocks are stored, so that an interrupted build can resume. Refuses to know: how codes are found
(quant/), and the rest of the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gteopt.build.kept_states import KeptStates
from gteopt.build.layer_plan import LayerPlan, effort, needs_original, shortens
from gteopt.build.layers import LayerInputs, memory_errors, solve_layers
from gteopt.build.replay import (
    Block,
    BlockInput,
    Original,
    accumulate_hessian,
    advance_,
    copy_block,
    replay_dtype,
    running_order,
    watch_inputs,
)
from gteopt.build.smoothing import smooth_block_
from gteopt.build.st_folder import WEIGHTS
from gteopt.build.tensor_files import save_tensors
from gteopt.build.tuning import BLOCK_SCHEDULES, SCHEDULES, Tuned, tune, tune_block
from gteopt.config.recipe import GptqWeights, NoWeights, Recipe, RtnWeights
from gteopt.encoder.description import RuntimeOptions
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import empty_, fill_, load_checkpoint
from gteopt.encoder.packed_weights import swap_linear_
from gteopt.errors import NumericsError
from gteopt.frozen import Frozen
from gteopt.machine import give_back
from gteopt.progress import Progress
from gteopt.quant import gptq
from gteopt.quant.affine import PARTS, PackedWeight, QuantizedWeight, pack, snr_db
from gteopt.quant.smoothquant import Smoothing
from gteopt.quant.static_activations import fit_inputs
from gteopt.records.files import write_atomically
from gteopt.records.manifest import LayerRecord, SmoothingRecord, TuningRecord

SOLVED = "solved"
"""Folder of the solver's blocks while they wait for tuning."""


@dataclass(frozen=True)
class BlockBuild:
    """What all blocks of a build have in common.

    Attributes:
        encoder: the model that the blocks are part of.
        recipe: what is built.
        plan: says the layers' schemes.
        devices: where layers are solved side by side; empty solves one after the other.
        progress: told after each block.
    """

    encoder: Encoder
    recipe: Recipe
    plan: LayerPlan
    devices: Sequence[str]
    progress: Progress


def quantize_blocks(
    build: BlockBuild,
    blocks: Sequence[Block],
    inputs: Sequence[BlockInput],
    shards: Path,
    kept: KeptStates,
) -> tuple[tuple[LayerRecord, ...], TuningRecord | None]:
    """Quantize block after block, each on the outputs of those before it; store each at once.

    A block's weights are read when its turn comes and freed after it, unless the finished model is
    needed to fit vectors.

    Returns:
        What the manifest says of the layers, and of tuning where each block was tuned by itself.
    """
    encoder = build.encoder
    # The original model runs beside the quantized one only where a solver compares them. A build
    # without inputs has nothing left to solve.
    compares = bool(inputs) and needs_original(build.recipe, build.plan)
    states = _States(
        quantized=inputs,
        original=[batch.copy() for batch in inputs] if compares else None,
        dtype=replay_dtype(encoder) if inputs else encoder.dtype,
    )
    batches = [*states.quantized, *(states.original or ())]
    first = kept.n_blocks(batches) if batches else 0
    if not all(notes_path(shard_path(shards, i)).is_file() for i in range(first)):
        first = 0
    if first:
        kept.restore_(batches)
    finished: list[_ShardNotes] = []
    what = f"quantizing {encoder.checkpoint.id} with {build.recipe.name}"
    for i, block in enumerate(blocks):
        build.progress(what, i, len(blocks))
        shard = shard_path(shards, i)
        moves = bool(inputs) and first <= i < len(blocks) - 1
        was_made = notes_path(shard).is_file()
        with memory_errors(block.name):
            if was_made:
                done, tensors = _resume_block_(build, block, states, shard, moves)
            else:
                done, tensors = _make_block_(build, block, states, shard)
            if moves:
                # Later blocks see what is stored, whether this run made it or an earlier one.
                reload_block_(encoder, block, tensors, done.layers, states.dtype)
                advance_(block, inputs)
            if moves and not was_made:
                kept.keep(i + 1, batches)
            if shortens(build.recipe):
                reload_block_(encoder, block, tensors, done.layers, encoder.dtype)
            else:
                empty_(encoder, block.name)
        del tensors
        give_back()
        finished.append(done)
    build.progress(what, len(blocks), len(blocks))
    tunings = [done.tuning for done in finished if done.tuning is not None]
    layers = tuple(layer for done in finished for layer in done.layers)
    return layers, _mean(tunings) if tunings else None


@dataclass
class _States:
    """What the next block is fed; both kinds of hidden states move on in place.

    Attributes:
        quantized: by the model as it is quantized so far; empty where nothing is replayed.
        original: by the original model; None where no solver compares with it.
        dtype: what blocks run in.
        order: the linear layers of the latest block, see `_order`.
    """

    quantized: Sequence[BlockInput]
    original: Sequence[BlockInput] | None
    dtype: torch.dtype
    order: list[list[str]] = field(default_factory=list)


def _resume_block_(
    build: BlockBuild, block: Block, states: _States, shard: Path, moves: bool
) -> tuple[_ShardNotes, dict[str, Tensor]]:
    """Read what an earlier run made of a block; the original model's states move on if asked."""
    done = _ShardNotes.model_validate_json(notes_path(shard).read_bytes())
    tensors = load_file(shard)
    if states.original is not None and moves:
        fill_(build.encoder, block.name, states.dtype)
        _smooth_(build, block, states.quantized)
        advance_(block, states.original)
    return done, tensors


def _make_block_(
    build: BlockBuild, block: Block, states: _States, shard: Path
) -> tuple[_ShardNotes, dict[str, Tensor]]:
    """Quantize a block, tune it where the plan says so, and store it."""
    encoder = build.encoder
    fill_(encoder, block.name, states.dtype)
    states.order = _order(block, states.quantized, states.order)
    records, packed, original = _quantize_block_(build, block, states)
    done = _ShardNotes(layers=records)
    tensors = _shard_tensors(block, packed, encoder.dtype)
    if states.original is not None and original is not None:
        advance_(original, states.original)
        schedule = BLOCK_SCHEDULES[effort(build.recipe)]
        if build.plan.tune_by == "block" and schedule is not None:
            start = _codes(records, tensors, encoder.device)
            tuned = tune_block(original, start, states.quantized, states.original, schedule)
            weights = {name: layer.weight for name, layer in original.linears().items()}
            done = _ShardNotes(
                layers=_replace_tuned_(tensors, records, weights, tuned), tuning=tuned.record
            )
    del original  # freed before the file is written
    save_tensors(shard, tensors)
    write_atomically(notes_path(shard), done.model_dump_json().encode())
    return done, tensors


class _ShardNotes(Frozen):
    """The layers of one block's shard, or of all tuned shards; written after the shards."""

    layers: tuple[LayerRecord, ...]
    tuning: TuningRecord | None = None


def _mean(blocks: Sequence[TuningRecord]) -> TuningRecord:
    """The mean record of blocks that have one shape and were tuned with one schedule."""
    means = {
        field: sum(getattr(record, field) for record in blocks) / len(blocks)
        for field in ("error_before", "error_after", "codes_changed")
    }
    return blocks[0].model_copy(update=means)


def _codes(
    records: Sequence[LayerRecord], tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, QuantizedWeight]:
    """Codes and grids of the layers whose packed tensors are among these."""
    return {
        record.name: _packed(record, tensors).unpack().to(device)
        for record in records
        if f"{record.name}.qweight" in tensors
    }


def _replace_tuned_(
    tensors: dict[str, Tensor],
    records: Sequence[LayerRecord],
    whole: Mapping[str, Tensor],
    tuned: Tuned,
) -> tuple[LayerRecord, ...]:
    """Replace the solver's packed layers, norms and biases by the tuned ones.

    Args:
        tensors: of one shard; changed in place.
        records: the manifest's records of the solver's layers.
        whole: the original weights by layer name.
        tuned: the result of tuning.

    Returns:
        The records of the layers in this shard.
    """
    replaced = []
    for record in records:
        if f"{record.name}.qweight" not in tensors:
            continue
        codes = tuned.weights[record.name]
        parts = pack(codes).to_tensors()
        tensors |= {f"{record.name}.{part}": t.cpu() for part, t in parts.items()}
        snr = snr_db(whole[record.name], codes.dequantize())
        # The solver measured the output of its own codes.
        update = {"weight_snr_db": snr, "output_snr_db": None}
        replaced.append(record.model_copy(update=update))
    for name in tensors.keys() & tuned.rest.keys():
        tensors[name] = tuned.rest[name].to(tensors[name])
    return tuple(replaced)


def _order(block: Block, inputs: Sequence[BlockInput], known: list[list[str]]) -> list[list[str]]:
    """The block's linear layers by their names within it, see `running_order`.

    Blocks of a model are alike. The order of an earlier block is used again while the names are
    equal, which saves a forward pass.
    """
    within = len(block.name) + 1
    names = [name[within:] for name in block.linears()]
    if sorted(names) == sorted(name for group in known for name in group):
        return known
    if not inputs:
        return [names]
    return [[name[within:] for name in group] for group in running_order(block, inputs)]


@torch.inference_mode()
def _quantize_block_(
    build: BlockBuild, block: Block, states: _States
) -> tuple[tuple[LayerRecord, ...], dict[str, dict[str, Tensor]], Block | None]:
    """Replace the block's linear layers by packed ones, in running order.

    Args:
        build: what all blocks have in common.
        block: its weights are in memory.
        states: what the block is fed, and the order of its layers.

    Returns:
        The manifest's record of each layer, each layer's packed tensors and bias, and the original
        block if the original model runs beside the quantized one.
    """
    encoder, weights = build.encoder, _weights(build)
    linears = {n: linear for n, linear in block.linears().items() if n in build.plan.schemes}
    names = list(linears)
    records: dict[str, LayerRecord] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    smoothed = _smooth_(build, block, states.quantized)
    # Copied after smoothing, which scales inputs, so that both blocks read the same features.
    original = copy_block(block) if states.original is not None else None
    compared: Original | None = None
    if isinstance(weights, GptqWeights) and weights.gptaq_strength > 0:
        assert original is not None
        assert states.original is not None
        compared = Original(original, states.original)
    for group in states.order:
        wanted = [name for part in group if (name := f"{block.name}.{part}") in linears]
        if not wanted:
            continue
        inputs: LayerInputs | None = None
        if isinstance(weights, GptqWeights):
            with memory_errors(wanted[0]):
                inputs = _read_inputs(block, wanted, states.quantized, compared, weights)
            give_back()  # what the block's run took, before the solver takes its own
        for name in wanted:
            if not gptq.is_finite(linears[name].weight):
                raise NumericsError(f"the weights of {name} hold NaN or infinity in the base")
        devices = build.devices or [str(encoder.device)]
        for name, record, codes in solve_layers(
            {name: linears[name] for name in wanted}, build.plan, weights, inputs, devices
        ):
            linear = linears.pop(name)
            records[name] = record
            if name in smoothed:
                records[name] = _with_smoothing(record, smoothed[name])
            packed_weight = pack(codes)
            packed[name] = packed_weight.to_tensors()
            bias = _bias(linear, codes, inputs)
            if bias is not None:
                packed[name]["bias"] = bias
            swap_linear_(encoder.module, name, packed_weight, bias, encoder.device, states.dtype)
            del linear  # frees the weight
    return tuple(records[name] for name in names), packed, original


def _weights(build: BlockBuild) -> RtnWeights | GptqWeights:
    """How the recipe quantizes; a build without that has no blocks to quantize."""
    weights = build.recipe.weights
    assert not isinstance(weights, NoWeights)
    return weights


def _read_inputs(
    block: Block,
    layers: Sequence[str],
    inputs: Sequence[BlockInput],
    compared: Original | None,
    weights: GptqWeights,
) -> LayerInputs:
    """Statistics of what these layers read, which is the same for all of them."""
    grid, mean = None, None
    if weights.scheme.activation_static:
        seen = watch_inputs(block, layers[0], inputs)
        grid, mean = fit_inputs(seen), seen.mean
    statistics = accumulate_hessian(
        block, layers[0], inputs, compared, is_alone=len(layers) == 1, grid=grid
    )
    return LayerInputs(statistics, grid, mean)


def _bias(linear: nn.Linear, codes: QuantizedWeight, inputs: LayerInputs | None) -> Tensor | None:
    """The layer's bias; static activations add what rounding does to the mean output.

    Nagel et al. 2019, arXiv:1906.04721.
    """
    bias: Tensor | None = linear.bias
    if bias is None or inputs is None or inputs.mean is None:
        return bias
    meant = linear.weight.float() @ inputs.mean
    is_now = codes.dequantize() @ inputs.statistics.mean
    return bias + (meant - is_now).to(bias.dtype)


def _smooth_(build: BlockBuild, block: Block, inputs: Sequence[BlockInput]) -> dict[str, Smoothing]:
    """Smooth the block where the recipe says so; see `smooth_block_`."""
    weights = build.recipe.weights
    if not isinstance(weights, GptqWeights) or not weights.smooth:
        return {}
    model_type = str(build.encoder.checkpoint.config["model_type"])
    return smooth_block_(block, inputs, build.plan.schemes, model_type)


def _with_smoothing(record: LayerRecord, smoothing: Smoothing) -> LayerRecord:
    """The record with what was decided on the layer's inputs."""
    return record.model_copy(
        update={
            "smoothing": SmoothingRecord(
                strength=smoothing.strength,
                error_before=smoothing.error_before,
                error_after=smoothing.error_after,
            )
        }
    )


def tune_blocks(
    build: BlockBuild,
    blocks: Sequence[Block],
    solved: Sequence[LayerRecord],
    tokens: Sequence[Sequence[int]],
    stage: Path,
) -> tuple[tuple[LayerRecord, ...], TuningRecord]:
    """Tune the whole model from the solver's codes, and write the shards of the artifact.

    An interrupted tuning starts again from the solver's shards.
    """
    encoder, recipe = build.encoder, build.recipe
    done = stage / WEIGHTS / "tuned.json"
    shards = {i: load_file(shard_path(stage / SOLVED, i)) for i in range(len(blocks))}
    if done.is_file():
        written = _ShardNotes.model_validate_json(done.read_bytes())
    else:
        schedule = SCHEDULES[effort(recipe)]
        assert schedule is not None
        options = RuntimeOptions(str(encoder.device), "float32")
        teacher = load_checkpoint(encoder.checkpoint, options)
        start: dict[str, QuantizedWeight] = {}
        for tensors in shards.values():
            start |= _codes(solved, tensors, encoder.device)
        result = tune(teacher, start, tokens, schedule, progress=build.progress)
        whole = {
            name: module.weight
            for name, module in teacher.module.named_modules()
            if isinstance(module, nn.Linear)
        }
        layers: list[LayerRecord] = []
        for i, tensors in shards.items():
            layers += _replace_tuned_(tensors, solved, whole, result)
            save_tensors(shard_path(stage / WEIGHTS, i), tensors)
        written = _ShardNotes(layers=tuple(layers), tuning=result.record)
        write_atomically(done, written.model_dump_json().encode())
    if shortens(recipe):
        for i, block in enumerate(blocks):
            records = [layer for layer in written.layers if layer.name.startswith(f"{block.name}.")]
            tensors = load_file(shard_path(stage / WEIGHTS, i))
            reload_block_(encoder, block, tensors, records, encoder.dtype)
    assert written.tuning is not None
    return written.layers, written.tuning


def shard_path(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03}.safetensors"


def notes_path(shard: Path) -> Path:
    """The file that says that a shard is complete, and what it holds."""
    return shard.with_suffix(".json")


def _packed(record: LayerRecord, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """One layer's packed weight among the tensors of its shard."""
    own = {part: f"{record.name}.{part}" for part in PARTS if f"{record.name}.{part}" in tensors}
    return PackedWeight.from_tensors(
        record.scheme, record.in_features, {part: tensors[name] for part, name in own.items()}
    )


def _shard_tensors(
    block: Block, packed: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of a block by their names in the model: packed layers, all else unchanged."""
    tensors = {
        f"{layer}.{part}": tensor.to(dtype) if part == "bias" else tensor
        for layer, parts in packed.items()
        for part, tensor in parts.items()
    }
    for name, tensor in block.module.state_dict().items():
        layer = f"{block.name}.{name}".rpartition(".")[0]
        if layer not in packed:
            tensors[f"{block.name}.{name}"] = tensor.to(dtype)
    return {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}


def reload_block_(
    encoder: Encoder,
    block: Block,
    tensors: Mapping[str, Tensor],
    records: Sequence[LayerRecord],
    dtype: torch.dtype,
) -> None:
    """Put a finished block into the model, to compute in `dtype`."""
    rest = dict(tensors)
    for record in records:
        own = [name for name in rest if name.startswith(f"{record.name}.")]
        parts = {name.removeprefix(f"{record.name}."): rest.pop(name) for name in own}
        bias = parts.pop("bias", None)
        packed = PackedWeight.from_tensors(record.scheme, record.in_features, parts)
        swap_linear_(encoder.module, record.name, packed, bias, encoder.device, dtype)
    plain = {n.removeprefix(f"{block.name}."): t.to(dtype) for n, t in rest.items()}
    block.module.load_state_dict(plain, strict=False, assign=True)
    block.module.to(encoder.device)
