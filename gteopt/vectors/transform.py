"""Shorten and code the vectors of a model: a fitted projection, then a code.

Hides: how projections and codes are stored and applied. Refuses to know: torch, models, files, how
anything was fitted.

Everything that depends on data is fitted once, on calibration vectors, and stored. The code of a
vector never depends on the other vectors of its batch. The function `quantize_embeddings` of
Sentence Transformers takes its int8 ranges from the batch by default. Queries and documents then
get different maps. It also rounds down, so values decode half a step too low.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gteopt.config.recipe import VectorCode
from gteopt.errors import InputError, IntegrityError, NumericsError, join_problems
from gteopt.records.manifest import CodeTrial, Similarity, VectorRecord
from gteopt.vectors.codes import (
    BinaryCode,
    Code,
    Codes,
    Float32Code,
    Floats,
    ProductQuantizer,
    RaBitQ,
    ScalarCode,
    code_bytes,
)

__all__ = ["Codes", "Floats", "VectorTransform", "checked_rows", "identity_transform", "paired_dot"]


@dataclass(frozen=True, eq=False)
class VectorTransform:
    """A fitted map from the model's vectors to shorter, cheaper ones. Shapes: F full, D kept dims.

    Example:
        >>> transform = fit(calibration_vectors, Dims(n=64), Vectors(code="int8"))
        >>> stored = transform.quantize(transform.project(vectors))  # int8 [N, 64]

    Attributes:
        similarity: "cosine" if projected rows are normalised again. "dot" if they keep their
            length, which brings their dot products closer to the model's cosines.
        rescore: `search_vectors` fetches `rescore * k` candidates by codes and reorders them.
        explained_variance_ratio: share of the calibration vectors' variance that a PCA keeps.
        rotated: whether the code rotated the kept dimensions; float dot products are the same.
        neighbours_kept: share of neighbours kept by each compared way of shortening; None if there
            was no choice.
        trials: the candidates of a choice by bytes, best first; empty if there was no choice.
        projection: [D, F], orthonormal rows (the weight of a linear layer F -> D); None keeps the
            first dimensions.
        low, high: [D]. int8 and int4: the values of the lowest and highest code. binary: the values
            of the bits, if the mean was subtracted.
        bits: bits a dimension; rabitq only.
        centre: [D], subtracted before coding; rabitq only.
        codebook: [M, 256, S] points; pq only.
        places: int32 [D], the position of each dimension in a row of M * S values; pq only.
    """

    full_dims: int
    dims: int
    method: Literal["full", "slice", "pca"] = "full"
    code: VectorCode = "float32"
    rescore: int = 1
    explained_variance_ratio: float | None = None
    rotated: bool = False
    similarity: Similarity = "cosine"
    neighbours_kept: Mapping[str, float] | None = None
    trials: tuple[CodeTrial, ...] = ()
    projection: Floats | None = None
    low: Floats | None = None
    high: Floats | None = None
    bits: int | None = None
    centre: Floats | None = None
    codebook: Floats | None = None
    places: npt.NDArray[np.int32] | None = None

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of one stored code."""
        n_bytes = len(self.codebook) if self.codebook is not None else None
        return code_bytes(self.code, self.dims, self.bits or 1, n_bytes)

    @cached_property
    def coding(self) -> Code:
        """The code with its fitted values."""
        match self.code:
            case "float32":
                return Float32Code(self.dims)
            case "int8" | "int4":
                assert self.low is not None
                assert self.high is not None
                return ScalarCode(8 if self.code == "int8" else 4, self.low, self.high)
            case "binary":
                return BinaryCode(self.dims, self.low, self.high)
            case "rabitq":
                assert self.bits is not None
                assert self.centre is not None
                return RaBitQ(self.bits, self.centre)
            case "pq":
                assert self.codebook is not None
                assert self.places is not None
                return ProductQuantizer(self.codebook, self.places)

    def project(self, x: npt.ArrayLike) -> Floats:
        """Shorten vectors [N, F] to rows [N, D]: unit rows, unless `similarity` is "dot".

        Sums are in float64, so that a row does not depend on the rows beside it. A row that the
        projection maps to zero stays zero.

        Raises:
            InputError: wrong shape.
            NumericsError: NaN or infinity in `x`.
        """
        z = checked_rows(x, self.full_dims, "vectors").astype(np.float64)
        if self.projection is None:
            z = z[:, : self.dims]
        else:
            z = z @ self.projection.T.astype(np.float64)
        if self.similarity == "dot":
            return z.astype(np.float32)
        norm = np.linalg.norm(z, axis=1, keepdims=True)
        return (z / np.where(norm > 0, norm, 1.0)).astype(np.float32)

    def quantize(self, z: npt.ArrayLike) -> Codes:
        """Code projected vectors [N, D] for storage; see `vectors.codes` for the formulas.

        Raises:
            InputError: wrong shape.
            NumericsError: NaN or infinity in `z`.
        """
        return self.coding.encode(checked_rows(z, self.dims, "projected vectors"))

    def dequantize(self, codes: Codes) -> Floats:
        """Decode stored vectors to [N, D] floats, which are not renormalised.

        Raises:
            InputError: codes of another shape or dtype than `quantize` makes.
            NumericsError: NaN or infinity in float32 codes.
        """
        self.check_codes(codes)
        return self.coding.decode(codes)

    def restore(self, stored: Floats) -> Floats:
        """Map decoded vectors [N, D] back to [N, F]; dimensions that were cut are zero."""
        if self.projection is not None:
            return stored @ self.projection
        return np.pad(stored, ((0, 0), (0, self.full_dims - self.dims)))

    def first_compared(self, queries: Floats) -> Floats:
        """The queries [Q, D] that the first pass of a search multiplies with decoded codes.

        The first pass of int8 compares codes with codes, and a second pass rescores. The other
        codes compare the float query with decoded codes, and do not rescore.
        """
        return self.dequantize(self.quantize(queries)) if self.code == "int8" else queries

    def score_pairs(self, queries: Floats, codes: Codes) -> tuple[Floats, Floats]:
        """Scores of corresponding rows, by codes alone and after rescoring; see `vectors.search`.

        Args:
            queries: [P, D] projected, float.
            codes: [P, D] or packed.

        Returns:
            Two arrays [P]; they are the same for a code that is not rescored.
        """
        self.check_codes(codes)
        if self.code == "binary":
            differing = np.bitwise_count(self.quantize(queries) ^ codes).sum(axis=1, dtype=np.int32)
            by_code = self.of_hamming(differing)
        else:
            by_code = paired_dot(self.first_compared(queries), self.dequantize(codes))
        rescored = paired_dot(queries, self.dequantize(codes)) if self.rescores else by_code
        return by_code, rescored

    def best_of(self, by_code: Floats, rescored: Floats, k: int) -> npt.NDArray[np.intp]:
        """Indices [min(k, N)] of the best pairs that `score_pairs` scored, best first."""
        candidates = np.argsort(-by_code, kind="stable")[: self.n_candidates(k)]
        candidates.sort()
        order = np.argsort(-rescored[candidates], kind="stable")
        best: npt.NDArray[np.intp] = candidates[order[:k]]
        return best

    def n_candidates(self, k: int) -> int:
        """How many stored vectors the first pass of a search for k keeps."""
        return k * self.rescore if self.rescores else k

    def of_hamming(self, distances: npt.NDArray[np.int32]) -> Floats:
        """Scores 1 - 2 H / D of Hamming distances H."""
        # Scores are compared with the rounded scores of other blocks, so they are rounded here.
        return (1 - distances * np.float32(2 / self.dims)).astype(np.float32)

    @property
    def rescores(self) -> bool:
        """Whether a search orders its candidates again, by the float query."""
        return self.rescore > 1 and self.code in ("int8", "binary")

    def record(self) -> VectorRecord:
        """The manifest's record of this transform."""
        return VectorRecord(
            dims=self.dims,
            method=self.method,
            explained_variance_ratio=self.explained_variance_ratio,
            rotated=self.rotated,
            similarity=self.similarity,
            neighbours_kept=dict(self.neighbours_kept) if self.neighbours_kept else None,
            trials=self.trials,
            code=self.code,
            bits=self.bits,
            centred=self.code == "binary" and self.low is not None,
            rescore=self.rescore,
            bytes_per_vector=self.bytes_per_vector,
        )

    def sha256(self) -> str:
        """A hash of everything that decides the results of the transform and of a search."""
        rescore = self.rescore if self.rescores else 1
        settings = (
            f"{self.full_dims}:{self.dims}:{self.code}:{rescore}:{self.similarity}:{self.bits}\n"
        )
        digest = hashlib.sha256(settings.encode())
        for name, array in sorted(self.to_tensors().items()):
            digest.update(f"{name}:{array.shape}\n".encode() + array.tobytes())
        return digest.hexdigest()

    def to_tensors(self) -> dict[str, npt.NDArray[Any]]:
        """The fitted arrays by name; empty if nothing was fitted."""
        named: dict[str, npt.NDArray[Any] | None] = {
            "projection": self.projection,
            "low": self.low,
            "high": self.high,
            "centre": self.centre,
            "codebook": self.codebook,
            "places": self.places,
        }
        return {name: array for name, array in named.items() if array is not None}

    @staticmethod
    def from_tensors(
        record: VectorRecord, full_dims: int, tensors: Mapping[str, npt.NDArray[Any]]
    ) -> VectorTransform:
        """The transform that `record` and `to_tensors` describe.

        Raises:
            IntegrityError: a tensor is missing, unknown, of wrong shape or dtype, or not finite.
        """
        shapes = _tensor_shapes(record, full_dims)
        problems = [*_tensor_problems(record, shapes, tensors)]
        if record.dims > full_dims or (record.method == "full" and record.dims != full_dims):
            problems.append(f"{record.dims} dimensions do not fit the model's {full_dims}")
        if (record.code == "rabitq") != (record.bits is not None):
            problems.append(f"{record.code} vectors cannot have bits {record.bits}")
        if problems:
            raise IntegrityError(join_problems("the vector transform is damaged", problems))
        transform = VectorTransform(
            full_dims=full_dims,
            dims=record.dims,
            method=record.method,
            code=record.code,
            rescore=record.rescore,
            explained_variance_ratio=record.explained_variance_ratio,
            rotated=record.rotated,
            similarity=record.similarity,
            neighbours_kept=record.neighbours_kept,
            trials=record.trials,
            bits=record.bits,
            **{name: tensors[name] for name in shapes},
        )
        if transform.bytes_per_vector != record.bytes_per_vector:
            raise IntegrityError(
                f"the vector transform is damaged: its record says {record.bytes_per_vector} bytes "
                f"a vector, but its dimensions and code take {transform.bytes_per_vector}"
            )
        return transform

    def check_codes(self, codes: Codes) -> None:
        """Refuse codes that `quantize` cannot have made.

        Raises:
            InputError: wrong shape or dtype.
            NumericsError: NaN or infinity in float32 codes.
        """
        dtype, width = np.dtype(self.coding.dtype), self.coding.width
        if codes.ndim != 2 or codes.shape[1] != width or codes.dtype != dtype:
            raise InputError(
                f"codes are {codes.dtype} {list(codes.shape)}; {self.code} vectors of {self.dims} "
                f"dimensions are {dtype.name} [N, {width}]"
            )
        if self.code == "float32":
            checked_rows(codes, width, "stored vectors")


def _tensor_shapes(record: VectorRecord, full_dims: int) -> dict[str, tuple[int | None, ...]]:
    """Names and shapes of the tensors that a record needs; None stands for any length."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    if record.method == "pca" or record.rotated:
        shapes["projection"] = (record.dims, full_dims)
    if record.code in ("int8", "int4") or (record.code == "binary" and record.centred):
        shapes["low"] = shapes["high"] = (record.dims,)
    if record.code == "rabitq":
        shapes["centre"] = (record.dims,)
    if record.code == "pq":
        shapes["codebook"] = (record.bytes_per_vector, 256, None)
        shapes["places"] = (record.dims,)
    return shapes


def _tensor_problems(
    record: VectorRecord,
    shapes: Mapping[str, tuple[int | None, ...]],
    tensors: Mapping[str, npt.NDArray[Any]],
) -> list[str]:
    """Faults of the tensors of a record, as messages."""
    problems = [f"tensor '{name}' is missing" for name in sorted(shapes.keys() - tensors)]
    problems += [f"tensor '{name}' is unknown" for name in sorted(tensors.keys() - shapes)]
    for name in sorted(shapes.keys() & tensors.keys()):
        tensor, shape = tensors[name], shapes[name]
        dtype = np.dtype(np.int32 if name == "places" else np.float32)
        fits = len(tensor.shape) == len(shape) and all(
            wanted in (None, length) for wanted, length in zip(shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            problems.append(
                f"tensor '{name}' is {tensor.dtype} {tensor.shape}, must be {dtype} {shape}"
            )
        elif not np.isfinite(tensor).all():
            problems.append(f"tensor '{name}' holds NaN or infinity")
    if problems:
        return problems
    if "low" in shapes and (tensors["low"] > tensors["high"]).any():
        problems.append("tensor 'low' exceeds 'high'")
    if "places" in shapes:
        places, n_values = (
            tensors["places"],
            tensors["codebook"].shape[0] * tensors["codebook"].shape[2],
        )
        if len(np.unique(places)) != len(places) or not ((places >= 0) & (places < n_values)).all():
            problems.append(f"tensor 'places' must hold different numbers below {n_values}")
    return problems


def identity_transform(
    full_dims: int, *, kept: int | None = None, similarity: Similarity = "cosine"
) -> VectorTransform:
    """The transform that stores float32 of all dimensions, or of the first `kept`."""
    if kept is None or kept >= full_dims:
        return VectorTransform(full_dims=full_dims, dims=full_dims, similarity=similarity)
    return VectorTransform(full_dims=full_dims, dims=kept, method="slice", similarity=similarity)


def checked_rows(x: npt.ArrayLike, width: int | None, what: str) -> Floats:
    """`x` as float32 [N, width].

    Raises:
        InputError: wrong shape.
        NumericsError: NaN or infinity.
    """
    rows = np.asarray(x, dtype=np.float32)
    if rows.ndim != 2 or (width is not None and rows.shape[1] != width):
        raise InputError(
            f"{what} have shape {list(rows.shape)}, must be [N, {'F' if width is None else width}]"
        )
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise NumericsError(f"{bad} of {len(rows)} {what} hold NaN or infinity")
    return rows


def paired_dot(a: Floats, b: Floats) -> Floats:
    """Dot products [P] of corresponding rows of a and b [P, D], summed in float64 and rounded."""
    dots: Floats = np.vecdot(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)
    return dots
