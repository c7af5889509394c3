"""Accumulate the statistics of a layer's inputs that GPTQ and GPTAQ need.

Hides: how running means are kept without a second matrix. Refuses to know: where the inputs come
from, and what is solved with them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from gteopt.quant.products import STRIP, add_product_, block_spans, matrix_product

_EXACT = (torch.bfloat16, torch.float16)
"""Dtypes that a GPU multiplies as they are, many times faster than float32. Their products are
exact in float32, in which tensor cores add them."""


class HessianAccumulator:
    """The running mean of x x^T over the inputs x of one layer, in float32.

    A mean does not grow with the calibration set, as a sum would. Only the lower triangle is
    summed, strip by strip; the upper triangle is its mirror image.

    Args:
        in_features: I.
        device: device of the sums.
        through: the weight [O, I], if only one layer reads these inputs. If O < I, it is cheaper to
            multiply by the weight before the cross term is summed.

    Attributes:
        n_rows: inputs added so far.
        mean: float32 [I], mean of the inputs added so far.
        original_mean: float32 [I], mean of the same inputs in the original model; None if `add` was
            given none.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        *,
        through: Tensor | None = None,
    ) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)
        self.mean = torch.zeros(in_features, device=device)
        self.original_mean: Tensor | None = None
        self._is_mirrored = True
        is_narrow = through is not None and len(through) < in_features
        self._through = through if is_narrow else None
        self._cross: Tensor | None = None
        self.n_rows = 0

    def to(self, device: torch.device | str) -> HessianAccumulator:
        """The same statistics on another device; returns itself if they are there already."""
        hessian = self.hessian
        if hessian.device == torch.device(device):
            return self
        moved = copy.copy(self)
        moved._sum = hessian.to(device)
        moved._cross = None if self._cross is None else self._cross.to(device)
        return moved

    @property
    def hessian(self) -> Tensor:
        """The mean so far, float32 [I, I]; not a copy."""
        if not self._is_mirrored:
            with torch.inference_mode():  # the sums may be tensors of inference mode
                for start, end in block_spans(len(self._sum), STRIP):
                    self._sum[start:end, end:] = self._sum[end:, start:end].T
            self._is_mirrored = True
        return self._sum

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add inputs to the mean.

        Args:
            x: [n, I], any float dtype, without padding.
            original: x0 [n, I], the layer's inputs in the original model; give it in every call or
                in none.
        """
        if not len(x):
            return
        x = x.to(self._sum.device)
        if not (x.is_cuda and x.dtype in _EXACT):
            x = x.float()
        total = self.n_rows + len(x)
        beta, alpha = self.n_rows / total, 1 / total
        features = x.T  # [I, n], a view; the products copy one strip at a time
        for start, end in block_spans(len(self._sum), STRIP):
            strip = self._sum[start:, start:end]
            add_product_(strip, features[start:], features[start:end], beta=beta, alpha=alpha)
        self.mean.lerp_(x.mean(0, dtype=torch.float32), len(x) / total)
        self._is_mirrored = False
        if original is not None:
            x = x.float()  # a difference of 16-bit floats needs more bits
            features = x.T
            difference = original.to(x) - x
            if self.original_mean is None:
                self.original_mean = torch.zeros_like(self.mean)
            self.original_mean.lerp_(original.to(x).mean(0), len(x) / total)
            if self._through is not None:
                difference = matrix_product(difference, self._through.to(x))  # [n, O]
            if self._cross is None:
                self._cross = torch.zeros(difference.shape[1], x.shape[1], device=x.device)
            for start, end in block_spans(len(features), STRIP):
                strip = self._cross[:, start:end]
                add_product_(strip, difference.T, features[start:end], beta=beta, alpha=alpha)
        self.n_rows = total

    def cross_term(self, weight: Tensor) -> Tensor | None:
        """GPTAQ's W dX X^T: the mean of W (x0 - x) x^T.

        Args:
            weight: W, float32 [O, I]; if `through` was given, it must be the same weight.

        Returns:
            float32 [O, I], which must not be changed; None if `add` was given no x0.
        """
        if self._cross is None or self._through is not None:
            return self._cross
        return matrix_product(weight, self._cross.T)
