"""Search the same documents with a model and with its 8-bit variant, in faiss.

Run: python examples/retrieval.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import faiss

import gteopt

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts/example-retrieval")
gteopt.quantize("nano", "rtn-int8", folder)
documents = [
    "Photosynthesis turns light into chemical energy.",
    "The library opens at nine on weekdays.",
    "Bread rises because yeast gives off carbon dioxide.",
    "A tide is caused by the pull of the moon.",
]
queries = ["how do plants make energy", "when can I borrow a book"]

results = {}
for source in ("nano", folder):
    encoder = gteopt.load(source)
    index = faiss.IndexFlatIP(encoder.dims)  # inner products of unit vectors are cosines
    index.add(encoder.encode(documents))
    _, results[str(source)] = index.search(encoder.encode(queries, role="query"), 2)
for number, query in enumerate(queries):
    for source, nearest in results.items():
        print(f"{query!r} with {source}: {documents[nearest[number][0]]!r}")
