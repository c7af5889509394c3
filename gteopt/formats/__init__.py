"""Convert packed weights to the tensors and `config.json` entries of other libraries, and back.

Hides: how each library names, transposes and packs codes, scales and zero points. Refuses to know:
models and files; tensors in, tensors out. Specified in artifacts/README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from gteopt.config.recipe import FormatChoice, FormatName, LayerScheme
from gteopt.errors import (
    InputError,
    UnsupportedError,
    join_problems,
    shorten_value,
    suggest_names,
)
from gteopt.formats import bitsandbytes, compressed_tensors, gptq
from gteopt.formats.packed import Config, LinearShape, ReadLayer
from gteopt.quant.affine import PackedWeight

__all__ = ["FORMATS", "Config", "Format", "LinearShape", "ReadLayer", "choose_format", "format_of"]


class Format(Protocol):
    """The functions that each format's module offers."""

    def problems(
        self, schemes: Mapping[str, LayerScheme], shapes: Mapping[str, LinearShape]
    ) -> list[str]:
        """Reasons why the format cannot hold these layers; empty when it can."""

    def to_tensors(self, weight: PackedWeight) -> dict[str, Tensor]:
        """The tensors of one layer, without its bias."""

    def quantization_config(
        self, schemes: Mapping[str, LayerScheme], skipped: Sequence[str], blocks: str, made_by: str
    ) -> dict[str, Any]:
        """The `quantization_config` entry of config.json."""

    def layers_in(self, names: Iterable[str]) -> list[str]:
        """Names of the quantized layers, from a checkpoint's tensor names."""

    def from_tensors(
        self, config: Config, name: str, shape: LinearShape, tensors: Mapping[str, Tensor]
    ) -> ReadLayer:
        """Read one layer from its tensors, without its bias. Any writer of the format will do."""


FORMATS: dict[FormatName, Format] = {
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
}
"""The formats by `quant_method`; `format: auto` takes the first one that can hold a variant."""


def _keeps_packed(name: FormatName, schemes: Mapping[str, LayerScheme]) -> bool:
    """Whether the library of a format keeps these weights packed, so that no layer has `weight`."""
    if name == "compressed-tensors":  # a byte per weight only with 8-bit activations
        return any(scheme.activation_bits != 8 for scheme in schemes.values())
    return name in ("gptq", "bitsandbytes")


def choose_format(
    wanted: FormatChoice,
    schemes: Mapping[str, LayerScheme],
    shapes: Mapping[str, LinearShape],
    *,
    reads_weights: bool = False,
) -> FormatName:
    """Choose the format for these layers: `wanted`, or for `auto` the first one that can hold them.

    `auto` gives `gteopt` when no other library's format can hold the layers.

    Args:
        wanted: the recipe's format.
        schemes: the scheme of each layer.
        shapes: the shape of each layer.
        reads_weights: the architecture's code in transformers reads `weight` of a layer, and so
            fails if a library keeps the layer packed.

    Raises:
        InputError: the wanted format cannot hold the layers; lists every reason.
    """

    def problems(name: FormatName) -> list[str]:
        reasons = FORMATS[name].problems(schemes, shapes)
        if reads_weights and _keeps_packed(name, schemes):
            reasons.append(
                "the architecture's code reads the weight of a layer, which libraries of this "
                "format keep packed"
            )
        return reasons

    if wanted == "auto":
        return next((name for name in FORMATS if not problems(name)), "gteopt")
    reasons = problems(wanted) if wanted in FORMATS else []
    if reasons:
        subject = (
            f"format {wanted} cannot hold this variant; choose another format, or format: auto"
        )
        raise InputError(join_problems(subject, reasons))
    return wanted


def format_of(config: Config) -> Format:
    """The format that a `quantization_config` names.

    Raises:
        UnsupportedError: gteopt cannot read this `quant_method`.
    """
    method = shorten_value(config.get("quant_method", "none stated"))
    for name, form in FORMATS.items():
        if name == method:
            return form
    raise UnsupportedError(
        f"weights quantized by '{method}' cannot be read: {suggest_names(method, FORMATS)}"
    )
