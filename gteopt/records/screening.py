"""The record of a plan's screening: a quick comparison of its variants."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.frozen import Frozen


class ScreenedVariant(Frozen):
    """One variant in the screening.

    Attributes:
        neighbour_overlap: see `Fidelity`, on the sample of texts.
        fast_activations: whether products run on 8-bit numbers, which makes bulk encoding faster.
        dropped: why the variant is not measured in full; None where it is.
    """

    name: str
    weight_bytes: int
    bytes_per_vector: int
    neighbour_overlap: float
    fast_activations: bool
    dropped: str | None = None


class ScreeningRecord(Frozen):
    """Result of the screening; `screening.json` in a results folder."""

    schema_: Literal["gteopt.screening/1"] = Field(default="gteopt.screening/1", alias="schema")
    n_texts: int
    variants: tuple[ScreenedVariant, ...]

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the variants that are measured in full."""
        return tuple(variant.name for variant in self.variants if variant.dropped is None)
