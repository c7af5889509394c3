"""Static activations: a layer's inputs are rounded to 8 bits by a grid that calibration fixed.

Every input feature has a scale and a zero point of its own. The weight's columns take the scales
(SmoothQuant's division, Xiao et al. 2022, arXiv:2211.10438), and the bias takes the zero points
(the shift of Outlier Suppression+, Wei et al. 2023, arXiv:2304.09145). So the product is of plain
bytes, and needs no pass over a token first. Hides: how the grid is chosen. Refuses to know: models,
and how the weight is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_CODE = 255
_STRENGTH = 0.65
_HEADROOM = 1.05
"""Both were chosen by 1 - mean cosine of texts that calibration did not see, on MiniLM and
gte-nano:

| strength | headroom | MiniLM | gte-nano |
|---|---|---|---|
| 0.6 | 1 | 0.00118 | 0.00041 |
| 0.7 | 1.1 | 0.00122 | 0.00039 |
| 0.5 | 1.25 | 0.00160 | 0.00056 |
| 0.8 | 1 | 0.00169 | 0.00053 |

Headroom 0.9 clips outlying features: 0.021 and 0.0005. Scales that were learned against the
expected rounding error, without clipping, gave 0.00140 and 0.00043."""


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
        """Rounded inputs [n, I] in units of their scales: code - zero, float32."""
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


def fit_inputs(seen: SeenInputs) -> InputGrid:
    """A grid for inputs like those that were seen.

    With r_j a feature's range and R the widest range, scale_j = r_j^a R^(1 - a) / 255, times the
    headroom. At a = 0 all features share a scale, which leaves small features few codes. At a = 1
    each feature uses all codes, which leaves no headroom for other texts, and gives the weight's
    columns the sizes of the inputs. In between, smaller ranges have more headroom, and codes lie
    around their middle.
    """
    span = seen.high - seen.low
    widest = span.max().clamp_min(torch.finfo(torch.float32).tiny * 2**60)
    # A constant feature has a scale as well, because other texts may change it.
    share = (span / widest).clamp_min(2.0**-8)
    scale = _HEADROOM * widest * share**_STRENGTH / LARGEST_CODE
    # The middle has a code of its own, so that a constant feature is exact.
    middle = (seen.high + seen.low) / 2
    return InputGrid(scale, (LARGEST_CODE + 1) / 2 - middle / scale)
