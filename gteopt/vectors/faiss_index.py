"""Turn a transform and its codes into a faiss index, which opens and searches without gteopt.

For int8, int4 and pq the index compares the float query with the decoded vector. `vectors.search`
does the same when it rescores. For binary the index compares by Hamming distance alone.

Refuses to know: models, files, how anything was fitted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gteopt.errors import UnsupportedError
from gteopt.vectors.codes import (
    BinaryCode,
    Code,
    Codes,
    Float32Code,
    Floats,
    ProductQuantizer,
    ScalarCode,
)
from gteopt.vectors.transform import VectorTransform

WITH_COUNTERPART = ("float32", "int8", "int4", "binary", "pq")
"""Codes that faiss can hold; its RaBitQ stores four times as many factors as gteopt's."""


def to_faiss(
    transform: VectorTransform, codes: Codes | None = None, *, of_base: bool = False
) -> Any:
    """A `faiss.Index` of stored vectors; it codes vectors that are added and takes float queries.

    Args:
        transform: the transform that made the codes.
        codes: stored vectors from `quantize` to add to the index; None leaves it empty.
        of_base: which vectors the index takes. False: rows [N, D] that `encode` returns, or that
            Sentence Transformers returns from the artifact's folder. True: vectors [N, F] of the
            base model, which the index shortens itself.

    Raises:
        UnsupportedError: the code has no counterpart in faiss.
        InputError: codes of another shape or dtype than `quantize` makes.

    Example:
        >>> faiss.write_index(to_faiss(encoder.vectors, codes), "documents.faiss")
        >>> index = faiss.read_index("documents.faiss")
        >>> scores, rows = index.search(encoder.encode(queries, role="query"), 10)
    """
    if transform.code not in WITH_COUNTERPART:
        raise UnsupportedError(
            f"{transform.code} codes have no counterpart in faiss; codes that have one: "
            f"{', '.join(WITH_COUNTERPART)}"
        )
    import faiss  # the import takes a tenth of a second and starts threads

    coding = transform.coding
    index = _stored(coding, _width(coding, transform.dims))
    if codes is not None:
        transform.check_codes(codes)
        index.add_sa_codes(np.ascontiguousarray(_faiss_codes(coding, codes)))
    for step in reversed(_steps(transform, coding, of_base)):
        if isinstance(index, faiss.IndexPreTransform):
            index.prepend_transform(step)
        else:
            index = faiss.IndexPreTransform(step, index)
    return index


def _width(coding: Code, dims: int) -> int:
    """Values in a row of the index."""
    if isinstance(coding, ProductQuantizer):
        return int(coding.codebook.shape[0] * coding.codebook.shape[2])
    return dims


def _steps(transform: VectorTransform, coding: Code, of_base: bool) -> list[Any]:
    """The maps that are applied to a row before it is coded, in order; empty for most codes."""
    import faiss

    steps: list[Any] = []
    if of_base:
        projection = transform.projection
        if projection is None:
            projection = np.eye(transform.dims, transform.full_dims, dtype=np.float32)
        steps.append(_linear(projection))
        if transform.similarity == "cosine":
            steps.append(faiss.NormalizationTransform(transform.dims, 2.0))
    if isinstance(coding, ProductQuantizer):
        placed = np.zeros((_width(coding, transform.dims), transform.dims), np.float32)
        placed[coding.places, np.arange(transform.dims)] = 1
        steps.append(_linear(placed))
    if isinstance(coding, BinaryCode) and coding.low is not None:
        steps.append(_linear(np.eye(transform.dims, dtype=np.float32), -coding.threshold))
    return steps


def _linear(weight: Floats, bias: Floats | None = None) -> Any:
    """The map x -> weight x + bias; weight [out, in]."""
    import faiss

    step = faiss.LinearTransform(weight.shape[1], weight.shape[0], bias is not None)
    faiss.copy_array_to_vector(np.ascontiguousarray(weight).ravel(), step.A)
    if bias is not None:
        faiss.copy_array_to_vector(bias, step.b)
    step.is_trained = True
    return step


def _stored(coding: Code, width: int) -> Any:
    """An index for this code, without vectors."""
    import faiss

    match coding:
        case ScalarCode():
            kind = (
                faiss.ScalarQuantizer.QT_8bit
                if coding.bits == 8
                else (faiss.ScalarQuantizer.QT_4bit)
            )
            scalar = faiss.IndexScalarQuantizer(width, kind, faiss.METRIC_INNER_PRODUCT)
            # faiss decodes to the middles of 2^B cells; gteopt to 2^B levels from low to high.
            spread = coding.high - coding.low
            low = coding.low - spread / np.float32(2 * (2**coding.bits - 1))
            faiss.copy_array_to_vector(np.concatenate([low, spread]), scalar.sq.trained)
            scalar.is_trained = True
            return scalar
        case BinaryCode():
            return faiss.IndexLSH(width, width, False, False)
        case ProductQuantizer():
            n_groups = len(coding.codebook)
            product = faiss.IndexPQ(width, n_groups, 8, faiss.METRIC_INNER_PRODUCT)
            faiss.copy_array_to_vector(coding.codebook.ravel(), product.pq.centroids)
            product.is_trained = True
            return product
    return faiss.IndexFlatIP(width)


def _faiss_codes(coding: Code, codes: Codes) -> npt.NDArray[np.uint8]:
    """The bytes [N, B] that faiss stores for the same codes."""
    if isinstance(coding, Float32Code):
        return codes.view(np.uint8)
    if isinstance(coding, ScalarCode) and coding.bits == 8:
        return (codes.astype(np.int16) + 128).astype(np.uint8)
    if isinstance(coding, BinaryCode):
        bits = np.unpackbits(codes, axis=1, count=coding.dims)
        return np.packbits(bits, axis=1, bitorder="little")
    return codes
