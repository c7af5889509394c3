"""Quantize a model block by block: read, calibrate, solve, pack, store and free each block.

Hides: the order in which layers are solved, and how tuned values replace the solver's values.
Finished blocks are stored, so that an interrupted build can resume. Refuses to know: how codes are
found (quant/), and the rest of the artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gteopt.build.kept_states import KeptStates
from gteopt.build.layer_plan import (
    LayerPlan,
    effort_of_recipe,
    needs_original_blocks,
    shortens_vectors,
)
from gteopt.build.layers import LayerInputs, layer_memory_errors, solve_layers
from gteopt.build.output_hessians import output_hessian_path, read_output_hessians
from gteopt.build.replay import (
    Block,
    BlockInput,
    OriginalBlock,
    accumulate_hessian,
    copy_block,
    order_block_layers,
    replay_block_,
    replay_dtype,
    watch_layer_inputs,
)
from gteopt.build.smoothing import smooth_block_
from gteopt.build.st_folder import WEIGHTS
from gteopt.build.tensor_files import save_tensors
from gteopt.build.tuning import BLOCK_SCHEDULES, SCHEDULES, TuningResult, tune_block, tune_model
from gteopt.config.recipe import GptqWeights, NoWeights, Recipe, RtnWeights
from gteopt.encoder.description import RuntimeOptions
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load_checkpoint, load_weights_, unload_weights_
from gteopt.encoder.packed_weights import swap_linear_
from gteopt.errors import NumericsError
from gteopt.frozen import Frozen
from gteopt.machine import release_freed_memory
from gteopt.progress import Progress
from gteopt.quant import gptq
from gteopt.quant.affine import PARTS, PackedWeight, QuantizedWeight, pack, snr_db
from gteopt.quant.held_out_ranges import LARGEST_LOSS, fit_held_out
from gteopt.quant.smoothquant import Smoothing
from gteopt.quant.static_activations import SeenInputs
from gteopt.records.files import write_atomically
from gteopt.records.manifest import LayerRecord, SmoothingRecord, TuningRecord

SOLVED = "solved"
"""Folder of the solver's blocks before the whole model is tuned."""


@dataclass(frozen=True)
class BlockBuild:
    """The arguments that all blocks of a build share.

    Attributes:
        encoder: the model that the blocks are part of.
        recipe: the recipe of the build.
        plan: the scheme of each layer.
        devices: devices that solve layers at the same time; if empty, the encoder's device solves
            one after the other.
        progress: called after each block.
        output_hessians: folder with the files of `measure_output_hessians`; None if rows do not
            correct each other.
    """

    encoder: Encoder
    recipe: Recipe
    plan: LayerPlan
    devices: Sequence[str]
    progress: Progress
    output_hessians: Path | None = None


def quantize_blocks(
    build: BlockBuild,
    blocks: Sequence[Block],
    inputs: Sequence[BlockInput],
    shards: Path,
    kept: KeptStates,
) -> tuple[tuple[LayerRecord, ...], TuningRecord | None]:
    """Quantize one block after the other on the outputs of the quantized blocks before it.

    A block is stored as soon as it is finished. Its weights are read when its turn comes, and freed
    afterwards, unless fitting vectors needs the finished model.

    Returns:
        The manifest's records of the layers, and of tuning if each block was tuned by itself.
    """
    encoder = build.encoder
    # The original model runs beside the quantized model only if a solver compares them. A build
    # without inputs has nothing left to solve.
    compares = bool(inputs) and needs_original_blocks(build.recipe, build.plan)
    states = _States(
        quantized=inputs,
        original=[batch.copy() for batch in inputs] if compares else None,
        dtype=replay_dtype(encoder) if inputs else encoder.dtype,
    )
    batches = [*states.quantized, *(states.original or ())]
    first = kept.n_blocks(batches) if batches else 0
    if not all(block_notes_path(block_shard_path(shards, i)).is_file() for i in range(first)):
        first = 0
    if first:
        kept.restore_(batches)
    finished: list[_ShardNotes] = []
    activity = f"quantizing {encoder.checkpoint.id} with {build.recipe.name}"
    for i, block in enumerate(blocks):
        build.progress(activity, i, len(blocks))
        shard = block_shard_path(shards, i)
        feeds_next = bool(inputs) and first <= i < len(blocks) - 1
        is_stored = block_notes_path(shard).is_file()
        with layer_memory_errors(block.name):
            if is_stored:
                done, tensors = _resume_block_(build, block, states, shard, feeds_next)
            else:
                done, tensors = _make_block_(build, block, states, shard)
            if feeds_next:
                # The next block reads outputs of the stored block, whichever run has made it.
                reload_block_(encoder, block, tensors, done.layers, states.dtype)
                replay_block_(block, inputs)
            if feeds_next and not is_stored:
                kept.keep(i + 1, batches)
            if shortens_vectors(build.recipe):
                reload_block_(encoder, block, tensors, done.layers, encoder.dtype)
            else:
                unload_weights_(encoder, block.name)
        del tensors
        release_freed_memory()
        finished.append(done)
    build.progress(activity, len(blocks), len(blocks))
    tunings = [done.tuning for done in finished if done.tuning is not None]
    layers = tuple(layer for done in finished for layer in done.layers)
    return layers, _mean(tunings) if tunings else None


@dataclass
class _States:
    """The hidden states that the next block reads; they are replaced in place.

    Attributes:
        quantized: from the partly quantized model; empty if no block is replayed.
        original: from the original model; None if no solver compares with it.
        dtype: dtype in which blocks run.
        order: the linear layers of the latest block, see `_order`.
    """

    quantized: Sequence[BlockInput]
    original: Sequence[BlockInput] | None
    dtype: torch.dtype
    order: list[list[str]] = field(default_factory=list)


def _resume_block_(
    build: BlockBuild, block: Block, states: _States, shard: Path, feeds_next: bool
) -> tuple[_ShardNotes, dict[str, Tensor]]:
    """Read a block that an earlier run stored; if it feeds the next block, the original block runs.

    The original block advances the original model's hidden states.
    """
    done = _ShardNotes.model_validate_json(block_notes_path(shard).read_bytes())
    tensors = load_file(shard)
    if states.original is not None and feeds_next:
        load_weights_(build.encoder, block.name, states.dtype)
        _smooth_(build, block, states.quantized)
        replay_block_(block, states.original)
    return done, tensors


def _make_block_(
    build: BlockBuild, block: Block, states: _States, shard: Path
) -> tuple[_ShardNotes, dict[str, Tensor]]:
    """Quantize a block, tune it if the plan says so, and store it."""
    encoder = build.encoder
    load_weights_(encoder, block.name, states.dtype)
    states.order = _order(block, states.quantized, states.order)
    records, packed, original = _quantize_block_(build, block, states)
    done = _ShardNotes(layers=records)
    tensors = _shard_tensors(block, packed, encoder.dtype)
    if states.original is not None and original is not None:
        replay_block_(original, states.original)
        schedule = BLOCK_SCHEDULES[effort_of_recipe(build.recipe)]
        if build.plan.tune_by == "block" and schedule is not None:
            start = _codes(records, tensors, encoder.device)
            tuned = tune_block(original, start, states.quantized, states.original, schedule)
            weights = {name: layer.weight for name, layer in original.linears().items()}
            done = _ShardNotes(
                layers=_replace_tuned_(tensors, records, weights, tuned), tuning=tuned.record
            )
    del original  # frees its memory before the file is written
    save_tensors(shard, tensors)
    write_atomically(block_notes_path(shard), done.model_dump_json().encode())
    return done, tensors


class _ShardNotes(Frozen):
    """The records of one block's layers, or of all tuned blocks' layers.

    The file is written after the shards, so it also says that they are complete.
    """

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
    """Codes and grids of the layers whose packed tensors are in `tensors`."""
    return {
        record.name: _packed(record, tensors).unpack().to(device)
        for record in records
        if f"{record.name}.qweight" in tensors
    }


def _replace_tuned_(
    tensors: dict[str, Tensor],
    records: Sequence[LayerRecord],
    originals: Mapping[str, Tensor],
    tuned: TuningResult,
) -> tuple[LayerRecord, ...]:
    """Replace the solver's packed layers, norms and biases by the tuned ones.

    Args:
        tensors: tensors of one shard; changed in place.
        records: the manifest's records of the solver's layers.
        originals: the original weights by layer name.
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
        snr = snr_db(originals[record.name], codes.dequantize())
        # The output's ratio becomes None, because the solver measured it for its own codes.
        update = {"weight_snr_db": snr, "output_snr_db": None}
        replaced.append(record.model_copy(update=update))
    for name in tensors.keys() & tuned.rest.keys():
        tensors[name] = tuned.rest[name].to(tensors[name])
    return tuple(replaced)


def _order(block: Block, inputs: Sequence[BlockInput], earlier: list[list[str]]) -> list[list[str]]:
    """The block's linear layers in running order, by their names within the block.

    Blocks of a model are alike. If the names are those of an earlier block, its order is used
    again, which saves a forward pass.
    """
    n_prefix = len(block.name) + 1
    names = [name[n_prefix:] for name in block.linears()]
    if sorted(names) == sorted(name for group in earlier for name in group):
        return earlier
    if not inputs:
        return [names]
    return [[name[n_prefix:] for name in group] for group in order_block_layers(block, inputs)]


@torch.inference_mode()
def _quantize_block_(
    build: BlockBuild, block: Block, states: _States
) -> tuple[tuple[LayerRecord, ...], dict[str, dict[str, Tensor]], Block | None]:
    """Replace the block's linear layers by packed ones, in running order.

    Args:
        build: the arguments that all blocks share.
        block: the block, with its weights in memory.
        states: the hidden states that the block reads, and the order of its layers.

    Returns:
        The manifest's record of each layer; each layer's packed tensors and bias; and a copy of the
        original block, if the original model runs beside the quantized model.
    """
    encoder, weights = build.encoder, _weights(build)
    linears = {n: linear for n, linear in block.linears().items() if n in build.plan.schemes}
    names = list(linears)
    records: dict[str, LayerRecord] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    smoothed = _smooth_(build, block, states.quantized)
    # Copied after smoothing, because smoothing scales the inputs that both blocks must read.
    original = copy_block(block) if states.original is not None else None
    compared: OriginalBlock | None = None
    if isinstance(weights, GptqWeights) and weights.gptaq_strength > 0:
        assert original is not None
        assert states.original is not None
        compared = OriginalBlock(original, states.original)
    output_hessians: Mapping[str, Sequence[Tensor]] = {}
    if build.output_hessians is not None:
        output_hessians = read_output_hessians(
            output_hessian_path(build.output_hessians, block.name)
        )
    for group in states.order:
        wanted = [name for part in group if (name := f"{block.name}.{part}") in linears]
        if not wanted:
            continue
        inputs: LayerInputs | None = None
        if isinstance(weights, GptqWeights):
            with layer_memory_errors(wanted[0]):
                inputs = _read_inputs(block, wanted, states.quantized, compared, weights)
            release_freed_memory()  # the memory of the block's run, before the solver needs memory
        for name in wanted:
            if not gptq.is_finite(linears[name].weight):
                raise NumericsError(f"the weights of {name} hold NaN or infinity in the base")
        devices = build.devices or [str(encoder.device)]
        for name, record, codes in solve_layers(
            {name: linears[name] for name in wanted},
            *(build.plan, weights, inputs, devices, output_hessians),
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
    """The recipe's settings of quantization; a recipe without them has no blocks to quantize."""
    weights = build.recipe.weights
    assert not isinstance(weights, NoWeights)
    return weights


def _read_inputs(
    block: Block,
    layers: Sequence[str],
    inputs: Sequence[BlockInput],
    compared: OriginalBlock | None,
    weights: GptqWeights,
) -> LayerInputs:
    """Statistics of the inputs of these layers, which all read the same tensor."""
    grid, mean, loss = None, None, None
    if weights.scheme.activation_static:
        kinds = watch_layer_inputs(block, layers[0], inputs)
        linears = block.linears()
        squares = [linears[name].weight.float().square().sum(0) for name in layers]
        fitted = fit_held_out(kinds, torch.stack(squares).sum(0))
        loss = fitted.loss
        if loss <= LARGEST_LOSS:
            grid = fitted.grid
            mean = reduce(SeenInputs.union, [kind.seen for kind in kinds]).mean
    statistics = accumulate_hessian(
        block, layers[0], inputs, compared, is_alone=len(layers) == 1, grid=grid
    )
    return LayerInputs(statistics, grid, mean, static_loss=loss)


def _bias(linear: nn.Linear, codes: QuantizedWeight, inputs: LayerInputs | None) -> Tensor | None:
    """The layer's bias, which corrects the shift of the mean output (Nagel et al. 2019).

    Rounding causes that shift (arXiv:1906.04721). If the original model runs too, the mean is the
    original layer's, so that shifts of earlier layers are corrected as well. If only the inputs are
    rounded by fixed scales, it is that of the inputs before rounding.
    """
    bias: Tensor | None = linear.bias
    if bias is None or inputs is None:
        return bias
    original_mean = inputs.statistics.original_mean
    exact_inputs = inputs.mean if original_mean is None else original_mean
    if exact_inputs is None:
        return bias
    quantized_mean = codes.dequantize() @ inputs.statistics.mean
    return bias + (linear.weight.float() @ exact_inputs - quantized_mean).to(bias.dtype)


def _smooth_(build: BlockBuild, block: Block, inputs: Sequence[BlockInput]) -> dict[str, Smoothing]:
    """Smooth the block if the recipe says so; see `smooth_block_`."""
    weights = build.recipe.weights
    if not isinstance(weights, GptqWeights) or not weights.smooth:
        return {}
    model_type = str(build.encoder.checkpoint.config["model_type"])
    return smooth_block_(block, inputs, build.plan.schemes, model_type)


def _with_smoothing(record: LayerRecord, smoothing: Smoothing) -> LayerRecord:
    """The record with the smoothing of the layer's inputs."""
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
    shards = {i: load_file(block_shard_path(stage / SOLVED, i)) for i in range(len(blocks))}
    if done.is_file():
        written = _ShardNotes.model_validate_json(done.read_bytes())
    else:
        schedule = SCHEDULES[effort_of_recipe(recipe)]
        assert schedule is not None
        options = RuntimeOptions(str(encoder.device), "float32")
        teacher = load_checkpoint(encoder.checkpoint, options)
        start: dict[str, QuantizedWeight] = {}
        for tensors in shards.values():
            start |= _codes(solved, tensors, encoder.device)
        result = tune_model(teacher, start, tokens, schedule, progress=build.progress)
        originals = {
            name: module.weight
            for name, module in teacher.module.named_modules()
            if isinstance(module, nn.Linear)
        }
        layers: list[LayerRecord] = []
        for i, tensors in shards.items():
            layers += _replace_tuned_(tensors, solved, originals, result)
            save_tensors(block_shard_path(stage / WEIGHTS, i), tensors)
        written = _ShardNotes(layers=tuple(layers), tuning=result.record)
        write_atomically(done, written.model_dump_json().encode())
    if shortens_vectors(recipe):
        for i, block in enumerate(blocks):
            records = [layer for layer in written.layers if layer.name.startswith(f"{block.name}.")]
            tensors = load_file(block_shard_path(stage / WEIGHTS, i))
            reload_block_(encoder, block, tensors, records, encoder.dtype)
    assert written.tuning is not None
    return written.layers, written.tuning


def block_shard_path(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03}.safetensors"


def block_notes_path(shard: Path) -> Path:
    """The file that marks a shard as complete and holds the records of its layers."""
    return shard.with_suffix(".json")


def _packed(record: LayerRecord, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """One layer's packed weight, from the tensors of its shard."""
    names = {part: f"{record.name}.{part}" for part in PARTS}
    parts = {part: tensors[name] for part, name in names.items() if name in tensors}
    return PackedWeight.from_tensors(record.scheme, record.in_features, parts)


def _shard_tensors(
    block: Block, packed: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """All tensors of a block by their names in the model: packed layers, and the rest unchanged."""
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
    """Put a finished block into the model, so that it computes in `dtype`."""
    rest = dict(tensors)
    for record in records:
        of_layer = [name for name in rest if name.startswith(f"{record.name}.")]
        parts = {name.removeprefix(f"{record.name}."): rest.pop(name) for name in of_layer}
        bias = parts.pop("bias", None)
        packed = PackedWeight.from_tensors(record.scheme, record.in_features, parts)
        swap_linear_(encoder.module, record.name, packed, bias, encoder.device, dtype)
    plain = {n.removeprefix(f"{block.name}."): t.to(dtype) for n, t in rest.items()}
    block.module.load_state_dict(plain, strict=False, assign=True)
    block.module.to(encoder.device)
