"""GPU kernels that read 4-bit weights: a product with few tokens, and decoding for many.

Shapes: T tokens, O output features, I input features, G groups, S parts that I is split into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gteopt.kernels.cuda_operators import Tile, define_operator

FEW_TOKENS = 64
"""Most tokens for which 4-bit weights are decoded inside the product. For more, a bfloat16 copy of
the layer lives for one call; otherwise each tile of tokens would decode the whole weight again."""


_PROGRAMS = 528
"""Programs of a 4-bit product: four for each of the 132 multiprocessors of an H100 or H200. Their
loads under way are 24 KB a multiprocessor, about bandwidth times latency of an H200. The number is
calculated, not yet measured."""


INT4_TILE = Tile(16, 32, 128, 4, 4)
"""Tile of the product of 4-bit weights with up to 16 tokens; with more, it has 64 tokens."""


def _decode_int4(
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: Tensor | None,
    middle: int,
    dtype: torch.dtype,
) -> Tensor:
    n_outputs, n_inputs = len(qweight), 2 * qweight.shape[1]
    out = torch.empty(n_outputs, n_inputs, dtype=dtype, device=qweight.device)
    width = n_inputs // scale.shape[1]
    inputs = min(128, width)
    steps = max(1, min(2048 // inputs, triton.next_power_of_2(n_inputs // inputs)))
    grid = (n_outputs, triton.cdiv(n_inputs, steps * inputs))
    _decode_kernel[grid](
        qweight, scale, zero, levels, out,
        n_inputs, width, scale.shape[1],
        MIDDLE=middle, HAS_ZERO=zero is not None, NF4=levels is not None,
        STEPS=steps, INPUTS=inputs,
    )  # fmt: skip
    return out


def _int4_product(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    levels: Tensor | None,
    bias: Tensor | None,
    middle: int,
    tile_numbers: list[int],
) -> Tensor:
    (n_tokens, n_inputs), n_outputs, n_groups = x.shape, len(qweight), scale.shape[1]
    y = torch.empty(n_tokens, n_outputs, dtype=x.dtype, device=x.device)
    if not n_tokens:
        return y
    width = n_inputs // n_groups
    tile = Tile(*tile_numbers)
    inputs, outputs = min(tile.inputs, width), tile.outputs
    tokens = tile.tokens if n_tokens <= tile.tokens else 64
    programs = triton.cdiv(n_outputs, outputs)
    steps = n_inputs // inputs
    # Sums of parts are kept apart and added in order, because atomics add in any order.
    n_steps = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // programs)))
    n_parts = triton.cdiv(steps, n_steps)
    whole = n_parts == 1
    parts = y
    if not whole:
        parts = torch.empty(n_parts, n_tokens, n_outputs, dtype=torch.float32, device=x.device)
    _int4_kernel[programs, n_parts, triton.cdiv(n_tokens, tokens)](
        x, qweight, scale, zero, levels, bias, parts,
        n_tokens, n_outputs, n_inputs, n_groups, width, n_steps,
        MIDDLE=middle, HAS_ZERO=zero is not None, NF4=levels is not None,
        HAS_BIAS=whole and bias is not None,
        TOKENS=tokens, OUTPUTS=outputs, INPUTS=inputs,
        num_warps=tile.n_warps, num_stages=tile.n_stages,
    )  # fmt: skip
    if whole:
        return y
    block = min(1024, triton.next_power_of_2(n_outputs))
    _sum_kernel[n_tokens, triton.cdiv(n_outputs, block)](
        parts, y, bias, n_tokens, n_outputs, n_parts, HAS_BIAS=bias is not None, BLOCK=block
    )
    return y


define_operator(
    "decode_int4(Tensor qweight, Tensor scale, Tensor? zero, Tensor? levels, int middle, "
    "ScalarType dtype) -> Tensor",
    _decode_int4,
    lambda qweight, scale, zero, levels, middle, dtype: qweight.new_empty(
        len(qweight), 2 * qweight.shape[1], dtype=dtype
    ),
)


define_operator(
    "int4_product(Tensor x, Tensor qweight, Tensor scale, Tensor? zero, Tensor? levels, "
    "Tensor? bias, int middle, int[] tile) -> Tensor",
    _int4_product,
    lambda x, qweight, scale, zero, levels, bias, middle, tile: x.new_empty(len(x), len(qweight)),
)


@triton.jit(do_not_specialize=["n_tokens"])
def _int4_kernel(
    x, qweight, scale, zero, levels, bias, parts,
    n_tokens, n_outputs, n_inputs, n_groups, width, n_steps,
    MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr, NF4: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Sums of one part of the inputs for a tile of tokens and outputs; adds bias if HAS_BIAS."""
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    first = tl.program_id(1) * n_steps * INPUTS
    last = tl.minimum(first + n_steps * INPUTS, n_inputs)
    byte = tl.arange(0, INPUTS // 2)
    i = tl.arange(0, INPUTS)
    sums = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for start in range(first, last, INPUTS):
        packed = tl.load(
            qweight + o.to(tl.int64)[:, None] * (n_inputs // 2) + start // 2 + byte[None, :],
            mask=(o < n_outputs)[:, None],
            other=0,
        )
        group = o * n_groups + start // width  # a step never crosses groups
        steps = tl.load(scale + group, mask=o < n_outputs, other=0.0).to(tl.float32)
        code = tl.interleave(packed & 15, packed >> 4)  # [OUTPUTS, INPUTS]
        if NF4:
            numbers = tl.load(levels + code.to(tl.int32)).to(x.dtype.element_ty)
        else:
            if HAS_ZERO:
                middle = tl.load(zero + group, mask=o < n_outputs, other=0).to(tl.int32)
                numbers = (code.to(tl.int32) - middle[:, None]).to(x.dtype.element_ty)
            else:
                numbers = (code.to(tl.int32) - MIDDLE).to(x.dtype.element_ty)
        a = tl.load(
            x + t.to(tl.int64)[:, None] * n_inputs + start + i[None, :],
            mask=(t < n_tokens)[:, None],
            other=0.0,
        )
        product = tl.dot(a, tl.trans(numbers), out_dtype=tl.float32, input_precision="ieee")
        sums += product * steps[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + o, mask=o < n_outputs, other=0.0).to(tl.float32)[None, :]
    where = (tl.program_id(1) * n_tokens + t).to(tl.int64)[:, None] * n_outputs + o[None, :]
    tl.store(
        parts + where,
        sums.to(parts.dtype.element_ty),
        mask=(t < n_tokens)[:, None] & (o < n_outputs)[None, :],
    )


@triton.jit(do_not_specialize=["n_tokens"])
def _sum_kernel(
    parts, y, bias, n_tokens, n_outputs, n_parts, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK outputs of one token, their parts added in order."""
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for part in range(n_parts):
        row = (part * n_tokens + tl.program_id(0)).to(tl.int64) * n_outputs
        sums += tl.load(parts + row + o, mask=o < n_outputs, other=0.0)
    if HAS_BIAS:
        sums += tl.load(bias + o, mask=o < n_outputs, other=0.0).to(tl.float32)
    where = y + tl.program_id(0).to(tl.int64) * n_outputs + o
    tl.store(where, sums.to(y.dtype.element_ty), mask=o < n_outputs)


@triton.jit
def _decode_kernel(
    qweight, scale, zero, levels, out, n_inputs, width, n_groups,
    MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr, NF4: tl.constexpr,
    STEPS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """One program: STEPS times INPUTS weights of one row; a step never crosses groups."""
    row = tl.program_id(0).to(tl.int64)
    start = (tl.program_id(1) * STEPS + tl.arange(0, STEPS)) * INPUTS
    inside = start < n_inputs
    byte = tl.arange(0, INPUTS // 2)
    packed = tl.load(
        qweight + row * (n_inputs // 2) + start[:, None] // 2 + byte[None, :],
        mask=inside[:, None],
        other=0,
    )
    code = tl.interleave(packed & 15, packed >> 4).to(tl.int32)  # [STEPS, INPUTS]
    group = row * n_groups + start // width
    steps = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    if NF4:
        numbers = tl.load(levels + code)
    else:
        if HAS_ZERO:
            middle = tl.load(zero + group, mask=inside, other=0).to(tl.int32)
            numbers = (code - middle[:, None]).to(tl.float32)
        else:
            numbers = (code - MIDDLE).to(tl.float32)
    values = (numbers * steps[:, None]).to(out.dtype.element_ty)
    i = tl.arange(0, INPUTS)
    where = out + row * n_inputs + start[:, None] + i[None, :]
    tl.store(where, values, mask=inside[:, None])
