"""Quantize linear layers: a weight and the statistics of its inputs become codes and a record.

Hides: what the manifest says about a layer, how layers share a factor, and how layers are solved at
the same time. Refuses to know: blocks, files, in which order layers are solved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gteopt.build.calibration_texts import check_calibration_tokens
from gteopt.build.layer_plan import LayerPlan
from gteopt.config.recipe import GptqWeights, LayerScheme, RtnWeights
from gteopt.errors import RESUMES, GteoptError, NumericsError, is_out_of_memory
from gteopt.quant import gptq
from gteopt.quant.affine import QuantizedWeight, pack, quantize_rtn, snr_db
from gteopt.quant.hessian import HessianAccumulator
from gteopt.quant.inverse_factor import InverseFactor
from gteopt.quant.row_feedback import RowFeedback, prepare_row_feedback
from gteopt.quant.static_activations import InputGrid
from gteopt.records.manifest import LayerRecord


@dataclass(frozen=True)
class LayerInputs:
    """Statistics of a tensor that one or more layers read.

    Attributes:
        statistics: second moment of the inputs, and the cross term if the original model runs too.
        grid: how inputs are rounded, if activations are static.
        mean: mean of the inputs before rounding, float32 [I], if activations are static.
        factor: factor of the inverse Hessian, if several layers share it.
        static_loss: see `HeldOutGrid.loss`; None if the recipe has no static activations.
        row_feedback: how the rows of one layer correct each other; None if they are independent.
    """

    statistics: HessianAccumulator
    grid: InputGrid | None = None
    mean: Tensor | None = None
    factor: InverseFactor | None = None
    static_loss: float | None = None
    row_feedback: RowFeedback | None = None

    def to(self, device: str) -> LayerInputs:
        """The statistics and the grid on another device, without the factor."""
        grid = None if self.grid is None else self.grid.to(device)
        return LayerInputs(self.statistics.to(device), grid, static_loss=self.static_loss)

    def factorised(self, name: str, weights: GptqWeights) -> LayerInputs:
        """A copy with the factor; `name` names the layer in errors."""
        try:
            factor = gptq.prepare_gptq(self.statistics.hessian, _options(weights))
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        return replace(self, factor=factor)

    def corrected_by(
        self, name: str, output_hessians: Sequence[Tensor], share: float
    ) -> LayerInputs:
        """A copy for one layer with its row feedback; `name` names the layer in errors."""
        device = self.statistics.hessian.device
        matrices = [matrix.to(device) for matrix in output_hessians]
        try:
            return replace(self, row_feedback=prepare_row_feedback(matrices, share))
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error


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
    """The codes of one weight, float32 [O, I], and the manifest's record of the layer.

    Raises:
        NumericsError: names the layer; see `gptq.solve`.
    """
    notes = [note] if note else []
    output_snr = None
    if inputs is not None and inputs.grid is not None:  # the inputs are in units of these scales
        weight = weight * inputs.grid.scale
    elif inputs is not None and inputs.static_loss is not None:
        scheme = scheme.model_copy(update={"activation_static": False})
        notes.append(
            "inputs are rounded by each token's range, because fixed scales lose "
            f"{inputs.static_loss:.1f} times as much on a kind of text that they were not fitted on"
        )
    if isinstance(weights, RtnWeights):
        codes = quantize_rtn(weight, scheme, clip_search=weights.clip_search)
    else:
        assert inputs is not None
        try:
            result = gptq.solve(
                weight,
                inputs.statistics.hessian,
                scheme,
                replace(_options(weights), row_feedback=inputs.row_feedback),
                cross_term=inputs.statistics.cross_term(weight),
                factor=inputs.factor,
            )
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error
        # A copy, because each layer stores its own grid.
        codes = replace(result.weight, inputs=copy.deepcopy(inputs.grid))
        output_snr = result.output_snr_db
        if result.damping > weights.damping:
            notes.append(f"damping raised to {result.damping:g} for the factorization")
        if too_few := check_calibration_tokens(inputs.statistics.n_rows, weight.shape[1]):
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
    output_hessians: Mapping[str, Sequence[Tensor]],
) -> Iterator[tuple[str, LayerRecord, QuantizedWeight]]:
    """Quantize layers that read the same inputs, in their order; see `quantize_layer`.

    With several devices, each has a thread, because layers do not depend on each other. On one
    device, a layer is solved when the caller asks for it. Layers on one device share the factor of
    their Hessian.

    Args:
        linears: the layers by name; a layer is removed when it is solved, so that the caller can
            free its weight.
        plan: the scheme of each layer.
        weights: the recipe's settings of quantization.
        inputs: statistics of the layers' inputs; None for a method that needs only weights.
        devices: devices that solve layers.
        output_hessians: see `prepare_row_feedback`, by layer; empty if rows are independent.
    """
    names = list(linears)
    shared: dict[str, LayerInputs] = {}

    @torch.inference_mode()  # the mode of the main thread does not hold in other threads
    def solve(name: str, device: str) -> tuple[LayerRecord, QuantizedWeight]:
        weight = linears.pop(name).weight
        note = plan.notes.get(name)
        with layer_memory_errors(name):
            if inputs is not None and device not in shared:
                shared[device] = inputs.to(device)
                if len(names) > len(devices) and isinstance(weights, GptqWeights):
                    shared[device] = shared[device].factorised(name, weights)
            given = shared.get(device)
            if given is not None and name in output_hessians:
                assert isinstance(weights, GptqWeights)
                given = given.corrected_by(name, output_hessians[name], weights.row_feedback)
            record, codes = quantize_layer(
                name, weight.to(device).float(), plan.schemes[name], weights, given, note
            )
            return record, codes.to(weight.device)

    if len(devices) == 1:
        for name in names:
            yield name, *solve(name, devices[0])
        return
    if inputs is not None:
        _ = inputs.statistics.hessian  # mirrored once, before threads share it
    for device in devices:
        # torch loads its GPU linear algebra at first use, and fails if two threads do so at the
        # same time (https://github.com/pytorch/pytorch/issues/90613).
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
def layer_memory_errors(name: str) -> Iterator[None]:
    """Turn out-of-memory errors of host or device into an error that names the layer."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if not is_out_of_memory(error):
            raise
        raise GteoptError(
            f"memory ran out at {name}; {RESUMES}. Give the build more memory (`gteopt inspect` "
            f"says how much it takes), another --device or less --activation-gb"
        ) from error
