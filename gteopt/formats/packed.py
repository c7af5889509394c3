"""Code that all formats share: check a layer's tensors, assemble its weight, order its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from gteopt.config.recipe import GroupSize, LayerScheme, NumberFormat
from gteopt.errors import IntegrityError, UnsupportedError, join_problems
from gteopt.quant.affine import PackedWeight
from gteopt.quant.grid import symmetric_zero_point
from gteopt.quant.packing import pack_codes, packed_width, unpack_codes

Config = Mapping[str, Any]
"""The parsed `quantization_config` of a config.json."""


@dataclass(frozen=True)
class LinearShape:
    """Output and input features of a linear layer, without padding."""

    out_features: int
    in_features: int


@dataclass(frozen=True)
class ReadLayer:
    """A layer that was read from a checkpoint.

    Attributes:
        weight: codes, scales and zero points.
        order: int64 [I], the input feature that each column of `weight` multiplies; None when
            columns are in the order of the features.
    """

    weight: PackedWeight
    order: Tensor | None = None


def check_tensors(
    subject: str,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]],
    optional: frozenset[str] = frozenset(),
) -> None:
    """Check that tensors have the wanted names, dtypes (None: any) and shapes.

    Raises:
        IntegrityError: lists every tensor that is missing, unknown or of another dtype or shape.
    """
    problems = [f"'{n}' is missing" for n in wanted if n not in tensors and n not in optional]
    problems += [f"'{name}' does not belong here" for name in tensors if name not in wanted]
    for name, (dtype, shape) in wanted.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if dtype not in (None, tensor.dtype) or tuple(tensor.shape) != shape:
            kind = f"{dtype} " if dtype is not None else ""
            problems.append(
                f"'{name}' is {tensor.dtype} {list(tensor.shape)}, expected {kind}{list(shape)}"
            )
    if problems:
        raise IntegrityError(join_problems(subject, problems))


def group_size_of(subject: str, in_features: int, n_groups: int) -> GroupSize:
    """The group size that splits `in_features` into `n_groups`.

    Raises:
        UnsupportedError: gteopt's kernels have no such group size.
    """
    if n_groups == 1:
        return "per_channel"
    for size in get_args(GroupSize):
        if isinstance(size, int) and size * n_groups == in_features:
            return size  # type: ignore[return-value]
    raise UnsupportedError(
        f"{subject}: {n_groups} groups of {in_features} input features are not supported "
        f"(supported group sizes: 32, 64, 128, or one group per row)"
    )


def feature_order(subject: str, groups: Tensor, n_groups: int) -> Tensor | None:
    """The order of input features that makes groups consecutive; None when they already are.

    Args:
        subject: name of the layer in error messages.
        groups: integers [I], the group of each input feature (`g_idx`).
        n_groups: G; every group must have I / G features.

    Raises:
        IntegrityError: groups have unequal sizes, or a group number is not below G.
    """
    groups = groups.long()
    width = len(groups) // n_groups
    wanted = torch.arange(n_groups, device=groups.device).repeat_interleave(width)
    if torch.equal(groups, wanted):
        return None
    order = torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], wanted):
        raise IntegrityError(
            f"{subject}: 'g_idx' does not put {width} input features into each of {n_groups} groups"
        )
    return order


@dataclass(frozen=True)
class StoredCodes:
    """Codes, scales and zero points of one layer of a checkpoint.

    Attributes:
        qweight: codes in gteopt's packing, uint8 [O, B].
        in_features: I; the packing may pad it.
        scale: [O, G], any float dtype.
        zero: zero points, uint8 [O, G].
        bits: bits per code.
    """

    qweight: Tensor
    in_features: int
    scale: Tensor
    zero: Tensor
    bits: int


@dataclass(frozen=True)
class Activations:
    """How a layer's inputs are quantized; `outliers` is LLM.int8()'s threshold."""

    bits: int = 16
    symmetric: bool = True
    outliers: float | None = None


def assemble_weight(
    subject: str,
    stored: StoredCodes,
    activations: Activations,
    *,
    number_format: NumberFormat = "int",
    group_size: GroupSize | None = None,
) -> PackedWeight:
    """Build the packed weight from stored codes, scales and zero points.

    The codes stay packed, because unpacking and packing them again would dominate the load time.

    Scales in bfloat16 or float32 are rounded to float16. This is exact for bfloat16 from 2^-14 on.
    A weight whose zero points are all 2^(bits - 1) becomes symmetric.

    Args:
        subject: name of the layer in error messages.
        stored: see `StoredCodes`.
        activations: see `Activations`.
        number_format: the numbers that the codes stand for.
        group_size: when None, it follows from the shape of the scales.

    Raises:
        UnsupportedError: gteopt's kernels do not have these bits, groups or scales.
    """
    bits, in_features, zero = stored.bits, stored.in_features, stored.zero
    if bits not in (2, 3, 4, 8):
        raise UnsupportedError(f"{subject}: {bits}-bit weights (supported: 2, 3, 4, 8)")
    rounded = stored.scale.to(torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise UnsupportedError(f"{subject}: a scale is not finite or exceeds float16's 65504")
    group_size = group_size or group_size_of(subject, in_features, rounded.shape[1])
    symmetric = bool((zero == 1 << (bits - 1)).all())
    if activations.bits == 8 and (bits, group_size, symmetric) != (8, "per_channel", True):
        raise UnsupportedError(
            f"{subject}: int8 activations with {bits}-bit weights in "
            f"{'one group' if group_size == 'per_channel' else f'groups of {group_size}'}"
            f"{'' if symmetric else ' with zero points'} (supported: symmetric 8-bit weights with "
            f"one scale per output feature)"
        )
    scheme = LayerScheme.model_validate(
        {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "activation_bits": activations.bits,
            "activation_symmetric": activations.symmetric,
            "activation_outliers": activations.outliers,
            "number_format": number_format,
        }
    )
    qzero = None if symmetric else pack_codes(zero, bits)
    return PackedWeight(stored.qweight, rounded, qzero, scheme, in_features)


def trim_codes(packed: Tensor, bits: int, n: int) -> Tensor:
    """Dense bytes [R, B], without the bytes and bits after the first `n` codes of a row."""
    if n * bits % 8:
        return pack_codes(unpack_codes(packed, bits, n), bits)
    return packed[:, : packed_width(n, bits)].contiguous()


def stored_zero_points(weight: PackedWeight) -> Tensor:
    """The zero points, uint8 [O, G]; those of a symmetric weight are filled in."""
    if weight.qzero is None:
        return torch.full_like(weight.scale, symmetric_zero_point(weight.scheme), dtype=torch.uint8)
    return weight.unpack().zero


def as_words(packed: Tensor) -> Tensor:
    """Dense bytes uint8 [R, B] as int32 [R, ceil(B / 4)], lowest byte first, padded with 0."""
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4))
    return padded.contiguous().view(torch.int32)


def as_bytes(words: Tensor) -> Tensor:
    """int32 [R, W] as uint8 [R, 4 W], lowest byte first."""
    return words.contiguous().view(torch.uint8)
