"""Quantize one linear layer: its weight and what it reads become codes and a record.

Hides: what the manifest says of a layer, how layers share a factor, and how they are solved side by
side. Refuses to know: blocks, files, in which order layers are solved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gteopt.build.calibration_texts import few_tokens
from gteopt.build.layer_plan import LayerPlan
from gteopt.config.recipe import GptqWeights, LayerScheme, RtnWeights
from gteopt.errors import GteoptError, NumericsError, is_out_of_memory
from gteopt.quant import gptq
from gteopt.quant.affine import QuantizedWeight, pack, quantize_rtn, snr_db
from gteopt.quant.hessian import HessianAccumulator
from gteopt.quant.inverse_factor import InverseFactor
from gteopt.quant.static_activations import InputGrid
from gteopt.records.manifest import LayerRecord


@dataclass(frozen=True)
class LayerInputs:
    """What is known of the inputs of layers that read the same.

    Attributes:
        statistics: their second moment, and the cross term where the original model is compared.
        grid: how they are rounded, where activations are static.
        mean: their mean [I] float32 before rounding, where activations are static.
        factor: of the inverse Hessian, where several layers share it.
    """

    statistics: HessianAccumulator
    grid: InputGrid | None = None
    mean: Tensor | None = None
    factor: InverseFactor | None = None

    def to(self, device: str) -> LayerInputs:
        """What solving takes, on another device, without the factor."""
        grid = None if self.grid is None else self.grid.to(device)
        return LayerInputs(self.statistics.to(device), grid)

    def factorised(self, name: str, weights: GptqWeights) -> LayerInputs:
        """The same with the factor; an error names the layer `name`."""
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
    if inputs is not None and inputs.grid is not None:  # inputs are in units of its scales
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
        # A copy, because each layer stores a grid of its own.
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


def solve_layers(
    linears: dict[str, nn.Linear],
    plan: LayerPlan,
    weights: RtnWeights | GptqWeights,
    inputs: LayerInputs | None,
    devices: Sequence[str],
) -> Iterator[tuple[str, LayerRecord, QuantizedWeight]]:
    """Quantize layers that read the same inputs, in their order; see `quantize_layer`.

    Several devices have a thread each, since layers do not depend on each other. On one device, a
    layer is solved when the caller asks for it. Layers on one device share the factor of their
    Hessian.

    Args:
        linears: the layers by name; each leaves the dictionary when it is solved, so that the
            caller can free its weight.
        plan: says the layers' schemes.
        weights: how the recipe quantizes.
        inputs: what the layers read; None for a method that looks at weights alone.
        devices: where layers are solved.
    """
    names = list(linears)
    shared: dict[str, LayerInputs] = {}

    @torch.inference_mode()  # each thread has a mode of its own
    def solve(name: str, device: str) -> tuple[LayerRecord, QuantizedWeight]:
        weight = linears.pop(name).weight
        note = plan.notes.get(name)
        with memory_errors(name):
            if inputs is not None and device not in shared:
                shared[device] = inputs.to(device)
                if len(names) > len(devices) and isinstance(weights, GptqWeights):
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
        for name in names:
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
            for i, name in enumerate(names)
        ]
        for name, future in zip(names, futures, strict=True):
            yield name, *future.result()


@contextmanager
def memory_errors(name: str) -> Iterator[None]:
    """Turn errors about memory, on the device or off it, into one that names the layer."""
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
