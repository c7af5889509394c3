"""Encode vectors as the bytes of an answer.

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


def shorten_vectors(rows: Floats, dims: int, *, normalise: bool = True) -> Floats:
    """Cut vectors [N, D] to their first `dims` dimensions and normalise them to length 1 again.

    Norms are summed in float64.

    Args:
        rows: vectors as `Encoder.encode` gives them.
        dims: dimensions to keep; if this is D, the rows are returned unchanged.
        normalise: False for artifacts whose vectors are compared by dot products.
    """
    if dims == rows.shape[1]:
        return rows
    if not normalise:
        return rows[:, :dims]
    cut = rows[:, :dims].astype(np.float64)
    norm = np.linalg.norm(cut, axis=1, keepdims=True)
    return (cut / np.where(norm > 0, norm, 1.0)).astype(np.float32)


def convert_vectors(rows: Floats, dtype: OutputDtype, transform: VectorTransform) -> NDArray[Any]:
    """Convert vectors [N, D] to a number type; floats are little endian.

    int8 uses the ranges that are stored in the artifact; uint8 is int8 + 128. ubinary packs eight
    signs into a byte, with the first dimension in the highest bit. Signs are taken after the mean
    is subtracted, if the artifact has binary codes. binary is ubinary - 128, as a signed byte.

    Args:
        rows: finite vectors.
        dtype: number type of the result.
        transform: the artifact's transform. For int8 and uint8, its code must be int8. Binary codes
            of rows with fewer dimensions than the artifact's are signs without its mean.
    """
    if dtype == "float":
        return np.ascontiguousarray(rows, dtype="<f4")
    if dtype in ("int8", "uint8"):
        codes: NDArray[np.int8] = transform.quantize(rows)
        return codes if dtype == "int8" else (codes.astype(np.int16) + 128).astype(np.uint8)
    is_stored = transform.code == "binary" and rows.shape[1] == transform.dims
    packed = transform.quantize(rows) if is_stored else np.packbits(rows > 0, axis=1)
    return packed if dtype == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)


def encode_embedding_list(
    codes: NDArray[Any],
    encoding: Encoding,
    *,
    failed: Collection[int] = (),
    about: Mapping[str, Any],
) -> bytes:
    """Encode OpenAI's list of embeddings as JSON.

    Args:
        codes: [N, W], the result of `convert_vectors`.
        encoding: lists of numbers, or base64 of their bytes.
        failed: indices of rows whose embedding is null.
        about: `model`, `usage` and further fields beside `data`.
    """
    empty = set(failed)
    rows = []
    # Row by row: one call for all rows would hold the interpreter lock for seconds.
    for i, row in enumerate(codes):
        if i in empty:
            value = b"null"
        elif encoding == "base64":
            value = b'"%b"' % base64.b64encode(row.tobytes())
        else:
            value = encode_json(row)
        rows.append(b'{"object":"embedding","index":%d,"embedding":%b}' % (i, value))
    return b'{"object":"list","data":[%b],%b' % (b",".join(rows), encode_json(dict(about))[1:])


def encode_json(content: object) -> bytes:
    """Encode as JSON; numpy arrays become lists."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
