"""Vectors to the bytes of an answer.

Hides: cutting, codes, base64, JSON. Refuses to know: HTTP, models, where vectors come from.
"""

from __future__ import annotations

import base64
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from gteopt.server.schema import OutputDtype
from gteopt.vectors.transform import VectorTransform

Floats = NDArray[np.float32]
Encoding = Literal["float", "base64"]


def shorten(rows: Floats, dims: int, *, normalise: bool = True) -> Floats:
    """The first `dims` dimensions of vectors [N, D], as unit vectors [N, dims] again.

    Norms are summed in float64.

    Args:
        rows: as `Encoder.encode` gives them.
        dims: how many to keep; all are returned as they are.
        normalise: false for artifacts whose vectors are compared by dot products.
    """
    if dims == rows.shape[1]:
        return rows
    if not normalise:
        return rows[:, :dims]
    cut = rows[:, :dims].astype(np.float64)
    norm = np.linalg.norm(cut, axis=1, keepdims=True)
    return (cut / np.where(norm > 0, norm, 1.0)).astype(np.float32)


def code(rows: Floats, dtype: OutputDtype, transform: VectorTransform) -> NDArray[Any]:
    """Vectors [N, D] in a number type, little endian where it has several bytes.

    int8 uses the ranges that are stored in the artifact; uint8 is int8 + 128. ubinary packs eight
    signs a byte, the first dimension highest, behind the mean that an artifact with binary codes
    subtracts; binary is ubinary - 128, as a signed byte.

    Args:
        rows: finite.
        dtype: of the result.
        transform: the artifact's; for int8 its code must be int8. Rows of fewer dimensions than
            its own are coded by their signs.
    """
    if dtype == "float":
        return np.ascontiguousarray(rows, dtype="<f4")
    if dtype in ("int8", "uint8"):
        codes: NDArray[np.int8] = transform.quantize(rows)
        return codes if dtype == "int8" else (codes.astype(np.int16) + 128).astype(np.uint8)
    is_stored = transform.code == "binary" and rows.shape[1] == transform.dims
    packed = transform.quantize(rows) if is_stored else np.packbits(rows > 0, axis=1)
    return packed if dtype == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def encode_list(
    codes: NDArray[Any],
    encoding: Encoding,
    *,
    failed: Collection[int] = (),
    about: Mapping[str, Any],
) -> bytes:
    """OpenAI's list of embeddings as JSON.

    Args:
        codes: [N, W], as `code` makes them.
        encoding: lists of numbers, or base64 of their bytes.
        failed: rows that are answered with null.
        about: `model`, `usage` and what else stands beside the data.
    """
    empty = set(failed)
    rows = []
    # Row by row: one call for all would hold Python's lock for seconds, and everybody would wait.
    for i, row in enumerate(codes):
        if i in empty:
            value = b"null"
        elif encoding == "base64":
            value = b'"%b"' % base64.b64encode(row.tobytes())
        else:
            value = dump(row)
        rows.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (i, value))
    return b'{"object":"list","data":[%b],%b' % (b",".join(rows), dump(dict(about))[1:])


def dump(content: object) -> bytes:
    """JSON; arrays of numbers become lists."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
