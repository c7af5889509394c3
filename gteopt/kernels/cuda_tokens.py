"""GPU kernels that handle one token at a time: rounding, gated activations, rotary angles.

Hides: how a norm or a gate is computed inside the rounding, so that its result is never stored.

Shapes: T tokens, I input features, H heads, d numbers of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gteopt.kernels.cuda_operators import define_operator
from gteopt.quant.grid import E4M3_MAX


@dataclass(frozen=True)
class FusedStep:
    """A step that a rounding kernel computes first, in float32, without storing the result.

    Attributes:
        up: the other half of a gated MLP, contiguous [T, I]; x becomes silu(x) * up.
        norm: weight [I] of an RMSNorm. At least one of `up` and `norm` is None.
        epsilon: of the RMSNorm.
    """

    up: Tensor | None = None
    norm: Tensor | None = None
    epsilon: float = 0.0


_NOTHING_BEFORE = FusedStep()


def quantize_tokens_cuda(
    x: Tensor, *, symmetric: bool, before: FusedStep | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`quant.affine.quantize_tokens` of x [T, I] in one pass over memory; the same numbers.

    Returns:
        int8 [T, I], float32 scale [T, 1], int32 zero points [T] or None.
    """
    b = before or _NOTHING_BEFORE
    codes, scale, zero = torch.ops.gteopt.quantize_tokens(x, symmetric, b.up, b.norm, b.epsilon)
    return codes, scale, None if symmetric else zero


def _quantize_tokens(
    x: Tensor, symmetric: bool, up: Tensor | None, norm: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = _token_codes(x, symmetric, up, norm, epsilon)
    block = min(4096, triton.next_power_of_2(x.shape[1]))
    if len(x):
        _quantize_kernel[(len(x),)](
            x, up, norm, codes, scale, zero, x.shape[1], epsilon,
            GATED=up is not None, NORMED=norm is not None,
            SYMMETRIC=symmetric, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return codes, scale, zero


def _token_codes(
    x: Tensor, symmetric: bool, up: Tensor | None, norm: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((len(x), 1), dtype=torch.float32, device=x.device)
    # An operator cannot return None.
    zero = torch.empty(0 if symmetric else len(x), dtype=torch.int32, device=x.device)
    return codes, scale, zero


define_operator(
    "quantize_tokens(Tensor x, bool symmetric, Tensor? up, Tensor? norm, float epsilon) -> "
    "(Tensor, Tensor, Tensor)",
    _quantize_tokens,
    _token_codes,
)


def round_tokens(x: Tensor, *, before: FusedStep | None = None) -> tuple[Tensor, Tensor]:
    """Round each token of x [T, I] to 8-bit floats by its own scale, max |x| / 448.

    Returns:
        e4m3 [T, I], float32 scale [T, 1].
    """
    b = before or _NOTHING_BEFORE
    floats, scale = torch.ops.gteopt.round_tokens(x, b.up, b.norm, b.epsilon)
    return floats, scale


def _round_tokens(
    x: Tensor, up: Tensor | None, norm: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    floats, scale = _token_floats(x, up, norm, epsilon)
    block = min(4096, triton.next_power_of_2(x.shape[1]))
    if len(x):
        _round_kernel[(len(x),)](
            x, up, norm, floats, scale, x.shape[1], epsilon,
            GATED=up is not None, NORMED=norm is not None,
            MOST=E4M3_MAX, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return floats, scale


def _token_floats(
    x: Tensor, up: Tensor | None, norm: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    floats = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return floats, torch.empty((len(x), 1), dtype=torch.float32, device=x.device)


define_operator(
    "round_tokens(Tensor x, Tensor? up, Tensor? norm, float epsilon) -> (Tensor, Tensor)",
    _round_tokens,
    _token_floats,
)


def gate_(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of contiguous [T, I], rounded once; it overwrites `gate`."""
    torch.ops.gteopt.gate_(gate, up)
    return gate


def _gate(gate: Tensor, up: Tensor) -> None:
    if gate.numel():
        _gate_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, gate.numel(), BLOCK=1024)


define_operator("gate_(Tensor(a!) gate, Tensor up) -> ()", _gate, lambda gate, up: None)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of heads [T, H, d] by angles [T, 1, d], in place.

    All are contiguous, d a power of two; computed in float32, rounded once.
    """
    torch.ops.gteopt.rotate_(x, cos, sin)
    return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    n_tokens, n_heads, width = x.shape
    if n_tokens:
        heads = triton.next_power_of_2(n_heads)
        _rotate_kernel[(n_tokens,)](x, cos, sin, n_heads, HEADS=heads, HALF=width // 2)


define_operator(
    "rotate_(Tensor(a!) x, Tensor cos, Tensor sin) -> ()", _rotate, lambda x, cos, sin: None
)


@triton.jit
def _rounded(x):
    # Adding 1.5 * 2^23 leaves no fraction bits: rounds to even, like torch.round, up to 2^22.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _norm_factor(x, row, n_inputs, epsilon, NORMED: tl.constexpr, BLOCK: tl.constexpr):
    """The factor of RMSNorm for one token."""
    factor = 1.0
    if NORMED:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n_inputs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            values = tl.load(x + row + at, mask=at < n_inputs, other=0.0).to(tl.float32)
            squares += values * values
        factor = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / n_inputs + epsilon)
    return factor


@triton.jit
def _prepared(x, up, norm, row, at, n_inputs, factor, GATED: tl.constexpr, NORMED: tl.constexpr):
    """The values of a token after the step of `FusedStep`."""
    values = tl.load(x + row + at, mask=at < n_inputs, other=0.0).to(tl.float32)
    if GATED:
        others = tl.load(up + row + at, mask=at < n_inputs, other=0.0).to(tl.float32)
        values = values * tl.sigmoid(values) * others
    if NORMED:
        weights = tl.load(norm + at, mask=at < n_inputs, other=0.0).to(tl.float32)
        values = values * factor * weights
    return values


@triton.jit
def _quantize_kernel(
    x, up, norm, codes, scale, zero, n_inputs, epsilon,
    GATED: tl.constexpr, NORMED: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each token: its range, then its codes; the second read of x is cached."""
    row = tl.program_id(0).to(tl.int64) * n_inputs
    factor = _norm_factor(x, row, n_inputs, epsilon, NORMED, BLOCK)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_inputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _prepared(x, up, norm, row, at, n_inputs, factor, GATED, NORMED)
        low = tl.minimum(low, values)
        high = tl.maximum(high, values)
        broken = tl.where(values != values, 1.0, broken)  # minimum and maximum drop a NaN
    least = tl.min(low, axis=0)
    most = tl.max(high, axis=0)
    if SYMMETRIC:
        step = tl.div_rn(tl.maximum(most, -least), 127.0)
    else:
        step = tl.div_rn(most - least, 255.0)
    step = tl.where(step >= 1.1754943508222875e-38, step, 1.0)
    tl.store(scale + tl.program_id(0), tl.where(tl.max(broken, axis=0) > 0, float("nan"), step))
    shift = 0.0
    if not SYMMETRIC:
        shift = _rounded(-128.0 - tl.div_rn(least, step))
        shift = tl.minimum(tl.maximum(shift, -128.0), 127.0)
        tl.store(zero + tl.program_id(0), shift.to(tl.int32))
    for start in range(0, n_inputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _prepared(x, up, norm, row, at, n_inputs, factor, GATED, NORMED)
        rounded = _rounded(tl.div_rn(values, tl.broadcast_to(step, (BLOCK,)))) + shift
        rounded = tl.minimum(tl.maximum(rounded, -128.0), 127.0)
        tl.store(codes + row + at, rounded.to(tl.int8), mask=at < n_inputs)


@triton.jit
def _round_kernel(
    x, up, norm, floats, scale, n_inputs, epsilon,
    GATED: tl.constexpr, NORMED: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each token: its largest value, then its 8-bit floats."""
    row = tl.program_id(0).to(tl.int64) * n_inputs
    factor = _norm_factor(x, row, n_inputs, epsilon, NORMED, BLOCK)
    high = tl.zeros((BLOCK,), tl.float32)
    broken = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_inputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _prepared(x, up, norm, row, at, n_inputs, factor, GATED, NORMED)
        high = tl.maximum(high, tl.abs(values))
        broken = tl.where(values != values, 1.0, broken)  # the maximum drops a NaN
    step = tl.div_rn(tl.max(high, axis=0), MOST)
    step = tl.where(step >= 1.1754943508222875e-38, step, 1.0)
    tl.store(scale + tl.program_id(0), tl.where(tl.max(broken, axis=0) > 0, float("nan"), step))
    for start in range(0, n_inputs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = _prepared(x, up, norm, row, at, n_inputs, factor, GATED, NORMED)
        shares = tl.div_rn(values, tl.broadcast_to(step, (BLOCK,)))
        shares = tl.minimum(tl.maximum(shares, -MOST), MOST)
        tl.store(floats + row + at, shares.to(tl.float8e4nv), mask=at < n_inputs)


@triton.jit
def _gate_kernel(gate, up, n, BLOCK: tl.constexpr):
    """One program: BLOCK numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=at < n, other=0.0).to(tl.float32)
    out = g * tl.sigmoid(g) * u
    tl.store(gate + at, out.to(gate.dtype.element_ty), mask=at < n)


@triton.jit
def _rotate_kernel(x, cos, sin, n_heads, HEADS: tl.constexpr, HALF: tl.constexpr):
    """One program: all heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    left = x + (token * n_heads + head) * 2 * HALF + i
    angle = token * 2 * HALF + i
    inside = (head < n_heads) & (i < HALF)
    a = tl.load(left, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(left + HALF, mask=inside, other=0.0).to(tl.float32)
    first = a * tl.load(cos + angle).to(tl.float32) - b * tl.load(sin + angle).to(tl.float32)
    angle += HALF
    second = b * tl.load(cos + angle).to(tl.float32) + a * tl.load(sin + angle).to(tl.float32)
    tl.store(left, first.to(x.dtype.element_ty), mask=inside)
    tl.store(left + HALF, second.to(x.dtype.element_ty), mask=inside)
