"""What every format shares: the layer that was read, its shape, its order of input features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from gteopt.config.recipe import GroupSize, LayerScheme, NumberFormat
from gteopt.errors import IntegrityError, UnsupportedError, join_problems
from gteopt.quant.affine import PackedWeight
from gteopt.quant.grid import middle
from gteopt.quant.packing import pack_codes, packed_width, unpack_codes

Config = Mapping[str, Any]
"""`quantization_config` of a config.json, as it was parsed."""


@dataclass(frozen=True)
class Shape:
    """Features of a linear layer, as the architecture has them."""

    out_features: int
    in_features: int


@dataclass(frozen=True)
class ReadLayer:
    """A layer as it was found in a checkpoint.

    Attributes:
        weight: its codes and grid.
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
    """Compare names, dtypes (None: any) and shapes.

    Raises:
        IntegrityError: lists every tensor that is missing, unknown or of another shape.
    """
    problems = [f"'{n}' is missing" for n in wanted if n not in tensors and n not in optional]
    problems += [f"'{name}' does not belong here" for name in tensors if name not in wanted]
    for name, (dtype, shape) in wanted.items():
        found = tensors.get(name)
        if found is None:
            continue
        if dtype not in (None, found.dtype) or tuple(found.shape) != shape:
            kind = f"{dtype} " if dtype is not None else ""
            problems.append(
                f"'{name}' is {found.dtype} {list(found.shape)}, expected {kind}{list(shape)}"
            )
    if problems:
        raise IntegrityError(join_problems(subject, problems))


def group_size_of(subject: str, in_features: int, n_groups: int) -> GroupSize:
    """The group size that cuts `in_features` into `n_groups`.

    Raises:
        UnsupportedError: one that gteopt's kernels do not have.
    """
    if n_groups == 1:
        return "per_channel"
    for size in get_args(GroupSize):
        if isinstance(size, int) and size * n_groups == in_features:
            return size  # type: ignore[return-value]
    raise UnsupportedError(
        f"{subject}: {n_groups} groups of {in_features} input features are not supported "
        f"(supported group sizes: 32, 64, 128, or one group a row)"
    )


def feature_order(subject: str, groups: Tensor, n_groups: int) -> Tensor | None:
    """The order that makes groups consecutive; None when they already are.

    Args:
        subject: named in errors.
        groups: integers [I], the group of each input feature (`g_idx`).
        n_groups: G; every group must have I / G features.

    Raises:
        IntegrityError: groups of unequal size, or beyond G.
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
    """Codes and grid of one layer, as a checkpoint holds them.

    Attributes:
        qweight: codes in gteopt's packing, uint8 [O, B].
        in_features: I, which the packing may have padded.
        scale: [O, G], any float dtype.
        zero: uint8 [O, G].
        bits: of a code.
    """

    qweight: Tensor
    in_features: int
    scale: Tensor
    zero: Tensor
    bits: int


@dataclass(frozen=True)
class Activations:
    """How a layer's inputs are rounded; `outliers` is LLM.int8()'s threshold."""

    bits: int = 16
    symmetric: bool = True
    outliers: float | None = None


def assemble(
    subject: str,
    stored: StoredCodes,
    activations: Activations,
    *,
    number_format: NumberFormat = "int",
    group_size: GroupSize | None = None,
) -> PackedWeight:
    """The packed weight that these codes and their grid are.

    Packed codes are kept as they are: unpacking and packing them again would take most of a load.

    Scales in bfloat16 or float32 are rounded to float16. This is exact for bfloat16 from 2^-14 on.
    A weight whose zero points are all in the middle becomes symmetric.

    Args:
        subject: named in errors.
        stored: see `StoredCodes`.
        activations: see `Activations`.
        number_format: what the codes are.
        group_size: read off the scales' shape when None.

    Raises:
        UnsupportedError: bits, groups or scales that gteopt's kernels do not have.
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
            f"one scale an output feature)"
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


def cut(packed: Tensor, bits: int, n: int) -> Tensor:
    """Dense bytes [R, B] without those, and the bits, that are beyond `n` codes."""
    if n * bits % 8:
        return pack_codes(unpack_codes(packed, bits, n), bits)
    return packed[:, : packed_width(n, bits)].contiguous()


def zero_points(weight: PackedWeight) -> Tensor:
    """uint8 [O, G], also of a symmetric weight."""
    if weight.qzero is None:
        return torch.full_like(weight.scale, middle(weight.scheme), dtype=torch.uint8)
    return weight.unpack().zero


def as_words(packed: Tensor) -> Tensor:
    """Dense bytes uint8 [R, B] as int32 [R, ceil(B / 4)], lowest byte first, padded with 0."""
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4))
    return padded.contiguous().view(torch.int32)


def as_bytes(words: Tensor) -> Tensor:
    """int32 [R, W] as uint8 [R, 4 W], lowest byte first."""
    return words.contiguous().view(torch.uint8)
