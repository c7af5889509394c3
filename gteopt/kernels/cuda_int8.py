"""The GPU product of int8 activations and int8 weights, and the choice of its tile.

Shapes: T tokens, O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from gteopt.kernels.cuda_operators import Tile, define_operator


def int8_tile(n_tokens: int) -> Tile:
    """Tile of the int8 product; chosen by shared memory and registers, not yet by measurement."""
    if n_tokens <= 32:
        return Tile(32, 64, 256, 4, 4)
    if n_tokens <= 256:
        return Tile(64, 128, 128, 4, 4)
    return LARGE_TILES[0]


LARGE_TILES = (
    Tile(128, 256, 128, 8, 3),
    Tile(128, 256, 128, 8, 4, copies=1),
    Tile(256, 128, 128, 8, 3, copies=1),
    Tile(128, 128, 128, 8, 3, copies=1),
    Tile(128, 128, 128, 4, 3, copies=1),
    Tile(64, 256, 128, 4, 2, copies=1),
    Tile(128, 128, 128, 4, 3),
    Tile(128, 256, 256, 8, 2),
)
"""Tiles for int8 products of many tokens. The first product of a size measures which is fastest.
Sums of whole numbers are the same in any tile. Triton (3.6, 3.9) waits for each step's product of
whole numbers before the next. Two programs with a smaller tile share a multiprocessor, and one
multiplies while the other waits."""


def int8_product(
    codes: Tensor,
    token_scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    row_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """(codes - zero) weight^T times both scales, plus bias: [T, O] in `dtype`.

    Args:
        codes: int8 [T, I].
        token_scale: float32 [T, 1].
        zero: int32 [T] or None.
        weight: int8 [O, I].
        scale: float32 [O].
        row_sum: int32 [O], sums of the weight's rows; needed with `zero`.
        bias: float32 [O] or None.
        dtype: dtype of the result.
        tile: see `Tile`; None uses the fastest.
    """
    y: Tensor = torch.ops.gteopt.int8_product(
        *(codes, token_scale, zero, weight, scale, row_sum, bias, dtype),
        () if tile is None else tile,
    )
    return y


def _int8_product(
    codes: Tensor,
    token_scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    row_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile_numbers: list[int],
) -> Tensor:
    (n_tokens, n_inputs), n_outputs = codes.shape, len(weight)
    y = torch.empty((n_tokens, n_outputs), dtype=dtype, device=codes.device)

    def launch(tile: Tile) -> None:
        grid = (triton.cdiv(n_tokens, tile.tokens) * triton.cdiv(n_outputs, tile.outputs),)
        kernel, left, right = _int8_kernel, codes, weight
        if tile.copies:
            kernel = _int8_copy_kernel
            left = TensorDescriptor.from_tensor(codes, [tile.tokens, tile.inputs])
            right = TensorDescriptor.from_tensor(weight, [tile.outputs, tile.inputs])
        kernel[grid](
            left, right, y, token_scale, zero, scale, row_sum, bias,
            n_tokens, n_outputs, n_inputs,
            HAS_ZERO=zero is not None, HAS_BIAS=bias is not None,
            TOKENS=tile.tokens, OUTPUTS=tile.outputs, INPUTS=tile.inputs, TOGETHER=8,
            num_warps=tile.n_warps, num_stages=tile.n_stages,
        )  # fmt: skip

    if n_tokens:
        tile = Tile(*tile_numbers) if tile_numbers else int8_tile(n_tokens)
        if not tile_numbers and tile is LARGE_TILES[0] and codes.is_cuda:
            # Beyond 8192 tokens there are programs enough for any tile.
            size = (codes.device.index, min(n_tokens, 8192).bit_length(), n_outputs, n_inputs)
            tile = _fastest(size, [tile for tile in LARGE_TILES if _fits(tile, codes)], launch)
        launch(tile)
    return y


_FASTEST: dict[tuple[int, ...], Tile] = {}


def fastest_tiles() -> dict[tuple[int, ...], Tile]:
    """The tiles chosen so far: (GPU, bits of the number of tokens, outputs, inputs) -> tile."""
    return dict(_FASTEST)


def _fits(tile: Tile, codes: Tensor) -> bool:
    """Whether the GPU and the width of codes [T, I] allow this tile."""
    if not tile.copies:
        return True
    return codes.shape[1] % 16 == 0 and torch.cuda.get_device_capability(codes.device) >= (9, 0)


def _fastest(size: tuple[int, ...], tiles: Sequence[Tile], launch: Callable[[Tile], None]) -> Tile:
    """The fastest of `tiles` for products of a size, measured in the first product of that size."""
    if size in _FASTEST or torch.cuda.is_current_stream_capturing():  # a capture cannot be timed
        return _FASTEST.get(size, tiles[0])
    best, least = tiles[0], float("inf")
    for tile in tiles:
        try:
            launch(tile)  # compiles
        except (TritonError, RuntimeError):  # for example, less shared memory than an H100 has
            continue
        marks: list[Any] = [
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(4)
        ]
        for mark in marks[:-1]:
            mark.record()
            launch(tile)
        marks[-1].record()
        marks[-1].synchronize()
        took = min(a.elapsed_time(b) for a, b in pairwise(marks))
        if took < least:
            best, least = tile, took
    _FASTEST[size] = best
    return best


define_operator(
    "int8_product(Tensor codes, Tensor token_scale, Tensor? zero, Tensor weight, Tensor scale, "
    "Tensor? row_sum, Tensor? bias, ScalarType dtype, int[] tile) -> Tensor",
    _int8_product,
    lambda codes, token_scale, zero, weight, scale, row_sum, bias, dtype, tile: codes.new_empty(
        len(codes), len(weight), dtype=dtype
    ),
)


@triton.jit
def _int8_tile_origin(n_tokens, n_outputs, TOKENS, OUTPUTS, TOGETHER: tl.constexpr):
    """First token and output of this program's tile."""
    # Programs that run together share rows of weight: TOGETHER tiles of tokens, then other rows.
    n_down = tl.cdiv(n_tokens, TOKENS)
    n_across = tl.cdiv(n_outputs, OUTPUTS)
    program = tl.program_id(0)
    band = program // (TOGETHER * n_across)
    height = tl.minimum(n_down - band * TOGETHER, TOGETHER)
    within = program % (TOGETHER * n_across)
    return (band * TOGETHER + within % height) * TOKENS, (within // height) * OUTPUTS


@triton.jit
def _int8_store(
    sums, t, o, y, token_scale, zero, scale, row_sum, bias, n_tokens, n_outputs,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Apply scales, zero points and bias to the sums of a tile, and store the tile."""
    if HAS_ZERO:
        zeros = tl.load(zero + t, mask=t < n_tokens, other=0)
        row_sums = tl.load(row_sum + o, mask=o < n_outputs, other=0)
        sums -= zeros[:, None] * row_sums[None, :]
    out = sums.to(tl.float32) * tl.load(scale + o, mask=o < n_outputs, other=0.0)[None, :]
    out *= tl.load(token_scale + t, mask=t < n_tokens, other=0.0)[:, None]
    if HAS_BIAS:
        out += tl.load(bias + o, mask=o < n_outputs, other=0.0)[None, :]
    where = y + t.to(tl.int64)[:, None] * n_outputs + o[None, :]
    inside = (t < n_tokens)[:, None] & (o < n_outputs)[None, :]
    tl.store(where, out.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_tokens"])
def _int8_kernel(
    codes, weight, y, token_scale, zero, scale, row_sum, bias,
    n_tokens, n_outputs, n_inputs,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """One tile of the product."""
    first_t, first_o = _int8_tile_origin(n_tokens, n_outputs, TOKENS, OUTPUTS, TOGETHER)
    t = first_t + tl.arange(0, TOKENS)
    o = first_o + tl.arange(0, OUTPUTS)
    i = tl.arange(0, INPUTS)
    left = codes + t.to(tl.int64)[:, None] * n_inputs + i[None, :]
    right = weight + o.to(tl.int64)[None, :] * n_inputs + i[:, None]
    sums = tl.zeros((TOKENS, OUTPUTS), tl.int32)
    for start in range(0, n_inputs, INPUTS):
        real = i < n_inputs - start
        a = tl.load(left, mask=(t < n_tokens)[:, None] & real[None, :], other=0)
        b = tl.load(right, mask=(o < n_outputs)[None, :] & real[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        left += INPUTS
        right += INPUTS
    _int8_store(
        sums, t, o, y, token_scale, zero, scale, row_sum, bias, n_tokens, n_outputs,
        HAS_ZERO, HAS_BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def _int8_copy_kernel(
    codes, weight, y, token_scale, zero, scale, row_sum, bias,
    n_tokens, n_outputs, n_inputs,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """`_int8_kernel` with operands from Hopper's copy engine, which pads them with zeros."""
    first_t, first_o = _int8_tile_origin(n_tokens, n_outputs, TOKENS, OUTPUTS, TOGETHER)
    sums = tl.zeros((TOKENS, OUTPUTS), tl.int32)
    for start in range(0, n_inputs, INPUTS):
        a = codes.load([first_t, start])
        b = weight.load([first_o, start])
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    _int8_store(
        sums, first_t + tl.arange(0, TOKENS), first_o + tl.arange(0, OUTPUTS),
        y, token_scale, zero, scale, row_sum, bias, n_tokens, n_outputs, HAS_ZERO, HAS_BIAS,
    )  # fmt: skip
