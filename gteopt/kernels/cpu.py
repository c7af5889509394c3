"""Linear layers for the CPU that multiply packed weights without dequantizing them first."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor, nn

from gteopt.config.recipe import LayerScheme
from gteopt.kernels.reference import DequantLinear, take_outliers
from gteopt.quant.affine import PackedWeight

FEW_TOKENS = 96
"""Up to this many tokens, torch's 4-bit product is faster than a dense product of decoded weights.
On one core of a Zen 5 server it is at least twice as fast at 16 tokens, and equal near 100."""
_TINY = torch.finfo(torch.float32).tiny
"""The least scale of a token; the codes of a token of zeros are zero with any scale."""
_WEIGHT_ROWS = 256
"""Rows of a 16-bit weight that are converted to float32 at once for few tokens, so that they stay
in the cache. On one core of a Zen 3 server with 16 tokens, this is 1.3 to 4.5 times as fast as
converting the whole weight."""


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16.

    Without them, torch's bfloat16 product is 10 times slower than its float32 product.
    """
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class DenseLinearCpu(nn.Linear):
    """An unquantized linear layer with the parameters and gradients of `nn.Linear`.

    On a CPU without instructions for bfloat16, bfloat16 weights are multiplied in float32. Few
    tokens multiply a few rows at a time. float32 weights use oneDNN on AVX-512, because MKL is slow
    on AMD's processors.

    Otherwise oneDNN puts the weight into its own order in each call, which takes a quarter of a
    call with few tokens. A layer that packs keeps a second copy of the weight in that order.

    Args:
        linear: the layer whose parameters are shared.
        packs: whether to keep the copy, if oneDNN multiplies this layer.
    """

    def __init__(self, linear: nn.Linear, *, packs: bool = False) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        kind = linear.weight.dtype
        self._widen = kind == torch.bfloat16 and not multiplies_bfloat16()
        self._onednn = kind == torch.float32 and torch.cpu._is_avx512_supported()
        self._packed: Tensor | None = None
        self.packed_bytes = 0
        self.kernel = "torch.linear"
        if self._widen:
            self.kernel = "torch.linear (in fp32: no AVX512-BF16)"
        elif packs and (kind == torch.bfloat16 or self._onednn):
            self.kernel = "torch.linear (oneDNN, packed once)"
            if not linear.weight.is_meta:
                self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
                self.packed_bytes = linear.weight.numel() * linear.weight.element_size()
        elif self._onednn:
            self.kernel = "torch.linear (oneDNN)"

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        packed = self._packed
        if packed is not None and x.dtype == packed.dtype and not self._needs_gradient(x):
            return _onednn_linear(x, packed, self.bias)
        weight = self._plain_weight()
        if weight.is_meta or self._needs_gradient(x):
            return nn.functional.linear(x, weight, self.bias)
        if self._widen:
            return self._widened(x.reshape(-1, self.in_features)).view(
                *x.shape[:-1], self.out_features
            )
        if self._onednn and x.dtype == torch.float32 and x.numel():
            return _onednn_linear(x, weight, self.bias)
        return nn.functional.linear(x, weight, self.bias)

    def _plain_weight(self) -> Tensor:
        """[O, I] in the order of the file; a layer may hold it in oneDNN's order only."""
        plain = self._parameters["weight"]
        if plain is None:
            assert self._packed is not None
            return self._packed.to_dense()
        return plain

    def _needs_gradient(self, x: Tensor) -> bool:
        """Whether a gradient flows back through the layer."""
        plain = self._parameters["weight"]
        has_gradient = x.requires_grad or (plain is not None and plain.requires_grad)
        return torch.is_grad_enabled() and has_gradient

    def _widened(self, x: Tensor) -> Tensor:
        wide = x.float()
        bias = None if self.bias is None else self.bias.float()
        if len(x) > FEW_TOKENS:
            return nn.functional.linear(wide, self.weight.float(), bias).to(x.dtype)
        y = wide.new_empty(self.out_features, len(x))
        for start in range(0, self.out_features, _WEIGHT_ROWS):
            rows = self.weight[start : start + _WEIGHT_ROWS].float()
            torch.mm(rows, wide.t(), out=y[start : start + _WEIGHT_ROWS])
        product = y.t() if bias is None else y.t() + bias
        return product.to(x.dtype, memory_format=torch.contiguous_format)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The linear layer of oneDNN; the weight is plain or packed, and has the dtype of x."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Product(Protocol):
    """Packed int8 weights of a layer: codes [tokens, I] to float32 products [tokens, O].

    Codes are integers in float32. The bytes codes + zero, from 0 to 255, are multiplied, and the
    part of zero is subtracted again. The int32 sums are multiplied by the weight's scales.
    """

    def __call__(self, codes: Tensor, zero: int) -> Tensor: ...


class _FbgemmPacking:
    """The process-wide state in which FBGEMM packs weights.

    It sets torch's engine, and silences the warning that tensors with scales are deprecated
    (`_OneDnn` needs no such tensor). Several threads may pack: the first one sets this state, and
    the last one resets it.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._n_inside = 0
        self._outside = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._n_inside += 1
            if self._n_inside > 1:
                return
            self._outside.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UserWarning)
            engines = torch.backends.quantized
            self._outside.callback(setattr, engines, "engine", engines.engine)
            engines.engine = "fbgemm"

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                self._outside.close()


_FBGEMM_PACKING = _FbgemmPacking()


class _Fbgemm:
    """FBGEMM's product, which converts and scales in one pass.

    At 16 tokens, it takes less than half the time of oneDNN's product with its epilogue. Both are
    about equal at 1024 tokens (MiniLM's layers on one core of a Zen 3 server).
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        with _FBGEMM_PACKING:
            quantized = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, codes: Tensor, zero: int) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            codes, 1.0, zero, self._packed
        )
        return product


class _OneDnn:
    """oneDNN's product, for builds of torch without FBGEMM."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale, self._zeros = scale, torch.zeros(len(scale), dtype=torch.int32)

    def __call__(self, codes: Tensor, zero: int) -> Tensor:
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            (codes + zero).to(torch.uint8),
            *(1.0, zero, self._packed, self._scale, self._zeros, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return product


class _IntMm:
    """torch's product of two matrices of signed bytes, which packs the weight in each call.

    For few tokens it is sometimes the fastest, because it needs no other operation.
    """

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._weight = weight.t().contiguous()  # [I, O], the layout that is packed fastest
        self._scale = scale
        self._row = weight.sum(1, dtype=torch.int32)  # [O]

    def __call__(self, codes: Tensor, zero: int) -> Tensor:
        # codes + zero is 0 to 255, which is no signed byte until 128 is subtracted.
        below = zero - 128
        sums: Tensor = torch._int_mm(codes.add(below).to(torch.int8), self._weight)
        if below:
            sums = sums.sub_(self._row * below)
        return sums.float().mul_(self._scale)


INT8_PRODUCTS: dict[str, Callable[[Tensor, Tensor], _Product]] = {
    "fbgemm": _Fbgemm,
    "onednn": _OneDnn,
    "int_mm": _IntMm,
}
"""Products of int8 weights [O, I] and their float32 scales [O] by name. All products that sum
exactly give the same bits: one int32 sum times one float32 scale."""


@lru_cache(maxsize=1)
def _product() -> Callable[[Tensor, Tensor], _Product] | None:
    """The first of `INT8_PRODUCTS` that this build of torch has."""
    return next((kind for kind in INT8_PRODUCTS.values() if _runs(kind)), None)


def _runs(kind: Callable[[Tensor, Tensor], _Product]) -> bool:
    try:
        kind(torch.ones(8, 8, dtype=torch.int8), torch.ones(8))(torch.ones(1, 8), 0)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def exact_products() -> tuple[str, ...]:
    """Names of the products that sum exactly here, with activations of `activation_bits` bits."""
    bits = activation_bits()
    return tuple(
        name for name, kind in INT8_PRODUCTS.items() if bits and _runs(kind) and _sums(kind, bits)
    )


def _sums(kind: Callable[[Tensor, Tensor], _Product], bits: int) -> bool:
    """Whether the product sums the largest values of that many bits exactly."""
    layer, most = kind(torch.full((256, 256), 127, dtype=torch.int8), torch.ones(256)), 2**bits - 1
    sums = layer(torch.full((64, 256), float(most)), 0)
    return bool((sums == most * 127 * 256).all())


class _ByTokens:
    """One product for few tokens and another for many, each with its own copy of the weight."""

    def __init__(self, few: _Product, many: _Product) -> None:
        self._few, self._many = few, many

    def __call__(self, codes: Tensor, zero: int) -> Tensor:
        return (self._few if len(codes) <= FEW_TOKENS else self._many)(codes, zero)


@dataclass(frozen=True)
class CpuProducts:
    """The products of a layer, by their names in `INT8_PRODUCTS` or `INT4_PRODUCTS`.

    Attributes:
        few: for up to `FEW_TOKENS` tokens in a call.
        many: for more tokens.
    """

    few: str
    many: str

    def __str__(self) -> str:
        if self.few == self.many:
            return self.few
        return f"{self.few} to {FEW_TOKENS} tokens, {self.many} beyond"


@lru_cache(maxsize=1)
def activation_bits() -> int:
    """Bits of activations whose products with int8 weights this CPU sums exactly: 8, 7 or 0.

    0 means that this build of torch has no such product. Without VNNI, x86 adds two products of an
    unsigned and a signed byte in 16 bits and saturates: 255 * 127 * 2 does not fit, 127 * 127 * 2
    does. Multiplying the extreme values shows which case applies.
    """
    product = _product()
    if product is None:
        return 0
    return 8 if _sums(product, 8) else 7


@dataclass(frozen=True)
class TokenCodes:
    """The input of an int8 product: tokens rounded by their own range, x ~ (codes - zero) * scale.

    Attributes:
        codes: integers in float32 [tokens, I], of `activation_bits` bits.
        scale: float32 [tokens, 1].
        shift: float32 [tokens, 1], -zero * scale; None if zero is 0.
        outliers: see `take_outliers`; None without outliers.
        columns: see `take_outliers`; empty without outliers.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    outliers: Tensor | None = None
    columns: Tensor | tuple[()] = ()


class Int8LinearCpu(nn.Module):
    """int8 weights times rounded activations, summed in int32 (by VNNI or AMX if present).

    Each token's input is rounded by its own range, as `quantize_tokens` does, to as many bits as
    this CPU multiplies exactly (`activation_bits`). A token's zero point z changes every sum by z
    times the sum of the weight's row. The product applies the weight's scale; zero point, token
    scale and bias follow in float32, and the result is rounded once to x's dtype. Layers with the
    same input may share its codes: `multiply(quantize(x))` is `forward(x)`.

    The library packs the weight in its own order, outside any buffer; `packed_bytes` counts it.
    Layers that multiply outliers also keep it in the plain order.

    Buffers: scale float32 [O]; row float32 [1, O], the sum of each row of weights times its scale;
    bias float32 [O] or None; weight int8 [O, I], or None without outliers.
    """

    kernel = "cpu.int8"
    weight: Tensor | None
    scale: Tensor
    row: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, products: CpuProducts | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.symmetric = weight.scheme.activation_symmetric
        self.outliers = weight.scheme.activation_outliers
        self.rounding = ("int8", self.symmetric, self.outliers)
        codes, scale = signed_codes(weight)
        self.bits = activation_bits()
        self.kernel = self.name_here(products)
        self._product = _multiplier(codes, scale, products)
        self.packed_bytes = codes.numel() * _n_copies(products)
        self.register_buffer("scale", scale)
        # A product with ones is an exact sum, and several times as fast as torch's.
        self.register_buffer("row", self._product(torch.ones(1, self.in_features), 0))
        self.register_buffer("bias", None if bias is None else bias.float().cpu())
        self.register_buffer("weight", None if self.outliers is None else codes)
        self._middle = 1 << (self.bits - 1) if self.symmetric else 0

    @classmethod
    def name_here(cls, products: CpuProducts | None = None) -> str:
        """`kernel` of a layer on this machine."""
        return _named(cls.kernel, products)

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether torch has an int8 product here; with outliers, it must take 8-bit activations.

        LLM.int8() is compared with bitsandbytes, whose activations have 8 bits.
        """
        return activation_bits() >= (1 if weight.scheme.activation_outliers is None else 8)

    def quantize(self, x: Tensor) -> TokenCodes:
        """[tokens, I] of any float dtype to the input of `multiply`."""
        outliers: Tensor | None = None
        columns: Tensor | tuple[()] = ()
        if self.outliers is not None:
            x, outliers, columns = take_outliers(x, self.outliers)
        is_copy = x.dtype != torch.float32
        x = x.float()
        most = (1 << self.bits) - 1
        if self.symmetric:
            scale = x.abs().amax(-1, keepdim=True).div_(most >> 1).clamp_min_(_TINY)
            codes = (x.div_(scale) if is_copy else x / scale).round_()
            return TokenCodes(codes, scale, None, outliers, columns)
        low = x.amin(-1, keepdim=True).clamp_max_(0)
        scale = x.amax(-1, keepdim=True).clamp_min_(0).sub_(low).div_(most).clamp_min_(_TINY)
        least = low.div_(scale).round_()  # the zero point, negative
        codes = (x.div_(scale) if is_copy else x / scale).round_().sub_(least)
        if self.bits == 8:
            codes.clamp_max_(most)  # both ends may round up; with 7 bits one more is still exact
        return TokenCodes(codes, scale, least.mul_(scale), outliers, columns)

    def multiply(self, x: TokenCodes, dtype: torch.dtype) -> Tensor:
        """[tokens, O] of a dtype."""
        # In place and by element, because MKL's product of one column (addmm) makes this up to
        # 1.25 times as slow on one core of a Zen 3 server.
        y = self._product(x.codes, self._middle).mul_(x.scale)
        if x.shift is not None:
            y.addcmul_(x.shift, self.row)
        if self.bias is not None:
            y.add_(self.bias)
        if self.weight is not None and x.outliers is not None and len(x.columns):
            dense = self.weight[:, x.columns].float().mul_(self.scale[:, None])
            y.addmm_(x.outliers.float(), dense.t())
        return y.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        flat = x.reshape(-1, self.in_features)
        if not len(flat):
            return x.new_empty(*x.shape[:-1], self.out_features)
        y = self.multiply(self.quantize(flat), x.dtype)
        return y.view(*x.shape[:-1], self.out_features)


class StaticInt8LinearCpu(nn.Module):
    """int8 weights times inputs rounded by a fixed grid (`InputGrid`), summed in int32.

    If this CPU is exact for 7 bits of activations only, every second code is used. Scales are
    folded into the weight, and zero points into the bias. So an input needs one multiplication,
    one addition and one rounding before the product.

    Buffers: inverse, zero float32 [I], a code is round(x * inverse + zero); offset float32 [O], the
    bias minus the zero points' part of the sums.
    """

    kernel = "cpu.int8 static"
    inverse: Tensor
    zero: Tensor
    offset: Tensor

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, products: CpuProducts | None = None
    ) -> None:
        super().__init__()
        assert weight.inputs is not None
        self.in_features, self.out_features = weight.in_features, weight.out_features
        codes, scale = signed_codes(weight)
        bits = activation_bits()
        self.kernel = self.name_here(products)
        steps = 1 << (8 - bits)  # grid steps between two codes
        self._product = _multiplier(codes, scale * steps, products)
        self._most = (1 << bits) - 1
        self.packed_bytes = codes.numel() * _n_copies(products)
        grid = weight.inputs.to("cpu")
        offset = -(codes.float() @ grid.zero) * scale
        self.register_buffer("inverse", 1 / (grid.scale * steps))
        self.register_buffer("zero", grid.zero / steps)
        self.register_buffer("offset", offset if bias is None else offset + bias.float().cpu())

    @classmethod
    def name_here(cls, products: CpuProducts | None = None) -> str:
        """`kernel` of a layer on this machine."""
        return _named(cls.kernel, products)

    @staticmethod
    def fits(weight: PackedWeight, dtype: torch.dtype) -> bool:
        """Whether torch has an int8 product here."""
        return activation_bits() > 0

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O], in x's dtype."""
        flat = x.reshape(-1, self.in_features).float()
        if not len(flat):
            return x.new_empty(*x.shape[:-1], self.out_features)
        codes = torch.addcmul(self.zero, flat, self.inverse).round_().clamp_(0, self._most)
        y = self._product(codes, 0).add_(self.offset)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)


def signed_codes(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """int8 codes [O, I] around zero and their float32 scales [O] of a symmetric 8-bit weight."""
    # Flipping the top bit of an unsigned code subtracts the zero point 128.
    codes = (weight.qweight ^ 128).view(torch.int8).cpu().contiguous()
    return codes, weight.scale[:, 0].float().cpu()


def _multiplier(codes: Tensor, scale: Tensor, products: CpuProducts | None) -> _Product:
    """The product of a layer; None means the first one that torch has."""
    if products is None:
        product = _product()
        assert product is not None, "`fits` asks activation_bits first"
        return product(codes, scale)
    few = INT8_PRODUCTS[products.few](codes, scale)
    if products.few == products.many:
        return few
    return _ByTokens(few, INT8_PRODUCTS[products.many](codes, scale))


def _n_copies(products: CpuProducts | None) -> int:
    """Copies of the weight, each in the order of its product's library."""
    return 1 if products is None or products.few == products.many else 2


def _named(kernel: str, products: CpuProducts | None) -> str:
    """`kernel` of an int8 layer, with notes on chosen products and on activations below 8 bits."""
    notes = [] if products is None else [str(products)]
    if (bits := activation_bits()) != 8:
        notes.append(f"activations of {bits} bits: no VNNI")
    return f"{kernel} ({'; '.join(notes)})" if notes else kernel


class DecodedLinearCpu(DenseLinearCpu):
    """A quantized layer whose weight is decoded once, and then used as an unquantized one.

    It is as fast and as large as the unquantized layer. Activations are not rounded. Where oneDNN
    multiplies, the weight is held in oneDNN's order only.
    """

    def __init__(self, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> None:
        linear = nn.Linear(weight.in_features, weight.out_features, bias=False, device="meta")
        decoded = DequantLinear(weight, None).dequantized(dtype)
        linear.weight = nn.Parameter(decoded, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        super().__init__(linear, packs=True)
        if self._packed is not None:
            self.register_parameter("weight", None)
        self.kernel = self.decoded_name(weight.scheme, dtype)

    @staticmethod
    def decoded_name(scheme: LayerScheme, dtype: torch.dtype) -> str:
        """`kernel` of a layer on this machine."""
        kind = scheme.number_format if scheme.number_format != "int" else f"int{scheme.bits}"
        short = dtype == torch.bfloat16 and multiplies_bfloat16()
        return f"decoded ({kind} weights, {'bf16' if short else 'fp32'} products)"
