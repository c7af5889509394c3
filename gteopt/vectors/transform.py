"""What happens to an embedding after the model: shorten it, code it, search the codes.

Hides: how projections and code ranges are fitted, stored and applied, how codes are searched.
Refuses to know: torch, models, files.

Everything that depends on data is fitted once, on calibration vectors, and stored; coding a vector
never looks at the other vectors of its batch. (sentence-transformers' `quantize_embeddings` takes
its int8 ranges from the batch at hand unless given others, so that queries and documents get
different maps; it floors, which decodes half a step low; and until its pull request 3847 it cast
to int8 without clipping, so that a value just above the range came out as the most negative one.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gteopt.config.recipe import VectorCode
from gteopt.errors import InputError, IntegrityError, NumericsError, join_problems
from gteopt.records.manifest import VectorRecord

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[Any]
"""float32 [N, D], int8 [N, D] or uint8 [N, ceil(D / 8)], as `VectorTransform.code` says."""


@dataclass(frozen=True, eq=False)
class VectorTransform:
    """A fitted map from the model's vectors to shorter, cheaper ones. Shapes: F full, D kept dims.

    Attributes:
        rescore: `search` fetches `rescore * k` candidates by codes and reorders them.
        explained_variance_ratio: share of the calibration vectors' variance that a PCA keeps.
        rotated: whether the PCA's dimensions were turned for binary codes; cosines are the same.
        neighbours_kept: what a choice among ways to shorten was made by; None without one.
        projection: PCA only: [D, F], orthonormal rows (the weight of a linear layer F -> D).
        low, high: int8 only: [D], what the codes -128 and 127 stand for.
    """

    full_dims: int
    dims: int
    method: Literal["full", "slice", "pca"] = "full"
    code: VectorCode = "float32"
    rescore: int = 1
    explained_variance_ratio: float | None = None
    rotated: bool = False
    neighbours_kept: Mapping[str, float] | None = None
    projection: Floats | None = None
    low: Floats | None = None
    high: Floats | None = None

    @property
    def bytes_per_vector(self) -> int:
        """Bytes of one stored code."""
        return {"float32": 4 * self.dims, "int8": self.dims, "binary": -(-self.dims // 8)}[
            self.code
        ]

    def project(self, x: npt.ArrayLike) -> Floats:
        """Shorten vectors [N, F] to unit rows [N, D].

        Sums run in float64, so that a row does not depend on the rows beside it. A row that the
        projection maps to zero stays zero.

        Raises:
            InputError: wrong shape.
            NumericsError: NaN or infinity in `x`.
        """
        z = _rows(x, self.full_dims, "vectors").astype(np.float64)
        if self.projection is None:
            z = z[:, : self.dims]
        else:
            z = z @ self.projection.T.astype(np.float64)
        norm = np.linalg.norm(z, axis=1, keepdims=True)
        return (z / np.where(norm > 0, norm, 1.0)).astype(np.float32)

    def quantize(self, z: npt.ArrayLike) -> Codes:
        """Code projected vectors [N, D] for storage.

        int8 rounds to the nearest of 256 evenly spaced values from `low` to `high`,

            code = clip(round(255 (z - low) / (high - low)) - 128, -128, 127),

        so a value out of range saturates and never wraps around. binary keeps the sign, 1 for
        positive, first dimension in the highest bit of the first byte (`np.packbits`).

        Raises:
            InputError: wrong shape.
            NumericsError: NaN or infinity in `z`.
        """
        rows = _rows(z, self.dims, "projected vectors")
        if self.code == "float32":
            return rows
        if self.code == "binary":
            return np.packbits(rows > 0, axis=1)
        low, step = self._low_and_step()
        # A dimension that was constant in calibration has no step; every value gets its one code.
        levels = np.divide(rows - low, step, out=np.zeros(rows.shape), where=step > 0)
        return (np.clip(np.rint(levels), 0, 255) - 128).astype(np.int8)

    def dequantize(self, codes: Codes) -> Floats:
        """The vectors [N, D] that codes stand for.

        float32: themselves. int8: low + (code + 128) (high - low) / 255, not renormalised.
        binary: +-1 / sqrt(D), unit rows.

        Raises:
            InputError: codes of another shape or dtype than `quantize` makes.
            NumericsError: NaN or infinity in float32 codes.
        """
        self._check_codes(codes)
        if self.code == "float32":
            return codes
        if self.code == "binary":
            signs = np.unpackbits(codes, axis=1, count=self.dims).astype(np.float32) * 2 - 1
            unit: Floats = signs / np.sqrt(np.float32(self.dims))
            return unit
        low, step = self._low_and_step()
        return (low + (codes.astype(np.float64) + 128) * step).astype(np.float32)

    def score_pairs(self, queries: Floats, codes: Codes) -> tuple[Floats, Floats]:
        """Scores of corresponding rows: by codes alone, and as rescored; see `vectors.search`.

        Args:
            queries: [P, D] projected, float.
            codes: [P, D] or packed.

        Returns:
            Both [P]; the same twice where nothing is rescored.
        """
        self._check_codes(codes)
        if self.code == "binary":
            differing = np.bitwise_count(self.quantize(queries) ^ codes).sum(axis=1, dtype=np.int32)
            by_code = self._of_hamming(differing)
        else:
            coded = queries if self.code == "float32" else self.dequantize(self.quantize(queries))
            by_code = _paired_dot(coded, self.dequantize(codes))
        rescored = _paired_dot(queries, self.dequantize(codes)) if self._rescores else by_code
        return by_code, rescored

    def best_of(self, by_code: Floats, rescored: Floats, k: int) -> npt.NDArray[np.intp]:
        """The k best of candidates that `score_pairs` scored, [min(k, N)], as `search` has them."""
        candidates = np.argsort(-by_code, kind="stable")[: self.n_candidates(k)]
        candidates.sort()
        order = np.argsort(-rescored[candidates], kind="stable")
        best: npt.NDArray[np.intp] = candidates[order[:k]]
        return best

    def n_candidates(self, k: int) -> int:
        """How many stored vectors a search for k looks at again after the codes."""
        return k * self.rescore if self._rescores else k

    def _of_hamming(self, distances: npt.NDArray[np.int32]) -> Floats:
        """1 - 2 H / D."""
        # Rounded at once: what is compared later with scores of another block has been, too.
        return (1 - distances * np.float32(2 / self.dims)).astype(np.float32)

    @property
    def _rescores(self) -> bool:
        return self.rescore > 1 and self.code != "float32"

    def record(self) -> VectorRecord:
        """What the manifest says of this transform."""
        return VectorRecord(
            dims=self.dims,
            method=self.method,
            explained_variance_ratio=self.explained_variance_ratio,
            rotated=self.rotated,
            neighbours_kept=dict(self.neighbours_kept) if self.neighbours_kept else None,
            code=self.code,
            rescore=self.rescore,
            bytes_per_vector=self.bytes_per_vector,
        )

    def sha256(self) -> str:
        """Identifies what the transform does to vectors and to a search, to the last bit."""
        rescore = self.rescore if self.code != "float32" else 1
        about = f"{self.full_dims}:{self.dims}:{self.code}:{rescore}\n"
        digest = hashlib.sha256(about.encode())
        for name, array in sorted(self.to_tensors().items()):
            digest.update(f"{name}:{array.shape}\n".encode() + array.tobytes())
        return digest.hexdigest()

    def to_tensors(self) -> dict[str, Floats]:
        """The fitted arrays by name; empty where nothing was fitted."""
        named = {
            "projection": self.projection,
            "low": self.low,
            "high": self.high,
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
        shapes: dict[str, tuple[int, ...]] = {}
        if record.method == "pca":
            shapes["projection"] = (record.dims, full_dims)
        if record.code == "int8":
            shapes["low"] = shapes["high"] = (record.dims,)
        problems = [f"tensor '{name}' is missing" for name in sorted(shapes.keys() - tensors)]
        problems += [f"tensor '{name}' is unknown" for name in sorted(tensors.keys() - shapes)]
        for name in sorted(shapes.keys() & tensors.keys()):
            found = tensors[name]
            if found.shape != shapes[name] or found.dtype != np.float32:
                problems.append(
                    f"tensor '{name}' is {found.dtype} {found.shape}, must be float32 "
                    f"{shapes[name]}"
                )
            elif not np.isfinite(found).all():
                problems.append(f"tensor '{name}' holds NaN or infinity")
        if not problems and record.code == "int8" and (tensors["low"] > tensors["high"]).any():
            problems.append("tensor 'low' exceeds 'high'")
        if record.dims > full_dims or (record.method == "full" and record.dims != full_dims):
            problems.append(f"{record.dims} dimensions do not fit the model's {full_dims}")
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
            neighbours_kept=record.neighbours_kept,
            **{name: tensors[name] for name in shapes},
        )
        if transform.bytes_per_vector != record.bytes_per_vector:
            raise IntegrityError(
                f"the vector transform is damaged: {record.bytes_per_vector} bytes a vector "
                f"recorded, {transform.bytes_per_vector} follow from its dimensions and code"
            )
        return transform

    def _low_and_step(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        assert self.low is not None
        assert self.high is not None
        low, high = self.low.astype(np.float64), self.high.astype(np.float64)
        return low, (high - low) / 255

    def _check_codes(self, codes: Codes) -> None:
        dtype = {"float32": np.float32, "int8": np.int8, "binary": np.uint8}[self.code]
        width = self.bytes_per_vector // np.dtype(dtype).itemsize
        if codes.ndim != 2 or codes.shape[1] != width or codes.dtype != dtype:
            raise InputError(
                f"codes are {codes.dtype} {list(codes.shape)}; {self.code} vectors of {self.dims} "
                f"dimensions are {np.dtype(dtype).name} [N, {width}]"
            )
        if self.code == "float32":
            _rows(codes, width, "stored vectors")


def identity(full_dims: int) -> VectorTransform:
    """The transform that keeps every dimension in float32."""
    return VectorTransform(full_dims=full_dims, dims=full_dims)


def _rows(x: npt.ArrayLike, width: int | None, what: str) -> Floats:
    """`x` as float32 [N, width], checked."""
    rows = np.asarray(x, dtype=np.float32)
    if rows.ndim != 2 or (width is not None and rows.shape[1] != width):
        raise InputError(
            f"{what} have shape {list(rows.shape)}, must be [N, {'F' if width is None else width}]"
        )
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=1)).sum())
        raise NumericsError(f"{bad} of {len(rows)} {what} hold NaN or infinity")
    return rows


def _paired_dot(a: Floats, b: Floats) -> Floats:
    """Dot products [P] of corresponding rows of a and b [P, D], summed in float64 and rounded."""
    dots: Floats = np.vecdot(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)
    return dots
