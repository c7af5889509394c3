"""Round a layer's inputs to 8 bits by a grid that calibration has fixed (static activations).

Every input feature has its own scale and zero point. The scales are folded into the weight's
columns (SmoothQuant's division, Xiao et al. 2022, arXiv:2211.10438). The zero points are folded
into the bias (the shift of Outlier Suppression+, Wei et al. 2023, arXiv:2304.09145). So a layer
multiplies plain bytes, without measuring each token's range first. Hides: how the grid is chosen.
Refuses to know: models, and how the weight is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_CODE = 255
STRENGTH, HEADROOM = 0.65, 1.05
"""Defaults of `fit_input_grid`, chosen for the mean cosine on texts that calibration did not see
(MiniLM, gte-nano). A headroom below 1 clips outlying features."""


@dataclass(frozen=True)
class InputGrid:
    """How each input feature is rounded.

    An input x_j has the code clip(round(x_j / scale_j + zero_j), 0, 255), which stands for
    (code - zero_j) scale_j.

    Attributes:
        scale: float32 [I], positive.
        zero: float32 [I], not rounded to whole numbers.
    """

    scale: Tensor
    zero: Tensor

    def to(self, device: torch.device | str) -> InputGrid:
        """The same grid on another device."""
        return InputGrid(self.scale.to(device), self.zero.to(device))

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"input_scale": self.scale, "input_zero": self.zero}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> InputGrid:
        """Undo `to_tensors`."""
        return InputGrid(tensors["input_scale"], tensors["input_zero"])

    def steps(self, x: Tensor) -> Tensor:
        """Rounded inputs [n, I] in units of their scales: code - zero, float32."""
        codes = x.float().mul(1 / self.scale).add_(self.zero).round_().clamp_(0, LARGEST_CODE)
        return codes.sub_(self.zero)


class SeenInputs:
    """Ranges and moments of each feature of a layer's inputs.

    Attributes:
        n_rows: inputs added so far.
        low, high: float32 [I], least and greatest value of each feature.
        mean, square: float32 [I], means of x and of x^2.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.n_rows = 0
        self.low = torch.full((in_features,), torch.inf, device=device)
        self.high = -self.low
        self.mean, self.square = (torch.zeros(in_features, device=device) for _ in range(2))

    def add(self, x: Tensor) -> None:
        """Add inputs [n, I]."""
        if not len(x):
            return
        x = x.to(self.mean)
        self.n_rows += len(x)
        share = len(x) / self.n_rows
        low, high = x.aminmax(dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.mean.lerp_(x.mean(0), share)
        self.square.lerp_(x.square().mean(0), share)

    def union(self, other: SeenInputs) -> SeenInputs:
        """Ranges and moments of the inputs of both."""
        both = SeenInputs(len(self.low), self.low.device)
        both.n_rows = self.n_rows + other.n_rows
        both.low = torch.minimum(self.low, other.low)
        both.high = torch.maximum(self.high, other.high)
        share = other.n_rows / max(1, both.n_rows)
        both.mean = self.mean.lerp(other.mean, share)
        both.square = self.square.lerp(other.square, share)
        return both


def fit_input_grid(
    inputs: SeenInputs, *, strength: float = STRENGTH, headroom: float = HEADROOM
) -> InputGrid:
    """Fit a grid to the ranges of the inputs that were seen.

    Let r_j be the range of feature j, R the widest range and a the strength. Then scale_j =
    headroom * r_j^a R^(1 - a) / 255. With a = 0, all features share a scale, so features of small
    range use few codes. With a = 1, each feature uses all codes, so other texts may be clipped, and
    the weight's columns become as uneven as the inputs. A strength in between gives smaller ranges
    more headroom. The middle of a feature's range has the code 128.
    """
    span = inputs.high - inputs.low
    widest = span.max().clamp_min(torch.finfo(torch.float32).tiny * 2**60)
    # A feature that was constant gets a range as well, because other texts may change it.
    share = (span / widest).clamp_min(2.0**-8)
    scale = headroom * widest * share**strength / LARGEST_CODE
    # The middle of the range is exactly a code, so that a constant feature has no error.
    middle = (inputs.high + inputs.low) / 2
    return InputGrid(scale, (LARGEST_CODE + 1) / 2 - middle / scale)
