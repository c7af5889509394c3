"""Static activations: a layer's inputs rounded to 8 bits by a grid that calibration fixed.

Every input feature has a scale and a zero point of its own. The weight's columns take the scales
and the bias the zero points (SmoothQuant's division, Xiao et al. 2022, arXiv:2211.10438, and the
shift of Outlier Suppression+, Wei et al. 2023, arXiv:2304.09145), so that what is multiplied is
plain bytes, and nothing about a token has to be looked at first.
Hides: how the grid is chosen. Refuses to know: models, and how the weight is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_CODE = 255
_STRENGTH = 0.65
_ROOM = 1.05
"""Both by the vectors of texts that calibration did not see (1 - mean cosine on MiniLM, gte-nano):
strength 0.6, room 1 0.00118, 0.00041; 0.7 and 1.1 0.00122, 0.00039; 0.5 and 1.25 0.00160, 0.00056;
0.8 and 1 0.00169, 0.00053. Room 0.9 clips what outlying features carry: 0.021, 0.0005. Scales
learned against the expected rounding error, which does not know of clipping: 0.00140, 0.00043."""


@dataclass(frozen=True)
class InputGrid:
    """An input x_j has the code clip(round(x_j / scale_j + zero_j), 0, 255) and stands for
    (code - zero_j) scale_j.

    Attributes:
        scale: float32 [I], positive.
        zero: float32 [I], not whole.
    """

    scale: Tensor
    zero: Tensor

    def to(self, device: torch.device | str) -> InputGrid:
        """The same on another device."""
        return InputGrid(self.scale.to(device), self.zero.to(device))

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"input_scale": self.scale, "input_zero": self.zero}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> InputGrid:
        """Undo `to_tensors`."""
        return InputGrid(tensors["input_scale"], tensors["input_zero"])

    def steps(self, x: Tensor) -> Tensor:
        """What inputs [n, I] are rounded to, in units of their scales: code - zero, float32."""
        codes = x.float().mul(1 / self.scale).add_(self.zero).round_().clamp_(0, LARGEST_CODE)
        return codes.sub_(self.zero)


class SeenInputs:
    """Ranges and moments of a layer's inputs, feature by feature.

    Attributes:
        n_rows: inputs seen so far.
        low, high: float32 [I], the extremes among them.
        mean, square: float32 [I], means of x and of x^2.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.n_rows = 0
        self.low = torch.full((in_features,), torch.inf, device=device)
        self.high = -self.low
        self.mean, self.square = (torch.zeros(in_features, device=device) for _ in range(2))

    def add(self, x: Tensor) -> None:
        """Count inputs [n, I] in."""
        if not len(x):
            return
        x = x.to(self.mean)
        self.n_rows += len(x)
        share = len(x) / self.n_rows
        low, high = x.aminmax(dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.mean.lerp_(x.mean(0), share)
        self.square.lerp_(x.square().mean(0), share)


def fit_inputs(seen: SeenInputs) -> InputGrid:
    """A grid for inputs like those that were seen.

    With r_j a feature's range and R the widest of them, scale_j = r_j^a R^(1 - a) / 255 (times the
    room): at a = 0 all features share a scale, which drowns the small ones; at a = 1 each uses all
    its codes, which gives the weight's columns the sizes of the inputs and leaves no room where
    other texts go further. In between every range but the widest has the more room the smaller it
    is, codes lying around its middle.
    """
    span = seen.high - seen.low
    widest = span.max().clamp_min(torch.finfo(torch.float32).tiny * 2**60)
    # A feature that never moved has a scale too, should it ever wake.
    share = (span / widest).clamp_min(2.0**-8)
    scale = _ROOM * widest * share**_STRENGTH / LARGEST_CODE
    # The middle has a code of its own, so that a feature that is constant is exact.
    middle = (seen.high + seen.low) / 2
    return InputGrid(scale, (LARGEST_CODE + 1) / 2 - middle / scale)
