"""Measures which product each quantized layer of a model should use on this processor.

Hides: the workloads, the choice, the file of measured times. Refuses to know: models, files of
weights. Weights are random, because the time of a product does not depend on them.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Literal, TypeVar

import torch
from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path
from torch import Tensor, nn

from gteopt.config.recipe import LayerScheme
from gteopt.errors import InputError, IntegrityError, suggest_names
from gteopt.frozen import Frozen
from gteopt.kernels.cpu import (
    INT8_PRODUCTS,
    CpuProducts,
    DecodedLinearCpu,
    Int8LinearCpu,
    StaticInt8LinearCpu,
    exact_products,
    multiplies_bfloat16,
)
from gteopt.kernels.cpu_int4 import AS_PACKED, CODES, EACH_CALL, KEPT, Int4LinearCpu
from gteopt.machine import describe_machine
from gteopt.quant.affine import PackedWeight
from gteopt.quant.grid import group_width
from gteopt.quant.packing import packed_width
from gteopt.quant.static_activations import InputGrid
from gteopt.records.files import read_record, write_record

_Input = TypeVar("_Input")
_DECODED = "decoded"
_FEW, _MANY = 16, 1024
"""Tokens of the two workloads; a large layer is measured with fewer than the second."""
_LEAST_MANY = 256
_MANY_WORK = 1 << 30
"""Multiplications of the second workload, which limit its tokens: a 7B model takes seconds."""
_RUNS, _RUN_S = 7, 0.1
"""A product runs this often, or for this long, whichever ends first."""
_SECOND_COPY = 1.5
"""Two products keep two copies of a weight. They are used if one alone is so many times slower."""
_CLEARLY = 1.15
"""Decoded weights take twice the memory and round differently. They are used if they are so many
times faster."""
_MEMORY_SHARE = 8
"""Decoded weights and second copies may take one part in so many of the machine's memory."""
_LOCK_S = 120


@dataclass(frozen=True)
class MeasuredLayer:
    """The properties of a quantized layer that decide its speed."""

    scheme: LayerScheme
    out_features: int
    in_features: int

    def key(self, dtype: torch.dtype) -> str:
        """The layer's key in the stored times."""
        shape = f"{self.out_features}x{self.in_features} {str(dtype).removeprefix('torch.')}"
        scheme = self.scheme
        if scheme.activation_bits == 16:
            return f"{scheme.number_format}{scheme.bits} in groups of {self._group} {shape}"
        rounding = "static" if scheme.activation_static else "by token"
        zeros = "" if scheme.activation_symmetric else " with zero points"
        return f"int8 {rounding}{zeros} {shape}"

    def without_data(self) -> PackedWeight:
        """Its weight on the meta device."""
        return self._weight(lambda *shape: torch.empty(shape, dtype=torch.uint8, device="meta"))

    def random(self) -> PackedWeight:
        """A weight of its shape and scheme with random codes."""
        generator = torch.Generator().manual_seed(0)
        # A byte of 8-bit floats that is no number has all bits of 0x7f set.
        end = 0x7F if self.scheme.number_format == "e4m3" else 256
        return self._weight(
            lambda *shape: torch.randint(0, end, shape, dtype=torch.uint8, generator=generator)
        )

    @property
    def _group(self) -> int:
        return group_width(self.in_features, self.scheme.group_size)

    def _weight(self, codes: Callable[..., Tensor]) -> PackedWeight:
        """A weight whose tensors of bytes are made by their shape."""
        scheme, rows = self.scheme, self.out_features
        inputs: InputGrid | None = None
        qweight = codes(rows, packed_width(self.in_features, scheme.bits))
        n_groups = self.in_features // self._group
        if scheme.activation_static:
            ones = torch.ones(self.in_features, device=qweight.device)
            inputs = InputGrid(ones / 32, ones * 128)
        return PackedWeight(
            qweight=qweight,
            scale=torch.full((rows, n_groups), 0.01, dtype=torch.float16, device=qweight.device),
            qzero=None if scheme.symmetric else codes(rows, packed_width(n_groups, scheme.bits)),
            scheme=scheme,
            in_features=self.in_features,
            inputs=inputs,
        )


class LayerTimes(Frozen):
    """Microseconds by what computes, for few and for many tokens."""

    few: dict[str, float]
    many: dict[str, float]


class KernelTimes(Frozen):
    """Times measured on one processor, with one version of torch and one number of threads.

    Attributes:
        layers: times by `MeasuredLayer.key`, or by the key of another comparison.
    """

    schema_: Literal["gteopt.kernels/1"] = "gteopt.kernels/1"
    processor: str
    torch: str
    n_threads: int
    layers: dict[str, LayerTimes]


@dataclass(frozen=True)
class KernelWays:
    """Which product each layer uses. Layers that are not named use the first one of this torch.

    Attributes:
        products: of int8 and 4-bit layers by `MeasuredLayer.key`; None decodes the weights once.
        decodes: whether all other quantized weights are decoded once too.
        packs: whether unquantized layers keep a second copy of their weight in oneDNN's order, if
            memory holds it.
    """

    products: Mapping[str, CpuProducts | None] = field(default_factory=dict)
    decodes: bool = False
    packs: bool = False

    @property
    def rounding(self) -> str:
        """Layers whose results may have other bits; all int8 products give the same."""
        decoded = [key for key, products in self.products.items() if products is None]
        four_bits = [
            f"{key} by {products}"
            for key, products in self.products.items()
            if products is not None and products.few not in INT8_PRODUCTS
        ]
        others = ["others"] if self.decodes else []
        dense = ["unquantized layers packed"] if self.packs else []
        return ", ".join([*sorted(decoded + four_bits), *others, *dense])


DETERMINISTIC = KernelWays()
"""Nothing is measured: weights stay packed, and use the first product that torch has."""


def choose_kernel_ways(
    layers: Iterable[MeasuredLayer], dtype: torch.dtype, choice: str, *, folder: Path | None = None
) -> KernelWays:
    """The ways of a model's layers on this CPU.

    Args:
        layers: all quantized layers of the model, with repetitions.
        dtype: dtype of the model.
        choice: "measured", "deterministic", "decoded", or a product of `INT8_PRODUCTS`.
        folder: where times are stored; None uses the Hub client's folder for assets.

    Raises:
        InputError: the choice is unknown, or this machine lacks the product.
    """
    if choice == "deterministic" or dtype == torch.float64:
        return DETERMINISTIC
    all_layers = list(layers)
    counts = Counter(layer.key(dtype) for layer in all_layers if _is_int8(layer.scheme))
    int8 = {layer.key(dtype): layer for layer in all_layers if _is_int8(layer.scheme)}
    int4 = {layer.key(dtype): layer for layer in all_layers if _is_int4(layer, dtype)}
    if choice == "decoded":
        return KernelWays(dict.fromkeys([*int8, *int4]), decodes=True)
    if choice in exact_products():
        return KernelWays(dict.fromkeys(int8, CpuProducts(choice, choice)))
    if choice != "measured":
        allowed = ["measured", "deterministic", _DECODED, *exact_products()]
        raise InputError(
            f"unknown kernels '{choice}' for this CPU: {suggest_names(choice, allowed)}"
        )
    if not exact_products():
        int8, counts = {}, Counter()
    times = measured_layer_times({**int8, **int4}, dtype, folder)
    widest = max(dtype.itemsize, 2 if multiplies_bfloat16() else 4)
    decoded_bytes = widest * sum(layer.out_features * layer.in_features for layer in all_layers)
    may_grow = memory_holds_copies(decoded_bytes)
    four_bits = {key: pick_int4(times[key], may_grow=may_grow) for key in int4}
    chosen = {key: products for key, products in four_bits.items() if products != AS_PACKED}
    if may_grow and decoding_wins(counts, times):
        return KernelWays({**dict.fromkeys(int8), **chosen}, decodes=True, packs=True)
    packed = {key: pick_int8(times[key], may_grow=may_grow) for key in int8}
    return KernelWays({**packed, **chosen}, decodes=may_grow, packs=True)


def memory_holds_copies(n_bytes: int) -> bool:
    """Whether layers may hold this many bytes in copies or in decoded weights.

    All memory counts, not free memory, because all processes of a machine must choose alike.
    """
    return n_bytes * _MEMORY_SHARE <= describe_machine().memory_bytes


def pick_int8(times: LayerTimes, *, may_grow: bool = True) -> CpuProducts:
    """The fastest products of an int8 layer.

    Args:
        times: the layer's times, with at least one product.
        may_grow: whether the layer may keep a copy of its weight for each of two products.
    """
    names = [name for name in times.few if name != _DECODED]
    few, many = min(names, key=times.few.__getitem__), min(names, key=times.many.__getitem__)

    def slowdown(name: str) -> float:
        return max(times.few[name] / times.few[few], times.many[name] / times.many[many])

    one = min(names, key=slowdown)
    return (
        CpuProducts(few, many)
        if may_grow and slowdown(one) > _SECOND_COPY
        else CpuProducts(one, one)
    )


def pick_int4(times: LayerTimes, *, may_grow: bool = True) -> CpuProducts | None:
    """The products of a 4-bit layer, of which none is slower than the decoded weight's.

    Args:
        times: of `CODES`, `EACH_CALL` and the decoded weight.
        may_grow: whether the layer may hold its decoded weight.

    Returns:
        The products; None decodes the weight once, and drops the codes.
    """
    few, many = times.few, times.many
    smallest = CpuProducts(CODES, min((CODES, EACH_CALL), key=many.__getitem__))
    if not may_grow:
        return smallest
    if many[smallest.many] <= _CLEARLY * many[_DECODED]:
        return None if few[CODES] > _CLEARLY * few[_DECODED] else smallest
    return CpuProducts(CODES, KEPT) if _CLEARLY * few[CODES] < few[_DECODED] else None


def decoding_wins(counts: Mapping[str, int], times: Mapping[str, LayerTimes]) -> bool:
    """Whether a model is clearly faster with all its int8 weights decoded.

    There is one decision for few and many tokens and for all layers. Otherwise, a text's vector
    would depend on its batch.

    Args:
        counts: number of the model's layers by key.
        times: times of a layer by key.
    """
    packed_few = packed_many = decoded_few = decoded_many = 0.0
    for key, n in counts.items():
        layer, products = times[key], pick_int8(times[key])
        packed_few += n * layer.few[products.few]
        packed_many += n * layer.many[products.many]
        decoded_few += n * layer.few[_DECODED]
        decoded_many += n * layer.many[_DECODED]
    return packed_few * packed_many > _CLEARLY**2 * decoded_few * decoded_many


def measured_layer_times(
    layers: Mapping[str, MeasuredLayer], dtype: torch.dtype, folder: Path | None = None
) -> dict[str, LayerTimes]:
    """Times of layers by key; layers without stored times are measured, and their times stored."""
    comparisons = {
        key: KernelComparison(frozenset(_makers(layer, dtype)), partial(_measure, layer, dtype))
        for key, layer in layers.items()
    }
    return measured_times(comparisons, folder)


@dataclass(frozen=True)
class KernelComparison:
    """Candidates that compute the same.

    Attributes:
        names: names of all candidates.
        measure: measures the time of each candidate.
    """

    names: frozenset[str]
    measure: Callable[[], LayerTimes]


def measured_times(
    comparisons: Mapping[str, KernelComparison], folder: Path | None = None
) -> dict[str, LayerTimes]:
    """Times of comparisons by key; those without stored times are measured, and stored.

    One process measures at a time, so that all processes choose alike.

    Args:
        comparisons: comparisons by key. The key stands for everything that the times depend on,
            except for processor, threads and torch.
        folder: where times are stored; None uses the Hub client's folder for assets.
    """
    if not comparisons:
        return {}
    known = KernelTimes(
        processor=describe_machine().cpu,
        torch=str(torch.__version__),
        n_threads=torch.get_num_threads(),
        layers={},
    )
    folder = folder or cached_assets_path("gteopt", "kernels")
    name = sha256(known.model_dump_json().encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}.json"

    def lacking(kept: Mapping[str, LayerTimes]) -> list[str]:
        none = LayerTimes(few={}, many={})
        return [
            n
            for n, wanted in comparisons.items()
            if not wanted.names <= kept.get(n, none).few.keys()
        ]

    kept = _read(path, known)
    if not lacking(kept):
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_S):
            kept = _read(path, known)
            kept |= {key: comparisons[key].measure() for key in lacking(kept)}
            write_record(path, known.model_copy(update={"layers": kept}))
    except (OSError, Timeout) as error:
        warnings.warn(
            f"{path}: the times of kernels cannot be kept ({error}); every process measures anew",
            stacklevel=2,
        )
        kept = _of_this_process(path)
        kept |= {key: comparisons[key].measure() for key in lacking(kept)}
    return kept


@lru_cache
def _of_this_process(path: Path) -> dict[str, LayerTimes]:
    """Times that cannot be stored in a file, so that all loads of this process choose alike."""
    return {}


def _read(path: Path, expected: KernelTimes) -> dict[str, LayerTimes]:
    """The times in a file; empty if the file is damaged or belongs to another processor."""
    if not path.exists():
        return {}
    try:
        stored = read_record(path, KernelTimes)
    except IntegrityError as error:
        warnings.warn(f"{error}; kernels are measured anew", stacklevel=3)
        return {}
    if stored.model_copy(update={"layers": {}}) != expected:
        warnings.warn(
            f"{path}: holds times of {stored.processor}, torch {stored.torch}, {stored.n_threads} "
            f"threads; kernels are measured anew",
            stacklevel=3,
        )
        return {}
    return dict(stored.layers)


def _is_int8(scheme: LayerScheme) -> bool:
    return (
        scheme.number_format == "int"
        and (scheme.bits, scheme.activation_bits) == (8, 8)
        and scheme.activation_outliers is None
    )


def _is_int4(layer: MeasuredLayer, dtype: torch.dtype) -> bool:
    wide = layer.scheme.activation_bits == 16
    return wide and Int4LinearCpu.fits(layer.without_data(), dtype)


def _makers(
    layer: MeasuredLayer, dtype: torch.dtype
) -> dict[str, Callable[[PackedWeight], nn.Module]]:
    """Makers of an int8 or 4-bit layer by each product, and of the decoded one."""
    makers: dict[str, Callable[[PackedWeight], nn.Module]] = {}
    if _is_int8(layer.scheme):
        kind = StaticInt8LinearCpu if layer.scheme.activation_static else Int8LinearCpu
        for name in exact_products():
            makers[name] = _maker(kind, CpuProducts(name, name))
    else:
        for name in (CODES, EACH_CALL):
            makers[name] = _maker(Int4LinearCpu, CpuProducts(CODES, name))
    makers[_DECODED] = lambda weight: DecodedLinearCpu(weight, None, dtype)
    return makers


def _maker(
    kind: type[Int8LinearCpu] | type[StaticInt8LinearCpu] | type[Int4LinearCpu],
    products: CpuProducts,
) -> Callable[[PackedWeight], nn.Module]:
    return lambda weight: kind(weight, None, products)


def _measure(layer: MeasuredLayer, dtype: torch.dtype) -> LayerTimes:
    """Times of a layer by each product, with rounding of activations and scaling of results."""
    weight = layer.random()
    many = min(_MANY, max(_LEAST_MANY, _MANY_WORK // (layer.out_features * layer.in_features)))
    slow = dtype == torch.bfloat16 and not multiplies_bfloat16()
    inputs = [
        torch.randn(n, layer.in_features).to(torch.float32 if slow else dtype) for n in (_FEW, many)
    ]
    times: dict[str, list[float]] = {}
    for name, make in _makers(layer, dtype).items():
        module = make(weight)  # one at a time, so that a large weight is in memory once
        times[name] = [kernel_microseconds(module, x) - _saved(module, x) for x in inputs]
    return LayerTimes(
        few={name: few for name, (few, _) in times.items()},
        many={name: many for name, (_, many) in times.items()},
    )


def _saved(layer: nn.Module, x: Tensor) -> float:
    """Half the time that rounding the input takes.

    Layers with the same input, such as query, key and value, share it within a model.
    """
    return kernel_microseconds(layer.quantize, x) / 2 if isinstance(layer, Int8LinearCpu) else 0.0


def kernel_microseconds(call: Callable[[_Input], object], x: _Input) -> float:
    """The time of the fastest of a few calls, because other processes only make calls slower."""
    times: list[float] = []
    with torch.inference_mode():
        call(x)
        while len(times) < _RUNS and (len(times) < 2 or sum(times) < _RUN_S):
            start = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - start)
    return round(min(times) * 1e6, 2)
