"""Smooth a layer's inputs: move their outliers into the layer's weights.

SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): x W^T = (x / s) (W s)^T holds for any positive
s [I]. The features of x share one scale in each token; s_j = rms(x_j)^a / max|w_j|^(1 - a) evens
them out. The paper's eq. 4 has max|x_j|; the root mean square gives a smaller error. The best of
several strengths a is the start of a gradient descent. Hides: which s are tried, and how they are
judged. Refuses to know: models, and which layer divides x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gteopt.config.recipe import LayerScheme
from gteopt.quant.affine import quantize_rtn, quantize_tokens

_STRENGTHS = (0.15, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
_MOST_OCTAVES = 6.0
_WORTH_IT = 0.95
"""Smoothing is kept if its error is below this share of the error without smoothing."""
_STEPS = 60
_RATE = 0.05
"""Largest change of a feature's log2 s in the first step of the descent."""


@dataclass(frozen=True)
class Smoothing:
    """The smoothing of the layers that read one tensor.

    Attributes:
        scale: s, float32 [I]; None if smoothing does not help.
        strength: the formula's a, at which the descent started; 0 without smoothing.
        error_before: sum over the layers of |y_q - y|^2 / |y|^2 without smoothing.
        error_after: the same error with smoothing.
    """

    scale: Tensor | None
    strength: float
    error_before: float
    error_after: float


def choose_smoothing(
    x: Tensor,
    weights: Sequence[Tensor],
    scheme: LayerScheme,
    tied: Tensor | None = None,
) -> Smoothing:
    """Try every strength on sample inputs, and learn s from the best; weights are rounded by RTN.

    Args:
        x: float32 [n, I], sample inputs of the layers.
        weights: weight [O, I] of every layer that reads these inputs.
        scheme: how weights and activations are rounded; activations have 8 bits.
        tied: int64 [I]; features with equal numbers must share one s. None ties no features.
    """
    weights = [weight.float() for weight in weights]
    wanted = [x @ weight.T for weight in weights]
    weight_largest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    rms = x.square().mean(0).sqrt()
    if tied is not None:
        rms, weight_largest = _tie(rms, tied), _tie(weight_largest, tied)

    def error(scale: Tensor | None) -> float:
        steps = _rounded(x if scale is None else x / scale, scheme)
        total = 0.0
        for weight, exact in zip(weights, wanted, strict=True):
            moved = weight if scale is None else weight * scale
            output = steps @ quantize_rtn(moved, scheme).dequantize().T
            total += ((output - exact).square().sum() / exact.square().sum()).item()
        return total

    before = error(None)
    best = Smoothing(None, 0.0, before, before)
    for strength in _STRENGTHS:
        scale = _scale(rms, weight_largest, strength)
        after = error(scale)
        if after < min(best.error_after, _WORTH_IT * before):
            best = Smoothing(scale, strength, before, after)
    if best.scale is None:
        return best
    # The descent minimizes an expected error, so the measured error decides which s is kept.
    scale = _learned(best.scale, x, weights, wanted, scheme, tied)
    after = error(scale)
    return replace(best, scale=scale, error_after=after) if after < best.error_after else best


def _learned(
    start: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    wanted: Sequence[Tensor],
    scheme: LayerScheme,
    tied: Tensor | None,
) -> Tensor:
    """The scale [I] with the least expected error, by gradient descent on log2 s from `start`.

    Rounding errors are taken as independent and uniform. A token's step d_t adds
    d_t^2 / 12 sum_j s_j^2 |W_j|^2 to |y_q - y|^2. The step d_o of a weight's row adds
    d_o^2 / 12 sum_j |x_j|^2 / s_j^2. A step is the range of x / s or W s divided by the number of
    codes. OmniQuant (Shao et al. 2023, arXiv:2308.13137) learns s through rounded matrix products.
    This descent needs no products; it reads x and W a few times in each step.
    """
    sizes = [exact.square().sum() for exact in wanted]
    energy = x.square().sum(0)
    pairs = list(zip(weights, sizes, strict=True))
    importance = torch.stack([w.square().sum(0) / size for w, size in pairs]).sum(0)
    used = (energy > 0) & (importance > 0)
    rows = torch.arange(len(start), device=start.device) if tied is None else tied
    octaves = start.new_zeros(int(rows.max()) + 1).scatter(0, rows, start.log2())
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, because tensors from inference mode have no gradients.
        x, energy, importance, used, rows = (
            tensor.clone() for tensor in (x, energy, importance, used, rows)
        )
        pairs = [(weight.abs().clone(), size.clone()) for weight, size in pairs]
        octaves = octaves.clone().requires_grad_()
        optimizer = torch.optim.Adam([octaves])
        for step in range(_STEPS):
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
            s = torch.where(used, octaves[rows], 0.0).exp2()
            low, high = (x / s).aminmax(dim=1)
            high, low = high.clamp_min(0), low.clamp_max(0)
            span = 2 * torch.maximum(high, -low) if scheme.activation_symmetric else high - low
            loss = (span / 255).square().sum() * (s.square() * importance).sum()
            for weight, size in pairs:
                row = (weight * s).amax(1) / 127
                loss = loss + row.square().sum() * (energy / s.square()).sum() / size
            optimizer.zero_grad()
            loss.log().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return _around_one(octaves.detach()[rows], used)


def _scale(rms: Tensor, weight_largest: Tensor, strength: float) -> Tensor:
    """The scale s [I]; 1 for features that are never active or have no weight."""
    used = (rms > 0) & (weight_largest > 0)
    if not bool(used.any()):
        return torch.ones_like(rms)
    exponent = strength * rms.log2() - (1 - strength) * weight_largest.log2()
    return _around_one(exponent, used)


def _around_one(exponent: Tensor, used: Tensor) -> Tensor:
    """2^exponent [I], scaled to a median of 1; 1 for features that are not used."""
    # Only ratios matter; with a median of 1, weights and norms keep their range. The clamp bounds
    # features that are almost always zero, because other texts may use them.
    exponent = (exponent - exponent[used].median()).clamp(-_MOST_OCTAVES, _MOST_OCTAVES)
    return torch.where(used, exponent, 0.0).exp2()


def _rounded(x: Tensor, scheme: LayerScheme) -> Tensor:
    codes, scale, zero = quantize_tokens(x, symmetric=scheme.activation_symmetric)
    return (codes.float() if zero is None else codes.float() - zero) * scale


def _tie(values: Tensor, tied: Tensor) -> Tensor:
    """Replace each of the values [I] by the largest value with the same number in `tied`."""
    out = torch.zeros(int(tied.max()) + 1, device=values.device)
    return out.scatter_reduce(0, tied, values, "amax")[tied]
