"""Learn the rounding of a linear layer: its codes and scales become parameters.

Learning starts from a solver's codes. It follows AdaRound (Nagel et al. 2020, arXiv:2004.10568) and
SignRound (Cheng et al. 2023, arXiv:2309.05516), with the straight-through gradients of LSQ (Esser
et al. 2020, arXiv:1902.08153). Hides: the parametrization. Refuses to know: the loss, the optimizer
and the data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gteopt.quant.affine import QuantizedWeight
from gteopt.quant.grid import NF4_LEVELS, SMALLEST_SCALE, code_range

_INSIDE_CELL = 0.49
"""Largest distance between a code and its latent at the start; at 0.5, the rounding may change."""


class TunableLinear(nn.Module):
    """x W^T + bias with W = level(clip(round(latent))) * exp(log_scale), both learned.

    The level of a code is code - zero, or its number in NF4. The latent is a code with a fraction.

    At the start, the layer has exactly the weight of the solver's codes. The latent starts at the
    original weight, but clipped to values that round to the solver's code. So codes that lie far
    from the original weight change first. Zero points are not learned.

    Attributes:
        latent: float32 [O, I], in units of codes.
        log_scale: float32 [O, G].
        bias: the bias of the given layer, or None.
    """

    zero: Tensor
    levels: Tensor | None

    def __init__(self, linear: nn.Linear, start: QuantizedWeight) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scheme = start.scheme
        scale, zero = start.scale.float(), start.zero.float()
        grouped = linear.weight.detach().float().reshape(*scale.shape, -1)  # [O, G, I/G]
        nf4 = start.scheme.number_format == "nf4"
        self.register_buffer("levels", torch.tensor(NF4_LEVELS).to(scale) if nf4 else None)
        shares = grouped / scale[..., None]
        if self.levels is None:
            latent = (shares + zero[..., None]).flatten(1)
        else:
            latent = _index_of(shares.flatten(1), self.levels)
        codes = start.codes.float()
        self.latent = nn.Parameter(latent.clamp(codes - _INSIDE_CELL, codes + _INSIDE_CELL))
        self.log_scale = nn.Parameter(scale.log())
        self.register_buffer("zero", zero)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return nn.functional.linear(x, self.weight(), self.bias)

    def weight(self) -> Tensor:
        """The rounded weight, float32 [O, I]; differentiable in `latent` and `log_scale`."""
        weight: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
            self.latent, self.log_scale, self.zero, code_range(self.scheme), self.levels
        )
        return weight

    @torch.no_grad()
    def export(self) -> QuantizedWeight:
        """The learned codes and grid; scales are rounded to float16, as they are stored."""
        codes = self.latent.round().clamp(*code_range(self.scheme)).to(torch.uint8)
        scale = self.log_scale.exp().clamp_min(SMALLEST_SCALE).half()
        return QuantizedWeight(codes, scale, self.zero.to(torch.uint8), self.scheme)


def _index_of(shares: Tensor, levels: Tensor) -> Tensor:
    """Index with a fraction of each value among ascending levels [n], by linear interpolation."""
    left = (torch.bucketize(shares, levels) - 1).clamp_(0, len(levels) - 2)
    return left + (shares - levels[left]) / (levels[left + 1] - levels[left])


class _Rounded(torch.autograd.Function):
    """Rounding whose derivative is taken as the identity (straight-through).

    Autograd would keep four float32 copies of every weight for the backward pass. This function
    keeps only the codes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        log_scale: Tensor,
        zero: Tensor,
        span: tuple[int, int],
        levels: Tensor | None,
    ) -> Tensor:
        scale = log_scale.exp()
        codes = latent.round().clamp_(*span).reshape(*scale.shape, -1)  # [O, G, I/G]
        ctx.save_for_backward(codes.to(torch.uint8), scale, zero, levels)
        return _numbers(codes, zero, levels).mul_(scale[..., None]).flatten(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        codes, scale, zero, levels = ctx.saved_tensors
        grad = grads[0].reshape(codes.shape)  # [O, G, I/G]
        by_scale = (grad * _numbers(codes.float(), zero, levels)).sum(-1) * scale
        if not ctx.needs_input_grad[0]:  # codes are not learned
            return None, by_scale, None, None, None
        by_latent = grad * scale[..., None]
        if levels is not None:
            # The derivative of a level is the mean distance to the neighbouring levels.
            by_latent *= torch.gradient(levels)[0][codes.int()]
        return by_latent.flatten(1), by_scale, None, None, None


def _numbers(codes: Tensor, zero: Tensor, levels: Tensor | None) -> Tensor:
    """The values of float codes [O, G, I/G], before the scale."""
    return codes - zero[..., None] if levels is None else levels[codes.int()]
