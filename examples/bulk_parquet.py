"""Encode many texts in pieces and write them with their vectors to a Parquet file.

Run: python examples/bulk_parquet.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

import gteopt

file = Path(sys.argv[1] if len(sys.argv) > 1 else "vectors.parquet")
texts = [f"Sentence number {number} about topic {number % 7}." for number in range(200)]

encoder = gteopt.load("nano")
vector = pa.list_(pa.float32(), encoder.dims)
schema = pa.schema([("text", pa.string()), ("vector", vector)])
with pq.ParquetWriter(file, schema) as writer:
    for start in range(0, len(texts), 64):
        piece = texts[start : start + 64]
        vectors = pa.FixedSizeListArray.from_arrays(encoder.encode(piece).ravel(), encoder.dims)
        writer.write_table(pa.table([piece, vectors], schema=schema))
print(f"{file}: {pq.read_metadata(file).num_rows} vectors of {encoder.dims} dimensions")
