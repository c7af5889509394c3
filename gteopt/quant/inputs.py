"""Static activations: a layer's inputs rounded to 8 bits by a grid that calibration fixed.

Every input feature has a scale and a zero point of its own. The weight's columns take the scales
and the bias the zero points (SmoothQuant's division, Xiao et al. 2022, arXiv:2211.10438, and the
shift of Outlier Suppression+, Wei et al. 2023, arXiv:2304.09145), so that what is multiplied is
plain bytes, and nothing about a token has to be looked at first.
Hides: how the grid is chosen. Refuses to know: models, and how the weight is rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_CODE = 255
_LEFT_BY_SOLVER = 0.3
"""Share of a weight's expected rounding error that GPTQ leaves in a layer's outputs."""
_ROOM = 1.4
"""Ranges are so many times as wide as what calibration showed: other texts show more."""
_STEPS = 80
_RATE = 0.1
"""Nats that a feature's scale moves at most in the first step."""
_SHARPNESS = 8.0
"""Of the soft lower bound of a scale; its width in nats is one over this."""


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
        codes = x.float().div(self.scale).add_(self.zero).round_().clamp_(0, LARGEST_CODE)
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


def fit_inputs(seen: SeenInputs, weights: Sequence[Tensor]) -> InputGrid:
    """The grid with the least expected error in the outputs of the layers that read these inputs.

    Rounding errors taken as independent and uniform, a scale s_j adds s_j^2 / 12 sum_o W_oj^2 to
    |y_q - y|^2, and a weight's row adds d_o^2 / 12 sum_j var(x_j) / s_j^2, its step d_o being
    max_j |W_oj| s_j / 127, of which GPTQ leaves a share. A scale is at least the feature's range
    over 255, so that nothing seen in calibration is clipped; beyond it the codes lie in the middle.

    Args:
        seen: their ranges and moments.
        weights: [O, I] each, any float dtype; every layer that reads them.
    """
    # A feature that never moves has one code; it must not blow up should it ever wake.
    span = _ROOM * (seen.high - seen.low)
    least = torch.maximum(span, span.max() * 2.0**-8).clamp_min(2.0**-24).div(LARGEST_CODE).log()
    variance = (seen.square - seen.mean.square()).clamp_min(0)
    # Copies, for what was made in inference mode has no gradients.
    with torch.inference_mode(False), torch.enable_grad():
        floor, variance = least.clone(), variance.clone()
        sizes = [weight.float().abs().clone() for weight in weights]
        power = [(w.square() @ seen.square.clone()).sum().clamp_min(1e-30) for w in sizes]
        importance = torch.stack(
            [w.square().sum(0) / p for w, p in zip(sizes, power, strict=True)]
        ).sum(0)
        logs = ((floor + floor.max()) / 2).requires_grad_()
        optimiser = torch.optim.Adam([logs])
        for step in range(_STEPS):
            optimiser.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            scale = _above(logs, floor)
            loss = (scale.square() * importance).sum()
            for size, total in zip(sizes, power, strict=True):
                row = (size * scale).amax(1) / 127
                noise = row.square().sum() * (variance / scale.square()).sum()
                loss = loss + _LEFT_BY_SOLVER * noise / total
            optimiser.zero_grad()
            loss.log().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        scale = _above(logs.detach(), floor)
    middle = (seen.high + seen.low) / 2
    return InputGrid(scale, LARGEST_CODE / 2 - middle / scale)


def _above(logs: Tensor, floor: Tensor) -> Tensor:
    """The scale e^logs, softly kept above e^floor."""
    return (floor + F.softplus((logs - floor) * _SHARPNESS) / _SHARPNESS).exp()
