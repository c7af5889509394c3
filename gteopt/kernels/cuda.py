"""Linear layers for NVIDIA GPUs, in Triton and torch's own 8-bit float product.

Hides: tiles, launches, and how packed codes become operands on the way to the tensor cores. Imports
triton, which comes with torch where there is a GPU; `kernels/__init__.py` imports this file only
for layers that are to run on one. Under TRITON_INTERPRET=1 the same kernels run on the CPU, which
is how they are tested without a GPU.

Every launch is an operator of torch's (`torch.ops.gteopt`) that says what it returns, so that
torch.compile takes the layers whole and a forward pass can be followed without data. None of them
waits for the GPU or reads a number from it: all can be recorded in a CUDA graph.

Shapes: T tokens, O output features, I input features, G groups, S parts that I is split into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from triton.errors import TritonError
from triton.tools.tensor_descriptor import TensorDescriptor

from gteopt.quant.affine import PackedWeight
from gteopt.quant.grid import E4M3_MAX, NF4_LEVELS, group_width, middle
from gteopt.quant.packing import unpack_codes

_FEW_TOKENS = 64
"""Up to here 4-bit weights are multiplied as they are read; beyond, a bfloat16 copy of the layer
lives for one call, since each tile of tokens would otherwise decode the whole weight again."""
_PROGRAMS = 528
"""Blocks of work of a 4-bit product: four for each of the 132 multiprocessors of an H100. Each has
three steps of 2 KB of weights under way, 24 KB together, which is about what 4.8 TB/s need at
0.7 us of latency (25 KB); by this calculation, not yet by measurement."""


class Tile(NamedTuple):
    """What one program computes at once: tokens x outputs, so many inputs a step.

    Attributes:
        n_stages: steps of inputs that are on their way at once.
        copies: whether Hopper's copy engine fetches them, 0 or 1; inputs of the int8 product whose
            number is a multiple of 16.
    """

    tokens: int
    outputs: int
    inputs: int
    n_warps: int
    n_stages: int
    copies: int = 0


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
"""Of int8 products of many tokens: a GPU takes the one that it is fastest with, found out in the
first product of a size. Sums of whole numbers are the same in any tile. Triton (3.6, 3.9) waits for
each step's product of whole numbers before the next; of the smaller tiles two programs share a
multiprocessor, and one multiplies while the other waits."""
INT4_TILE = Tile(16, 32, 128, 4, 4)
"""Of the product of 4-bit weights with up to 16 tokens; of more it has 64 tokens."""


_LIBRARY = torch.library.Library("gteopt", "FRAGMENT")  # type: ignore[no-untyped-call]


def _operator(schema: str, run: Callable[..., object], fake: Callable[..., object]) -> None:
    """Define an operator: what it launches, and the tensors that it returns without data."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)  # type: ignore[no-untyped-call]
    for device in ("CUDA", "CPU"):  # the latter in Triton's interpreter
        _LIBRARY.impl(name, run, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"gteopt::{name}", fake, lib=_LIBRARY)


@dataclass(frozen=True)
class Before:
    """What is computed on the way into a rounding, in float32, so that it never lies in memory.

    Attributes:
        up: the other half of a gated MLP, contiguous [T, I]: silu(x) * up.
        norm: weight [I] of an RMSNorm; one of the two is None.
        epsilon: of the RMSNorm.
    """

    up: Tensor | None = None
    norm: Tensor | None = None
    epsilon: float = 0.0


_NONE = Before()


class Int8LinearCuda(nn.Module):
    """int8 weights times int8 activations on the tensor cores, summed in int32.

    Arithmetic as in `Int8LinearCpu`: a token's zero point times the sum of the weight's row is
    subtracted in int32; token scale, weight scale and bias are applied in float32 before the sum
    leaves the registers; rounded once to x's dtype. No int32 lies in memory. Layers of the same
    input may share its codes: `multiply(quantize(x))` is `forward(x)`.
    Buffers: weight int8 [O, I], row_sum int32 [O] or None, scale float32 [O], bias float32 [O] or
    None.
    """

    kernel = "cuda.int8"
    weight: Tensor
    row_sum: Tensor | None
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        symmetric = weight.scheme.activation_symmetric
        self.rounding = ("int8", symmetric)
        # Flipping the top bit of an unsigned code subtracts the zero point 128.
        self.register_buffer("weight", (weight.qweight ^ 128).view(torch.int8))
        row_sum = None if symmetric else self.weight.sum(1, dtype=torch.int32)
        self.register_buffer("row_sum", row_sum)
        self.register_buffer("scale", weight.scale[:, 0].float())
        self.register_buffer("bias", None if bias is None else bias.float())

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Any that `KERNELS` sends here."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        y = self.multiply(self.quantize(x.reshape(-1, self.in_features)), x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def quantize(
        self, x: Tensor, before: Before | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """[T, I] of any float dtype, and what is done to it before, to what `multiply` takes."""
        return quantize_tokens(x.contiguous(), symmetric=self.row_sum is None, before=before)

    def multiply(self, x: tuple[Tensor, Tensor, Tensor | None], dtype: torch.dtype) -> Tensor:
        """[T, O] of a dtype."""
        return int8_product(*x, self.weight, self.scale, self.row_sum, self.bias, dtype)


class Fp8LinearCuda(nn.Module):
    """e4m3 weights times e4m3 activations through `torch._scaled_mm`; capability 8.9 and up.

    One scale an output feature and one a token; sums in float32. The fast accumulation of Hopper's
    tensor cores (14 bits between promotions) is off unless `fast` is set: over 18,944 inputs it
    costs digits that the 8-bit operands still have; `benchmarks/gpu_layers.py` measures both.
    Layers of the same input may share its floats.
    Buffers: weight e4m3 [O, I], scale float32 [1, O], bias bfloat16 [O] or None.
    """

    kernel = "cuda.fp8"
    rounding = ("fp8",)
    fast = False
    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.register_buffer("weight", weight.qweight.view(torch.float8_e4m3fn))
        self.register_buffer("scale", weight.scale[:, 0].float()[None])
        self.register_buffer("bias", None if bias is None else bias.bfloat16())

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether `torch._scaled_mm` takes this weight: bfloat16, both sides multiples of 16."""
        whole = weight.in_features % 16 == 0 and weight.out_features % 16 == 0
        return dtype == torch.bfloat16 and whole

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 [..., I] to bfloat16 [..., O]."""
        y = self.multiply(self.quantize(x.reshape(-1, self.in_features)), x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def quantize(self, x: Tensor, before: Before | None = None) -> tuple[Tensor, Tensor]:
        """bfloat16 [T, I], and what is done to it before, to what `multiply` takes."""
        return round_tokens(x.contiguous(), before=before)

    def multiply(self, x: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        """[T, O] of a dtype, bfloat16 to be exact."""
        floats, scale = x
        product = torch._scaled_mm(
            floats,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=self.fast,
        )
        return product.to(dtype)


class Int4LinearCuda(nn.Module):
    """4-bit weights, whole numbers or NF4, times 16-bit activations; sums in float32.

    Few tokens: codes are decoded in registers, and a group's scale is applied to its sum. Many:
    the layer is decoded into x's dtype and multiplied by cuBLAS. One packed copy serves both.
    Buffers: qweight uint8 [O, I / 2], scale float16 [O, G], zero uint8 [O, G] or None, bias [O] or
    None.
    """

    kernel = "cuda.int4"
    few_tokens = _FEW_TOKENS
    qweight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.nf4 = weight.scheme.number_format == "nf4"
        self.middle = middle(weight.scheme)
        zero = None
        if weight.qzero is not None:
            zero = unpack_codes(weight.qzero, 4, weight.scale.shape[1]).contiguous()
        levels = torch.tensor(NF4_LEVELS, device=weight.qweight.device) if self.nf4 else None
        self.register_buffer("qweight", weight.qweight)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero", zero)
        self.register_buffer("levels", levels)
        self.register_buffer("bias", bias)

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether groups are whole steps of a tensor core."""
        width = group_width(weight.in_features, weight.scheme.group_size)
        step = min(128, width)
        return weight.scheme.bits == 4 and step >= 16 and not step & (step - 1) and not width % step

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        flat = x.reshape(-1, self.in_features).contiguous()
        if len(flat) > _FEW_TOKENS:
            y = nn.functional.linear(flat, self.decoded(x.dtype), self.bias)
        else:
            y = self.multiply(flat)
        return y.view(*x.shape[:-1], self.out_features)

    def multiply(self, x: Tensor, tile: Tile = INT4_TILE) -> Tensor:
        """Contiguous [T, I] to [T, O] for few tokens, from the codes."""
        own = (self.qweight, self.scale, self.zero, self.levels, self.bias, self.middle)
        found: Tensor = torch.ops.gteopt.int4_product(x, *own, tile)
        return found

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] in `dtype`, rounded once."""
        found: Tensor = torch.ops.gteopt.decode_int4(
            self.qweight, self.scale, self.zero, self.levels, self.middle, dtype
        )
        return found


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
    numbers: list[int],
) -> Tensor:
    (n_tokens, n_inputs), n_outputs, n_groups = x.shape, len(qweight), scale.shape[1]
    y = torch.empty(n_tokens, n_outputs, dtype=x.dtype, device=x.device)
    if not n_tokens:
        return y
    width = n_inputs // n_groups
    tile = Tile(*numbers)
    inputs, outputs = min(tile.inputs, width), tile.outputs
    tokens = tile.tokens if n_tokens <= tile.tokens else 64
    programs = triton.cdiv(n_outputs, outputs)
    steps = n_inputs // inputs
    # Sums of parts are kept apart and added in order: atomics would add them in any.
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


_operator(
    "decode_int4(Tensor qweight, Tensor scale, Tensor? zero, Tensor? levels, int middle, "
    "ScalarType dtype) -> Tensor",
    _decode_int4,
    lambda qweight, scale, zero, levels, middle, dtype: qweight.new_empty(
        len(qweight), 2 * qweight.shape[1], dtype=dtype
    ),
)
_operator(
    "int4_product(Tensor x, Tensor qweight, Tensor scale, Tensor? zero, Tensor? levels, "
    "Tensor? bias, int middle, int[] tile) -> Tensor",
    _int4_product,
    lambda x, qweight, scale, zero, levels, bias, middle, tile: x.new_empty(len(x), len(qweight)),
)


def quantize_tokens(
    x: Tensor, *, symmetric: bool, before: Before | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`quant.affine.quantize_tokens` of x [T, I] in one pass over memory; the same numbers.

    Returns:
        int8 [T, I], float32 scale [T, 1], int32 zero points [T] or None.
    """
    b = before or _NONE
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
    # An operator returns no None.
    zero = torch.empty(0 if symmetric else len(x), dtype=torch.int32, device=x.device)
    return codes, scale, zero


_operator(
    "quantize_tokens(Tensor x, bool symmetric, Tensor? up, Tensor? norm, float epsilon) -> "
    "(Tensor, Tensor, Tensor)",
    _quantize_tokens,
    _token_codes,
)


def round_tokens(x: Tensor, *, before: Before | None = None) -> tuple[Tensor, Tensor]:
    """Round each token of x [T, I] to 8-bit floats by its own scale, max |x| / 448.

    Returns:
        e4m3 [T, I], float32 scale [T, 1].
    """
    b = before or _NONE
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


_operator(
    "round_tokens(Tensor x, Tensor? up, Tensor? norm, float epsilon) -> (Tensor, Tensor)",
    _round_tokens,
    _token_floats,
)


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
        row_sum: int32 [O], sums of the weight's rows; with `zero`.
        bias: float32 [O] or None.
        dtype: of the result.
        tile: see `Tile`; None is the fastest.
    """
    found: Tensor = torch.ops.gteopt.int8_product(
        *(codes, token_scale, zero, weight, scale, row_sum, bias, dtype),
        () if tile is None else tile,
    )
    return found


def _int8_product(
    codes: Tensor,
    token_scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    row_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    numbers: list[int],
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
        tile = Tile(*numbers) if numbers else int8_tile(n_tokens)
        if not numbers and tile is LARGE_TILES[0] and codes.is_cuda:
            # Beyond 8192 tokens there are programs enough for any tile.
            size = (codes.device.index, min(n_tokens, 8192).bit_length(), n_outputs, n_inputs)
            tile = _fastest(size, [each for each in LARGE_TILES if _fits(each, codes)], launch)
        launch(tile)
    return y


_FASTEST: dict[tuple[int, ...], Tile] = {}


def fastest_tiles() -> dict[tuple[int, ...], Tile]:
    """What was chosen so far: (GPU, bits of the number of tokens, outputs, inputs) -> tile."""
    return dict(_FASTEST)


def _fits(tile: Tile, codes: Tensor) -> bool:
    """Whether a GPU, and codes [T, I] by their width, are ones for this tile."""
    if not tile.copies:
        return True
    return codes.shape[1] % 16 == 0 and torch.cuda.get_device_capability(codes.device) >= (9, 0)


def _fastest(size: tuple[int, ...], tiles: Sequence[Tile], launch: Callable[[Tile], None]) -> Tile:
    """The fastest of some tiles for products of a size, measured when it is first met."""
    if size in _FASTEST or torch.cuda.is_current_stream_capturing():  # where nothing can be timed
        return _FASTEST.get(size, tiles[0])
    best, least = tiles[0], float("inf")
    for tile in tiles:
        try:
            launch(tile)  # compiles
        except (TritonError, RuntimeError):  # less shared memory than on an H100, say
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


_operator(
    "int8_product(Tensor codes, Tensor token_scale, Tensor? zero, Tensor weight, Tensor scale, "
    "Tensor? row_sum, Tensor? bias, ScalarType dtype, int[] tile) -> Tensor",
    _int8_product,
    lambda codes, token_scale, zero, weight, scale, row_sum, bias, dtype, tile: codes.new_empty(
        len(codes), len(weight), dtype=dtype
    ),
)


def gate_(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both contiguous [T, I], in place of `gate`; rounded once."""
    torch.ops.gteopt.gate_(gate, up)
    return gate


def _gate(gate: Tensor, up: Tensor) -> None:
    if gate.numel():
        _gate_kernel[(triton.cdiv(gate.numel(), 1024),)](gate, up, gate.numel(), BLOCK=1024)


_operator("gate_(Tensor(a!) gate, Tensor up) -> ()", _gate, lambda gate, up: None)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`runtime`'s rotary embedding of heads [T, H, d] by angles [T, 1, d], in place.

    All are contiguous, d a power of two; computed in float32, rounded once.
    """
    torch.ops.gteopt.rotate_(x, cos, sin)
    return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    n_tokens, n_heads, width = x.shape
    if n_tokens:
        heads = triton.next_power_of_2(n_heads)
        _rotate_kernel[(n_tokens,)](x, cos, sin, n_heads, HEADS=heads, HALF=width // 2)


_operator("rotate_(Tensor(a!) x, Tensor cos, Tensor sin) -> ()", _rotate, lambda x, cos, sin: None)


@triton.jit
def _rounded(x):
    # Adding 1.5 * 2^23 leaves no fraction bits: rounds to even, like torch.round, up to 2^22.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _norm_factor(x, row, n_inputs, epsilon, NORMED: tl.constexpr, BLOCK: tl.constexpr):
    """What a token is multiplied with by RMSNorm."""
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
    """Numbers of a token, see `Before`."""
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
    """One program a token: its range, then its codes (the second read comes from the cache)."""
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
    """One program a token: its largest value, then its 8-bit floats."""
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
def _int8_place(n_tokens, n_outputs, TOKENS, OUTPUTS, TOGETHER: tl.constexpr):
    """First token and output of this program's tile."""
    # Programs that run together share rows of weight: TOGETHER tiles of tokens, then the next.
    n_down = tl.cdiv(n_tokens, TOKENS)
    n_across = tl.cdiv(n_outputs, OUTPUTS)
    program = tl.program_id(0)
    band = program // (TOGETHER * n_across)
    height = tl.minimum(n_down - band * TOGETHER, TOGETHER)
    within = program % (TOGETHER * n_across)
    return (band * TOGETHER + within % height) * TOKENS, (within // height) * OUTPUTS


@triton.jit
def _int8_finish(
    sums, t, o, y, token_scale, zero, scale, row_sum, bias, n_tokens, n_outputs,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Scales, zero points and bias on the sums of a tile, and the tile to memory."""
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
    first_t, first_o = _int8_place(n_tokens, n_outputs, TOKENS, OUTPUTS, TOGETHER)
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
    _int8_finish(
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
    """The same with both operands fetched by Hopper's copy engine, which gives zeros outside."""
    first_t, first_o = _int8_place(n_tokens, n_outputs, TOKENS, OUTPUTS, TOGETHER)
    sums = tl.zeros((TOKENS, OUTPUTS), tl.int32)
    for start in range(0, n_inputs, INPUTS):
        a = codes.load([first_t, start])
        b = weight.load([first_o, start])
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    _int8_finish(
        sums, first_t + tl.arange(0, TOKENS), first_o + tl.arange(0, OUTPUTS),
        y, token_scale, zero, scale, row_sum, bias, n_tokens, n_outputs, HAS_ZERO, HAS_BIAS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def _int4_kernel(
    x, qweight, scale, zero, levels, bias, parts,
    n_tokens, n_outputs, n_inputs, n_groups, width, n_steps,
    MIDDLE: tl.constexpr, HAS_ZERO: tl.constexpr, NF4: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """Sums of one part of the inputs for a tile of tokens and outputs, plus bias if it is told."""
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
