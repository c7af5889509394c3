"""Measures which product each quantized layer of a model should use on this processor.

Hides: the workloads, the choice, the file with the times. Refuses to know: models, files of
weights. Weights are random, because the time of a product does not depend on them.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import torch
from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path
from torch import Tensor, nn

from gteopt.config.recipe import LayerScheme
from gteopt.errors import InputError, IntegrityError, suggest
from gteopt.frozen import Frozen
from gteopt.kernels.cpu import (
    DecodedLinearCpu,
    Int8LinearCpu,
    Products,
    StaticInt8LinearCpu,
    exact_products,
    multiplies_bfloat16,
)
from gteopt.machine import machine
from gteopt.quant.affine import PackedWeight
from gteopt.quant.static_activations import InputGrid
from gteopt.records.files import read_record, write_record

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
class Layer:
    """The properties of a quantized layer that decide its speed."""

    scheme: LayerScheme
    out_features: int
    in_features: int

    def key(self, dtype: torch.dtype) -> str:
        """The layer's key in the stored times."""
        rounding = "static" if self.scheme.activation_static else "by token"
        zeros = "" if self.scheme.activation_symmetric else " with zero points"
        kind = str(dtype).removeprefix("torch.")
        return f"int8 {rounding}{zeros} {self.out_features}x{self.in_features} {kind}"


class LayerTimes(Frozen):
    """Microseconds of a layer by its product, for few and for many tokens."""

    few: dict[str, float]
    many: dict[str, float]


class KernelTimes(Frozen):
    """Times measured on one processor, with one version of torch and one number of threads."""

    schema_: Literal["gteopt.kernels/1"] = "gteopt.kernels/1"
    processor: str
    torch: str
    n_threads: int
    layers: dict[str, LayerTimes]


@dataclass(frozen=True)
class Ways:
    """Which product each layer uses. Layers that are not named use the first one of this torch.

    Attributes:
        int8: products of int8 layers by `Layer.key`; None decodes the weights once.
        decodes: whether weights other than 8-bit and 4-bit integers are decoded once too.
    """

    int8: Mapping[str, Products | None] = field(default_factory=dict)
    decodes: bool = False

    @property
    def rounding(self) -> str:
        """The decoded layers; all int8 products give the same bits."""
        decoded = sorted(key for key, products in self.int8.items() if products is None)
        return ", ".join([*decoded, *(["others"] if self.decodes else [])])


DETERMINISTIC = Ways()
"""Nothing is measured: weights stay packed, and use the first product that torch has."""


def ways_for(
    layers: Iterable[Layer], dtype: torch.dtype, choice: str, *, folder: Path | None = None
) -> Ways:
    """The ways of a model's layers on this CPU.

    Args:
        layers: all quantized layers of the model, with repetitions.
        dtype: dtype of the model.
        choice: "measured", "deterministic", "decoded", or a product of `INT8_PRODUCTS`.
        folder: where times are stored; None uses the Hub client's folder for assets.

    Raises:
        InputError: the choice is unknown, or this machine lacks the product.
    """
    all_layers = list(layers)
    counts = Counter(layer.key(dtype) for layer in all_layers if _is_int8(layer.scheme))
    int8 = {layer.key(dtype): layer for layer in all_layers if _is_int8(layer.scheme)}
    if choice == "deterministic" or dtype == torch.float64:
        return DETERMINISTIC
    if choice == "decoded":
        return Ways(dict.fromkeys(int8), decodes=True)
    if choice in exact_products():
        return Ways(dict.fromkeys(int8, Products(choice, choice)))
    if choice != "measured":
        allowed = ["measured", "deterministic", _DECODED, *exact_products()]
        raise InputError(f"unknown kernels '{choice}' for this CPU: {suggest(choice, allowed)}")
    if not exact_products():
        int8 = {}
    times = kept_times(int8, dtype, folder) if int8 else {}
    # All memory counts, not free memory, because all processes of a machine must choose alike.
    decoded_bytes = dtype.itemsize * sum(
        layer.out_features * layer.in_features for layer in all_layers
    )
    may_grow = decoded_bytes * _MEMORY_SHARE <= machine().memory_bytes
    if may_grow and decoding_wins(counts, times):
        return Ways(dict.fromkeys(int8), decodes=True)
    return Ways({key: pick(times[key], may_grow=may_grow) for key in int8}, decodes=may_grow)


def pick(times: LayerTimes, *, may_grow: bool = True) -> Products:
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
    return Products(few, many) if may_grow and slowdown(one) > _SECOND_COPY else Products(one, one)


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
        layer, products = times[key], pick(times[key])
        packed_few += n * layer.few[products.few]
        packed_many += n * layer.many[products.many]
        decoded_few += n * layer.few[_DECODED]
        decoded_many += n * layer.many[_DECODED]
    return packed_few * packed_many > _CLEARLY**2 * decoded_few * decoded_many


def kept_times(
    layers: Mapping[str, Layer], dtype: torch.dtype, folder: Path | None = None
) -> dict[str, LayerTimes]:
    """Times of layers by key; layers without stored times are measured, and their times stored.

    One process measures at a time, so that all processes choose alike.
    """
    known = KernelTimes(
        processor=machine().cpu,
        torch=str(torch.__version__),
        n_threads=torch.get_num_threads(),
        layers={},
    )
    folder = folder or cached_assets_path("gteopt", "kernels")
    name = sha256(known.model_dump_json().encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}.json"
    kept = _read(path, known)
    if layers.keys() <= kept.keys():
        return kept
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_S):
            kept = _read(path, known)
            kept |= {
                key: _measure(layer, dtype) for key, layer in layers.items() if key not in kept
            }
            write_record(path, known.model_copy(update={"layers": kept}))
    except (OSError, Timeout) as error:
        warnings.warn(
            f"{path}: the times of kernels cannot be kept ({error}); every load measures anew",
            stacklevel=2,
        )
        kept |= {key: _measure(layer, dtype) for key, layer in layers.items() if key not in kept}
    return kept


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
    names = set(exact_products())
    return {key: times for key, times in stored.layers.items() if names <= times.few.keys()}


def _is_int8(scheme: LayerScheme) -> bool:
    return (
        scheme.number_format == "int"
        and (scheme.bits, scheme.activation_bits) == (8, 8)
        and scheme.activation_outliers is None
    )


def _measure(layer: Layer, dtype: torch.dtype) -> LayerTimes:
    """Times of a layer by each product, with rounding of activations and scaling of results."""
    weight = _random(layer)
    kind = StaticInt8LinearCpu if layer.scheme.activation_static else Int8LinearCpu
    makers: dict[str, Callable[[], nn.Module]] = {
        name: _maker(kind, weight, Products(name, name)) for name in exact_products()
    }
    makers[_DECODED] = lambda: DecodedLinearCpu(weight, None, dtype)
    many = min(_MANY, max(_LEAST_MANY, _MANY_WORK // (layer.out_features * layer.in_features)))
    slow = dtype == torch.bfloat16 and not multiplies_bfloat16()
    inputs = [
        torch.randn(n, layer.in_features).to(torch.float32 if slow else dtype) for n in (_FEW, many)
    ]
    times: dict[str, list[float]] = {}
    for name, make in makers.items():  # one at a time, so that a large weight is in memory once
        module = make()
        times[name] = [_microseconds(module, x) - _saved(module, x) for x in inputs]
    return LayerTimes(
        few={name: few for name, (few, _) in times.items()},
        many={name: many for name, (_, many) in times.items()},
    )


def _maker(
    kind: type[Int8LinearCpu] | type[StaticInt8LinearCpu], weight: PackedWeight, products: Products
) -> Callable[[], nn.Module]:
    return lambda: kind(weight, None, products)


def _saved(layer: nn.Module, x: Tensor) -> float:
    """Half the time that rounding the input takes.

    Layers with the same input, such as query, key and value, share it within a model.
    """
    return _microseconds(layer.quantize, x) / 2 if isinstance(layer, Int8LinearCpu) else 0.0


def _microseconds(call: Callable[[Tensor], object], x: Tensor) -> float:
    """The time of the fastest of a few calls, because other processes only make calls slower."""
    times: list[float] = []
    with torch.inference_mode():
        call(x)
        while len(times) < _RUNS and (len(times) < 2 or sum(times) < _RUN_S):
            start = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - start)
    return round(min(times) * 1e6, 2)


def _random(layer: Layer) -> PackedWeight:
    shape = layer.out_features, layer.in_features
    generator = torch.Generator().manual_seed(0)
    inputs = None
    if layer.scheme.activation_static:
        ones = torch.ones(layer.in_features)
        inputs = InputGrid(ones / 32, ones * 128)
    return PackedWeight(
        qweight=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        scale=torch.full((layer.out_features, 1), 0.01, dtype=torch.float16),
        qzero=None,
        scheme=layer.scheme,
        in_features=layer.in_features,
        inputs=inputs,
    )
