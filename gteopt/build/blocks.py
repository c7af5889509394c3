"""Each block's turn: read, calibrated, solved, packed, stored, freed.

Hides: in which order a block's layers are solved and on what, where finished blocks lie so that an
interrupted build goes on behind them, and how tuned numbers take the place of the solver's. Refuses
to know: how codes are found (quant/), what the artifact is besides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from gteopt.build.calibration_texts import few_tokens
from gteopt.build.layer_plan import LayerPlan, effort, needs_original, shortens
from gteopt.build.replay import (
    Block,
    BlockInput,
    Original,
    accumulate_hessian,
    advance_,
    copy_block,
    replay_dtype,
    stages,
    watch_inputs,
)
from gteopt.build.smoothing import smooth_block_
from gteopt.build.st_folder import WEIGHTS
from gteopt.build.tensor_files import save_tensors
from gteopt.build.tuning import BLOCK_SCHEDULES, SCHEDULES, Tuned, tune, tune_block
from gteopt.config.recipe import GptqWeights, LayerScheme, NoWeights, Recipe, RtnWeights
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import empty_, fill_, load_checkpoint
from gteopt.encoder.packed_weights import swap_linear_
from gteopt.errors import GteoptError, NumericsError, is_out_of_memory
from gteopt.frozen import Frozen
from gteopt.machine import give_back
from gteopt.progress import Progress
from gteopt.quant import gptq
from gteopt.quant.affine import PARTS, PackedWeight, QuantizedWeight, pack, quantize_rtn, snr_db
from gteopt.quant.hessian import HessianAccumulator
from gteopt.quant.inverse_factor import InverseFactor
from gteopt.quant.smoothquant import Smoothing
from gteopt.quant.static_activations import InputGrid, fit_inputs
from gteopt.records.files import write_atomically
from gteopt.records.manifest import LayerRecord, SmoothingRecord, TuningRecord

SOLVED = "solved"
"""Where the solver's blocks lie while they wait for tuning."""


@dataclass(frozen=True)
class BlockBuild:
    """What all blocks of a build have in common.

    Attributes:
        encoder: the model that the blocks are part of.
        recipe: what is built.
        plan: says the layers' schemes.
        devices: where layers are solved side by side; none for one after the other.
        progress: told after each block.
    """

    encoder: Encoder
    recipe: Recipe
    plan: LayerPlan
    devices: Sequence[str]
    progress: Progress


def quantize_blocks(
    build: BlockBuild, blocks: Sequence[Block], inputs: Sequence[BlockInput], shards: Path
) -> tuple[tuple[LayerRecord, ...], TuningRecord | None]:
    """Quantize block after block, each on the outputs of those before it; store each at once.

    A block's weights are read when its turn comes and freed after it, unless the finished model is
    needed to fit vectors.

    Returns:
        What the manifest says of the layers, and of tuning where each block was tuned by itself.
    """
    encoder, recipe, plan = build.encoder, build.recipe, build.plan
    weights = recipe.weights
    assert not isinstance(weights, NoWeights)
    layers: list[LayerRecord] = []
    tunings: list[TuningRecord] = []
    dtype = replay_dtype(encoder) if inputs else encoder.dtype
    # What the original model feeds each block, where something is to make up for the difference.
    # Without inputs nothing is left to solve.
    compares = bool(inputs) and needs_original(recipe, plan)
    exact = [batch.copy() for batch in inputs] if compares else None
    schedule = BLOCK_SCHEDULES[effort(recipe)] if plan.tune_by == "block" else None
    what = f"quantizing {encoder.checkpoint.id} with {recipe.name}"
    order: list[list[str]] = []
    for i, block in enumerate(blocks):
        build.progress(what, i, len(blocks))
        shard = shard_path(shards, i)
        notes = notes_path(shard)
        is_last = i + 1 == len(blocks)
        with memory_errors(block.name):
            if notes.is_file():
                done = _Done.model_validate_json(notes.read_bytes())
                tensors = load_file(shard)
                if exact is not None and not is_last:
                    fill_(encoder, block.name, dtype)
                    _smooth_(encoder, block, inputs, weights, plan)
                    advance_(block, exact)
            else:
                fill_(encoder, block.name, dtype)
                order = _order(block, inputs, order)
                records, packed, original = _quantize_block_(
                    build, block, inputs, exact, order, dtype
                )
                done = _Done(layers=records)
                tensors = _shard_tensors(block, packed, encoder.dtype)
                if exact is not None and original is not None:
                    advance_(original, exact)
                    if schedule is not None:
                        start = _codes(records, tensors, encoder.device)
                        result = tune_block(original, start, inputs, exact, schedule)
                        whole = {n: each.weight for n, each in original.linears().items()}
                        taken = _take_(tensors, records, whole, result)
                        done = _Done(layers=taken, tuning=result.record)
                del original
                save_tensors(shard, tensors)
                write_atomically(notes, done.model_dump_json().encode())
            if inputs and not is_last:
                # What is stored is what later blocks see, whether made now or by an earlier run.
                reload_block_(encoder, block, tensors, done.layers, dtype)
                advance_(block, inputs)
            if shortens(recipe):
                reload_block_(encoder, block, tensors, done.layers, encoder.dtype)
            else:
                empty_(encoder, block.name)
        del tensors
        give_back()
        layers += done.layers
        tunings += [] if done.tuning is None else [done.tuning]
    build.progress(what, len(blocks), len(blocks))
    return tuple(layers), _mean(tunings) if tunings else None


class _Done(Frozen):
    """Written when the shards that it speaks of are there, a block's or all tuned ones."""

    layers: tuple[LayerRecord, ...]
    tuning: TuningRecord | None = None


def _mean(blocks: Sequence[TuningRecord]) -> TuningRecord:
    """One record of blocks of one shape that were tuned alike."""
    means = {
        field: sum(getattr(each, field) for each in blocks) / len(blocks)
        for field in ("error_before", "error_after", "codes_changed")
    }
    return blocks[0].model_copy(update=means)


def _codes(
    records: Sequence[LayerRecord], tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, QuantizedWeight]:
    """Codes and grid of those layers whose packed tensors are among these."""
    return {
        each.name: _packed(each, tensors).unpack().to(device)
        for each in records
        if f"{each.name}.qweight" in tensors
    }


def _take_(
    tensors: dict[str, Tensor],
    records: Sequence[LayerRecord],
    whole: Mapping[str, Tensor],
    tuned: Tuned,
) -> tuple[LayerRecord, ...]:
    """Put what was tuned in the place of what the solver left: packed layers, norms and biases.

    Args:
        tensors: of one shard; changed in place.
        records: what the manifest says of the solver's layers.
        whole: the weights as they were, by the layers' names.
        tuned: what tuning found.

    Returns:
        The records of the layers in this shard.
    """
    taken = []
    for each in records:
        if f"{each.name}.qweight" not in tensors:
            continue
        codes = tuned.weights[each.name]
        parts = pack(codes).to_tensors()
        tensors |= {f"{each.name}.{part}": t.cpu() for part, t in parts.items()}
        snr = snr_db(whole[each.name], codes.dequantize())
        # What the solver had measured on the layer's output holds no longer.
        update = {"weight_snr_db": snr, "output_snr_db": None}
        taken.append(each.model_copy(update=update))
    for name in tensors.keys() & tuned.rest.keys():
        tensors[name] = tuned.rest[name].to(tensors[name])
    return tuple(taken)


def _order(block: Block, inputs: Sequence[BlockInput], known: list[list[str]]) -> list[list[str]]:
    """The block's linear layers by their names within it, stage by stage where inputs are replayed.

    Blocks of a model are alike: what is known of an earlier one holds while the names are the same,
    which spares a forward pass.
    """
    within = len(block.name) + 1
    names = [name[within:] for name in block.linears()]
    if sorted(names) == sorted(name for stage in known for name in stage):
        return known
    if not inputs:
        return [names]
    return [[name[within:] for name in stage] for stage in stages(block, inputs)]


@contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """Memory that ran out, on the device or off it, as an error that names the layer."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if not is_out_of_memory(error):
            raise
        raise GteoptError(
            f"memory ran out at {name}; finished blocks are kept, and the same command goes on "
            f"from there. Give it more memory (`gteopt inspect` says how much a build takes), "
            f"another --device or less --activation-gb"
        ) from error


@torch.inference_mode()
def _quantize_block_(
    build: BlockBuild,
    block: Block,
    inputs: Sequence[BlockInput],
    exact: Sequence[BlockInput] | None,
    order: Sequence[Sequence[str]],
    dtype: torch.dtype,
) -> tuple[tuple[LayerRecord, ...], dict[str, dict[str, Tensor]], Block | None]:
    """Replace the block's linear layers by packed ones, in running order.

    Args:
        build: what all blocks have in common.
        block: its weights are there.
        inputs: what the model, quantized up to here, feeds the block.
        exact: what the original model does, where something is to make up for the difference.
        order: its linear layers as `stages` has them, by their names within the block.
        dtype: what the block runs in.

    Returns:
        What the manifest says of each layer, each layer's packed tensors and bias, and the block as
        it was where `exact` is given.
    """
    encoder, plan, weights = build.encoder, build.plan, build.recipe.weights
    assert not isinstance(weights, NoWeights)
    linears = {name: linear for name, linear in block.linears().items() if name in plan.schemes}
    names = list(linears)
    records: dict[str, LayerRecord] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    chosen = _smooth_(encoder, block, inputs, weights, plan)
    # Smoothing has moved numbers between layers by now: both blocks read the same.
    original = copy_block(block) if exact is not None else None
    compared: Original | None = None
    if isinstance(weights, GptqWeights) and weights.gptaq_strength > 0:
        assert original is not None
        assert exact is not None
        compared = Original(original, exact)
    for stage in order:
        within_model = [f"{block.name}.{name}" for name in stage]
        wanted = [name for name in within_model if name in linears]
        if not wanted:
            continue
        read, seen = None, None
        if isinstance(weights, GptqWeights):
            with memory_errors(wanted[0]):
                grid = None
                if weights.scheme.activation_static:
                    seen = watch_inputs(block, wanted[0], inputs)
                    grid = fit_inputs(seen)
                statistics = accumulate_hessian(
                    block, wanted[0], inputs, compared, is_alone=len(wanted) == 1, grid=grid
                )
                read = LayerInputs(statistics, grid)
                del statistics
            give_back()  # what the block's run took, before the solve takes its own
        for name in wanted:
            if not gptq.is_finite(linears[name].weight):
                raise NumericsError(f"the weights of {name} hold NaN or infinity in the base")
        here = build.devices or [str(encoder.device)]
        for name, record, codes in _solve(wanted, linears, plan, weights, read, here):
            linear, records[name] = linears[name], record
            if name in chosen:
                records[name] = _with_smoothing(records[name], chosen[name])
            packed_weight = pack(codes)
            packed[name] = packed_weight.to_tensors()
            bias: Tensor | None = linear.bias
            if bias is not None:
                if seen is not None and read is not None:
                    # What rounding does to the mean output (Nagel et al. 2019, arXiv:1906.04721).
                    meant = linear.weight.float() @ seen.mean
                    is_now = codes.dequantize() @ read.statistics.mean
                    bias = bias + (meant - is_now).to(bias.dtype)
                packed[name]["bias"] = bias
            swap_linear_(encoder.module, name, packed_weight, bias, encoder.device, dtype)
            del linear, linears[name]  # frees the weight
    return tuple(records[name] for name in names), packed, original


def _smooth_(
    encoder: Encoder,
    block: Block,
    inputs: Sequence[BlockInput],
    weights: RtnWeights | GptqWeights,
    plan: LayerPlan,
) -> dict[str, Smoothing]:
    """Smooth the block where the recipe says so; see `smooth_block_`."""
    if not isinstance(weights, GptqWeights) or not weights.smooth:
        return {}
    model_type = str(encoder.checkpoint.config["model_type"])
    return smooth_block_(block, inputs, plan.schemes, model_type)


def _solve(
    wanted: Sequence[str],
    linears: Mapping[str, nn.Linear],
    plan: LayerPlan,
    weights: RtnWeights | GptqWeights,
    inputs: LayerInputs | None,
    devices: Sequence[str],
) -> Iterator[tuple[str, LayerRecord, QuantizedWeight]]:
    """Layers that read the same inputs, in order, each as `quantize_layer` has it.

    With several devices a thread for each: layers know nothing of each other. With one, a layer is
    solved when it is asked for, so that its weight may be freed before the next one's turn. Layers
    on one device share the factor of their Hessian.
    """
    shared: dict[str, LayerInputs] = {}

    @torch.inference_mode()  # which is a thread's own
    def solve(name: str, device: str) -> tuple[LayerRecord, QuantizedWeight]:
        weight = linears[name].weight
        note = plan.notes.get(name)
        with memory_errors(name):
            if inputs is not None and device not in shared:
                shared[device] = inputs.to(device)
                if len(wanted) > len(devices) and isinstance(weights, GptqWeights):
                    shared[device] = shared[device].factorised(name, weights)
            record, codes = quantize_layer(
                name,
                weight.to(device).float(),
                plan.schemes[name],
                weights,
                shared.get(device),
                note,
            )
            return record, codes.to(weight.device)

    if len(devices) == 1:
        for name in wanted:
            yield name, *solve(name, devices[0])
        return
    if inputs is not None:
        _ = inputs.statistics.hessian  # mirrored once, before threads share it
    for device in devices:
        # torch loads its GPU algebra at first use, and fails where two threads do so at once
        # (https://github.com/pytorch/pytorch/issues/90613).
        torch.linalg.cholesky_ex(torch.eye(1, device=device))
    with ExitStack() as stack:
        pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in devices]
        futures = [
            pools[i % len(devices)].submit(solve, name, devices[i % len(devices)])
            for i, name in enumerate(wanted)
        ]
        for name, future in zip(wanted, futures, strict=True):
            yield name, *future.result()


def _with_smoothing(record: LayerRecord, found: Smoothing) -> LayerRecord:
    """The record with what was decided on the layer's inputs."""
    return record.model_copy(
        update={
            "smoothing": SmoothingRecord(
                strength=found.strength,
                error_before=found.error_before,
                error_after=found.error_after,
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
    """Tune what the solver left, and write it as the shards that the artifact is made from.

    Until every one of those is there tuning starts again from the solver's.
    """
    encoder, recipe = build.encoder, build.recipe
    done = stage / WEIGHTS / "tuned.json"
    shards = {i: load_file(shard_path(stage / SOLVED, i)) for i in range(len(blocks))}
    if done.is_file():
        found = _Done.model_validate_json(done.read_bytes())
    else:
        schedule = SCHEDULES[effort(recipe)]
        assert schedule is not None
        teacher = load_checkpoint(encoder.checkpoint, device=str(encoder.device), dtype="float32")
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
            layers += _take_(tensors, solved, whole, result)
            save_tensors(shard_path(stage / WEIGHTS, i), tensors)
        found = _Done(layers=tuple(layers), tuning=result.record)
        write_atomically(done, found.model_dump_json().encode())
    if shortens(recipe):
        for i, block in enumerate(blocks):
            records = [each for each in found.layers if each.name.startswith(f"{block.name}.")]
            tensors = load_file(shard_path(stage / WEIGHTS, i))
            reload_block_(encoder, block, tensors, records, encoder.dtype)
    assert found.tuning is not None
    return found.layers, found.tuning


def shard_path(folder: Path, block: int) -> Path:
    return folder / f"block-{block:03}.safetensors"


def notes_path(shard: Path) -> Path:
    """Where it says that a shard is whole and what is in it."""
    return shard.with_suffix(".json")


def _packed(record: LayerRecord, tensors: Mapping[str, Tensor]) -> PackedWeight:
    """One layer's packed weight among the tensors of its shard."""
    own = {part: f"{record.name}.{part}" for part in PARTS if f"{record.name}.{part}" in tensors}
    return PackedWeight.from_tensors(
        record.scheme, record.in_features, {part: tensors[name] for part, name in own.items()}
    )


@dataclass(frozen=True)
class LayerInputs:
    """What is known of the inputs of layers that read the same.

    Attributes:
        statistics: their second moment, and the cross term where the original model is compared.
        grid: how they are rounded, where activations are static.
        factor: of the inverse Hessian, where several layers share it.
    """

    statistics: HessianAccumulator
    grid: InputGrid | None = None
    factor: InverseFactor | None = None

    def to(self, device: str) -> LayerInputs:
        """The same on another device, without the factor."""
        grid = None if self.grid is None else self.grid.to(device)
        return LayerInputs(self.statistics.to(device), grid)

    def factorised(self, name: str, weights: GptqWeights) -> LayerInputs:
        """The same with the factor; `name` is the layer that an error speaks of."""
        try:
            factor = gptq.prepare(self.statistics.hessian, _options(weights))
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        return replace(self, factor=factor)


def _options(weights: GptqWeights) -> gptq.GptqOptions:
    return gptq.GptqOptions(
        act_order=weights.act_order,
        damping=weights.damping,
        clip_search=weights.clip_search,
        gptaq_strength=weights.gptaq_strength,
    )


def quantize_layer(
    name: str,
    weight: Tensor,
    scheme: LayerScheme,
    weights: RtnWeights | GptqWeights,
    inputs: LayerInputs | None,
    note: str | None,
) -> tuple[LayerRecord, QuantizedWeight]:
    """Codes of one weight matrix [O, I] float32 and what the manifest says of them.

    Raises:
        NumericsError: names the layer; see `gptq.solve`.
    """
    notes = [note] if note else []
    output_snr = None
    if inputs is not None and inputs.grid is not None:  # inputs come in units of its scales
        weight = weight * inputs.grid.scale
    if isinstance(weights, RtnWeights):
        codes = quantize_rtn(weight, scheme, clip_search=weights.clip_search)
    else:
        assert inputs is not None
        try:
            result = gptq.solve(
                weight,
                inputs.statistics.hessian,
                scheme,
                _options(weights),
                cross_term=inputs.statistics.cross_term(weight),
                factor=inputs.factor,
            )
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        # A copy: layers that read the same inputs are stored each for itself.
        codes = replace(result.weight, inputs=copy.deepcopy(inputs.grid))
        output_snr = result.output_snr_db
        if result.damping > weights.damping:
            notes.append(f"damping raised to {result.damping:g} for the factorisation")
        if too_few := few_tokens(inputs.statistics.n_rows, weight.shape[1]):
            notes.append(too_few)
        if result.n_dead:
            notes.append(f"{result.n_dead} input features never active in calibration")
    return (
        LayerRecord(
            name=name,
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            method=weights.method,
            scheme=scheme,
            bits_per_weight=pack(codes).bits_per_weight,
            weight_snr_db=snr_db(weight, codes.dequantize()),
            output_snr_db=output_snr,
            note="; ".join(notes) or None,
        ),
        codes,
    )


def _shard_tensors(
    block: Block, packed: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Everything of one block by its name in the model: packed layers and what stays as it is."""
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
    for each in records:
        own = [name for name in rest if name.startswith(f"{each.name}.")]
        parts = {name.removeprefix(f"{each.name}."): rest.pop(name) for name in own}
        bias = parts.pop("bias", None)
        packed = PackedWeight.from_tensors(each.scheme, each.in_features, parts)
        swap_linear_(encoder.module, each.name, packed, bias, encoder.device, dtype)
    plain = {n.removeprefix(f"{block.name}."): t.to(dtype) for n, t in rest.items()}
    block.module.load_state_dict(plain, strict=False, assign=True)
    block.module.to(encoder.device)
