"""A transform and its codes as a faiss index, which opens and searches without gteopt.

The index takes vectors of the model at full dimension: it shortens, codes and compares them itself.
int8, int4 and pq are compared as `vectors.search` compares them after rescoring (float query with
what codes stand for), binary by Hamming distance alone.

Refuses to know: models, files, how anything was fitted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gteopt.errors import UnsupportedError
from gteopt.vectors.codes import Binary, Code, Codes, Float32, Floats, ProductQuantizer, Scalar
from gteopt.vectors.transform import VectorTransform

WITH_COUNTERPART = ("float32", "int8", "int4", "binary", "pq")
"""Codes that faiss can hold; its RaBitQ keeps four times the factors of ours."""


def to_faiss(transform: VectorTransform, codes: Codes | None = None) -> Any:
    """A `faiss.Index` over vectors of the model, [N, F].

    Args:
        transform: what made the codes.
        codes: stored vectors to put into it, as `quantize` made them; None leaves it empty. More
            can be added with `index.add(vectors)`.

    Raises:
        UnsupportedError: the code has no counterpart in faiss.
        InputError: codes of another shape or dtype than `quantize` makes.

    Example:
        >>> faiss.write_index(to_faiss(transform, codes), "documents.faiss")
        >>> scores, rows = faiss.read_index("documents.faiss").search(encoder.encode(queries), 10)
    """
    if transform.code not in WITH_COUNTERPART:
        raise UnsupportedError(
            f"{transform.code} codes have no counterpart in faiss; those that have one: "
            f"{', '.join(WITH_COUNTERPART)}"
        )
    import faiss  # a tenth of a second, and its own threads

    coding = transform.coding
    width = transform.dims
    if isinstance(coding, ProductQuantizer):
        width = coding.codebook.shape[0] * coding.codebook.shape[2]
    projection, bias = _linear(transform, coding, width)
    steps: list[Any] = [faiss.LinearTransform(transform.full_dims, width, True)]
    faiss.copy_array_to_vector(projection.ravel(), steps[0].A)
    faiss.copy_array_to_vector(bias, steps[0].b)
    steps[0].is_trained = True
    if transform.similarity == "cosine":
        # Thresholds of binary codes are for rows that are normalised already.
        steps.append(faiss.NormalizationTransform(width, 2.0))
        if bias.any():
            faiss.copy_array_to_vector(np.zeros(width, np.float32), steps[0].b)
            shift = faiss.LinearTransform(width, width, True)
            faiss.copy_array_to_vector(np.eye(width, dtype=np.float32).ravel(), shift.A)
            faiss.copy_array_to_vector(bias, shift.b)
            shift.is_trained = True
            steps.append(shift)
    stored = _stored(coding, width)
    if codes is not None:
        transform.check_codes(codes)
        stored.add_sa_codes(np.ascontiguousarray(_faiss_codes(coding, codes)))
    index = stored
    for step in reversed(steps):
        index = faiss.IndexPreTransform(step, index) if index is stored else _prepended(index, step)
    return index


def _prepended(index: Any, step: Any) -> Any:
    index.prepend_transform(step)
    return index


def _linear(transform: VectorTransform, coding: Code, width: int) -> tuple[Floats, Floats]:
    """The projection [width, F] and what is added to its result [width]."""
    projection = transform.projection
    if projection is None:
        projection = np.eye(transform.dims, transform.full_dims, dtype=np.float32)
    if isinstance(coding, ProductQuantizer):
        placed = np.zeros((width, transform.full_dims), np.float32)
        placed[coding.places] = projection
        projection = placed
    bias = np.zeros(width, np.float32)
    if isinstance(coding, Binary):
        bias = -coding.threshold
    return projection, bias


def _stored(coding: Code, width: int) -> Any:
    """The empty index of codes."""
    import faiss

    match coding:
        case Scalar():
            kind = (
                faiss.ScalarQuantizer.QT_8bit
                if coding.bits == 8
                else (faiss.ScalarQuantizer.QT_4bit)
            )
            scalar = faiss.IndexScalarQuantizer(width, kind, faiss.METRIC_INNER_PRODUCT)
            # faiss decodes to the middle of each of 2^B cells, we to 2^B levels from low to high.
            spread = coding.high - coding.low
            low = coding.low - spread / np.float32(2 * (2**coding.bits - 1))
            faiss.copy_array_to_vector(np.concatenate([low, spread]), scalar.sq.trained)
            scalar.is_trained = True
            return scalar
        case Binary():
            return faiss.IndexLSH(width, width, False, False)
        case ProductQuantizer():
            n_groups = len(coding.codebook)
            product = faiss.IndexPQ(width, n_groups, 8, faiss.METRIC_INNER_PRODUCT)
            faiss.copy_array_to_vector(coding.codebook.ravel(), product.pq.centroids)
            product.is_trained = True
            return product
    return faiss.IndexFlatIP(width)


def _faiss_codes(coding: Code, codes: Codes) -> npt.NDArray[np.uint8]:
    """The bytes [N, B] by which faiss stores the same codes."""
    if isinstance(coding, Float32):
        return codes.view(np.uint8)
    if isinstance(coding, Scalar) and coding.bits == 8:
        return (codes.astype(np.int16) + 128).astype(np.uint8)
    if isinstance(coding, Binary):
        bits = np.unpackbits(codes, axis=1, count=coding.dims)
        return np.packbits(bits, axis=1, bitorder="little")
    return codes
