"""Formats of other libraries: packed weights to their tensors and back, and what config.json says.

Hides: how each library names, transposes and packs codes, scales and zero points. Refuses to know:
models and files; tensors in, tensors out. Specified in artifacts/README.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from gteopt.config.recipe import FormatChoice, FormatName, LayerScheme
from gteopt.errors import InputError, UnsupportedError, join_problems, suggest
from gteopt.formats import bitsandbytes, compressed_tensors, gptq
from gteopt.formats.packed import Config, ReadLayer, Shape
from gteopt.quant.affine import PackedWeight

__all__ = ["FORMATS", "Config", "Format", "ReadLayer", "Shape", "choose_format", "format_of"]


class Format(Protocol):
    """What each module of this package offers; its functions say more."""

    def problems(
        self, schemes: Mapping[str, LayerScheme], shapes: Mapping[str, Shape]
    ) -> list[str]:
        """Why these layers cannot be written so; empty when they can."""

    def to_tensors(self, weight: PackedWeight) -> dict[str, Tensor]:
        """One layer's tensors, bias left out."""

    def quantization_config(
        self, schemes: Mapping[str, LayerScheme], left: Sequence[str], blocks: str, made_by: str
    ) -> dict[str, Any]:
        """`quantization_config` of config.json."""

    def layers_in(self, names: Iterable[str]) -> list[str]:
        """The quantized layers among a checkpoint's tensor names."""

    def from_tensors(
        self, config: Config, name: str, shape: Shape, tensors: Mapping[str, Tensor]
    ) -> ReadLayer:
        """One layer from its tensors, bias left out; of any maker."""


FORMATS: dict[FormatName, Format] = {
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
}
"""By `quant_method`; the first one that can hold a variant is what `format: auto` takes."""


def choose_format(
    wanted: FormatChoice, schemes: Mapping[str, LayerScheme], shapes: Mapping[str, Shape]
) -> FormatName:
    """The format to write these layers in: the one asked for, or the first standard one that fits.

    Raises:
        InputError: the format asked for cannot hold the layers; lists every reason.
    """
    if wanted == "auto":
        fits = (name for name, each in FORMATS.items() if not each.problems(schemes, shapes))
        return next(fits, "gteopt")
    found = FORMATS[wanted].problems(schemes, shapes) if wanted in FORMATS else []
    if found:
        subject = f"format {wanted} cannot hold this variant; choose another, or format: auto"
        raise InputError(join_problems(subject, found))
    return wanted


def format_of(config: Config) -> Format:
    """The format that a `quantization_config` speaks of.

    Raises:
        UnsupportedError: another quantizer's.
    """
    method = str(config.get("quant_method", "none stated"))
    for name, each in FORMATS.items():
        if name == method:
            return each
    raise UnsupportedError(
        f"weights quantized by '{method}' cannot be read: {suggest(method, FORMATS)}"
    )
