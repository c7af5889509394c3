"""Compare vector codes of gteopt, faiss and sentence-transformers at equal bytes.

    python benchmarks/vector_codes.py --cranfield ../shared/beir/cranfield

Codes are fitted on every second document of Cranfield, without queries. The other documents are
searched with Cranfield's queries. The first measure is the share of the 10 nearest documents (in
float32 at full dimension) that are among the 10 nearest by codes. The second is nDCG@10 by
Cranfield's judgements of the searched documents.

gteopt's code is what `vectors: {bytes: N}` chooses on the documents that it is fitted on. Of
faiss's and sentence-transformers' codes, the results show the best on the queries themselves, which
favours them. `gaussian_limit` shows what an ideal code of as many bits keeps of normally
distributed documents with the same covariance.

Vectors are encoded once and kept in --cache. "narrow cone" is all-MiniLM-L6-v2 with a common vector
added to all vectors, so that two documents have a mean cosine of 0.83.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from model_folders import model_folder
from results_files import conditions, write_results
from sentence_transformers.util.quantization import quantize_embeddings

import gteopt
from gteopt.config.recipe import Vectors
from gteopt.speed.clock import Stopwatch
from gteopt.vectors.fit import fit_vector_transform
from gteopt.vectors.search import search_vectors
from gteopt.vectors.transform import identity_transform

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp]

BYTES = (12, 24, 48, 96, 192)
MODELS = ("all-MiniLM-L6-v2", "gte-nano", "narrow cone")
K = 10
NARROW = 0.83


@dataclass(frozen=True)
class Collection:
    """Unit vectors of a model.

    Attributes:
        fitted: documents that codes are fitted on.
        documents: the other documents, which are searched.
        queries: queries of the collection.
        relevant: grades [Q, N] of the searched documents.
    """

    fitted: Floats
    documents: Floats
    queries: Floats
    relevant: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One code on one model.

    Attributes:
        model: model of the vectors.
        by: "gteopt", "faiss", "sentence-transformers" or "Gaussian limit".
        code: name of the code.
        n_bytes: bytes of a vector.
        neighbours_kept: share of the 10 nearest documents that stay.
        ndcg_at_10: nDCG@10 by the collection's judgements.
    """

    model: str
    by: str
    code: str
    n_bytes: int
    neighbours_kept: float
    ndcg_at_10: float


def main() -> None:
    """Measure the codes of each model and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cranfield", type=Path, required=True, help="folder in the BEIR layout")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--bytes", nargs="+", type=int, default=BYTES)
    parser.add_argument("--by", nargs="+", default=list(CODES), choices=CODES)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir(), "vector_codes"))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "vector_codes.json"
    )
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    for model in options.models:
        collection = read(model, options.cranfield, options.cache)
        measured = partial(row_of, model, collection)
        n_full = 4 * collection.queries.shape[1]
        exact, _ = search_vectors(
            identity_transform(n_full // 4), collection.queries, collection.documents, K
        )
        write(options.out, [measured("gteopt", "float32", n_full, exact)])
        for n_bytes in options.bytes:
            watch = Stopwatch()
            rows: list[Row] = []
            for by in options.by:
                codes = CODES[by](collection, n_bytes)
                library_rows = [measured(by, code, n, nearest) for code, n, nearest in codes]
                rows += library_rows
                if library_rows:
                    best = max(library_rows, key=lambda row: row.neighbours_kept)
                    print(f"{model:18} {n_bytes:4} {by:22} {best.code:32}", end=" ")
                    print(f"{best.neighbours_kept:.3f} {best.ndcg_at_10:.3f}", flush=True)
            print(f"{watch.wall_s:.0f} s", flush=True)
            write(options.out, rows)


def write(out: Path, rows: list[Row]) -> None:
    """Put rows into the file; they replace rows of the same model, library and bytes."""
    before = json.loads(out.read_text())["rows"] if out.is_file() else []
    new = {(row.model, row.by, row.n_bytes) for row in rows}
    kept = [row for row in before if (row["model"], row["by"], row["n_bytes"]) not in new]
    content = {
        "command": "python benchmarks/vector_codes.py --cranfield ../shared/beir/cranfield",
        **conditions({"faiss": faiss.__version__}),
        "n_threads": 1,
        "note": "other work ran on the machine; these figures do not depend on it",
        "rows": [*kept, *map(asdict, rows)],
    }
    write_results(out, content)


def read(model: str, folder: Path, cache: Path) -> Collection:
    """Vectors of Cranfield, which are encoded if the cache lacks them."""
    source = MODELS[0] if model == "narrow cone" else model
    path = cache / f"{source}.npz"
    documents = [json.loads(line) for line in (folder / "corpus.jsonl").open()]
    queries = [json.loads(line) for line in (folder / "queries.jsonl").open()]
    if not path.is_file():
        encoder = gteopt.load(model_folder(source), device="cpu")
        cache.mkdir(parents=True, exist_ok=True)
        texts = [f"{row.get('title', '')} {row['text']}".strip() for row in documents]
        np.savez(
            path,
            d=encoder.encode(texts, batch_size=16),
            q=encoder.encode([row["text"] for row in queries], role="query", batch_size=16),
        )
    vectors = np.load(path)
    d, q = vectors["d"], vectors["q"]
    if model == "narrow cone":
        shared = np.random.default_rng(0).normal(size=d.shape[1])
        # The larger the mean cosine already is, the less of the common vector is needed.
        mean_cosine = float(np.square(d.mean(axis=0)).sum())
        share = np.sqrt((NARROW - mean_cosine) / (1 - NARROW)) / np.linalg.norm(shared)
        d, q = unit(d + share * shared), unit(q + share * shared)
    relevant = np.zeros((len(queries), len(documents)))
    row_of_query = {query["_id"]: i for i, query in enumerate(queries)}
    column_of_document = {document["_id"]: i for i, document in enumerate(documents)}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        if query in row_of_query and document in column_of_document:
            cell = row_of_query[query], column_of_document[document]
            relevant[cell] = max(0, float(grade))
    return Collection(d[::2], d[1::2], q, relevant[:, 1::2])


def unit(x: npt.NDArray[Any]) -> Floats:
    """Rows of length 1."""
    rows: Floats = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return rows


def row_of(
    model: str, collection: Collection, by: str, code: str, n_bytes: int, nearest: Rows
) -> Row:
    """The row of a code whose rankings are `nearest` [Q, 10]."""
    exact = collection.queries.astype("f8") @ collection.documents.astype("f8").T
    exact_nearest = np.argsort(-exact, axis=1, kind="stable")[:, :K]
    kept = [len(np.intersect1d(a, b)) / K for a, b in zip(nearest, exact_nearest, strict=True)]
    return Row(model, by, code, n_bytes, float(np.mean(kept)), ndcg(collection.relevant, nearest))


def ndcg(relevant: npt.NDArray[np.float64], nearest: Rows) -> float:
    """Mean nDCG@10 over queries that have a relevant document; gains are grades."""
    discount = 1 / np.log2(np.arange(2, K + 2))
    gains = np.take_along_axis(relevant, nearest[:, :K], axis=1) @ discount
    ideal = -np.sort(-relevant, axis=1)[:, :K] @ discount
    judged = ideal > 0
    return float((gains[judged] / ideal[judged]).mean())


def top(queries: npt.NDArray[Any], decoded: npt.NDArray[Any]) -> Rows:
    """Indices [Q, 10] of the decoded vectors with the greatest dot products."""
    scores = queries.astype("f8") @ decoded.astype("f8").T
    nearest: Rows = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    return nearest


CodedRows = Iterator[tuple[str, int, Rows]]


def ours(collection: Collection, n_bytes: int) -> CodedRows:
    """The code that `vectors: {bytes: N}` chooses."""
    transform = fit_vector_transform(
        collection.fitted, None, Vectors.model_validate({"bytes": n_bytes})
    )
    codes = transform.quantize(transform.project(collection.documents))
    nearest, _ = search_vectors(transform, transform.project(collection.queries), codes, K)
    suffix = ", rotated" if transform.rotated else ""
    name = f"{transform.code}, {transform.method} {transform.dims}{suffix}"
    yield name, transform.bytes_per_vector, nearest


def by_faiss(collection: Collection, n_bytes: int) -> CodedRows:
    """Scalar quantizers after a PCA, with and without rotation; PQ, OPQ and residual quantizers."""
    full_dims = collection.fitted.shape[1]
    sizes = {min(full_dims, n_bytes * k) for k in (1, 2, 4, 8)} | {full_dims}
    kinds = {
        "SQ4": (4, faiss.ScalarQuantizer.QT_4bit),
        "SQ6": (6, faiss.ScalarQuantizer.QT_6bit),
        "SQ8": (8, faiss.ScalarQuantizer.QT_8bit),
    }
    for name, (bits, kind) in kinds.items():
        dims = min(full_dims, 8 * n_bytes // bits)
        if dims * bits < 0.9 * 8 * n_bytes:
            continue
        for rotated in (False, True):
            # Two ways to set the range: standard deviations, and minimum to maximum.
            for ranged, argument in ((faiss.ScalarQuantizer.RS_meanstd, 2.5), (0, 0.0)):
                index = faiss.IndexScalarQuantizer(dims, kind, faiss.METRIC_INNER_PRODUCT)
                index.sq.rangestat, index.sq.rangestat_arg = ranged, argument
                label = f"PCA {dims}{', rotated' if rotated else ''}, {name}"
                yield label, n_bytes, searched(collection, dims, rotated, index)
    for dims in sorted(sizes):
        for n_groups, bits in ((n_bytes, 8), (2 * n_bytes, 4)):
            if dims % n_groups:
                continue
            pq = faiss.IndexPQ(dims, n_groups, bits, faiss.METRIC_INNER_PRODUCT)
            pq.pq.cp.min_points_per_centroid = 1
            yield f"PCA {dims}, PQ{n_groups}x{bits}", n_bytes, searched(collection, dims, False, pq)
            # More OPQ takes minutes, and keeps less than fewer dimensions or SQ4 and SQ6.
            if dims > 200 or n_bytes > 48:
                continue
            opq = faiss.OPQMatrix(dims, n_groups)
            opq.niter = 10
            inner = faiss.IndexPQ(dims, n_groups, bits, faiss.METRIC_INNER_PRODUCT)
            inner.pq.cp.min_points_per_centroid = 1
            opq.pq = inner.pq
            index_with_opq = faiss.IndexPreTransform(opq, inner)
            label = f"PCA {dims}, OPQ{n_groups}x{bits}"
            yield label, n_bytes, searched(collection, dims, False, index_with_opq)
    if n_bytes <= 24:
        residual = faiss.IndexResidualQuantizer(full_dims, n_bytes, 8, faiss.METRIC_INNER_PRODUCT)
        residual.rq.cp.min_points_per_centroid = 1
        yield f"RQ{n_bytes}x8", n_bytes, searched(collection, full_dims, False, residual)


def searched(collection: Collection, dims: int, rotated: bool, index: Any) -> Rows:
    """Rankings [Q, 10] of a faiss index after a PCA that is not centred, like gteopt's."""
    basis = np.linalg.svd(collection.fitted.astype("f8"), full_matrices=False)[2][:dims]
    if rotated:
        basis = np.linalg.qr(np.random.default_rng(0).normal(size=(dims, dims)))[0].T @ basis
    fitted, documents, queries = (
        np.ascontiguousarray(x @ basis.T, dtype=np.float32)
        for x in (collection.fitted, collection.documents, collection.queries)
    )
    index.train(fitted)
    index.add(documents)
    nearest: Rows = index.search(queries, K)[1]
    return nearest


def st(collection: Collection, n_bytes: int) -> CodedRows:
    """`quantize_embeddings` of the first dimensions and after a PCA; float queries rescore."""
    full_dims = collection.fitted.shape[1]
    basis = np.linalg.svd(collection.fitted.astype("f8"), full_matrices=False)[2]
    for kind, dims in (("int8", n_bytes), ("ubinary", 8 * n_bytes)):
        if dims > full_dims:
            continue
        for basis_name, axes in (("first", np.eye(full_dims)), ("PCA", basis)):
            fitted, documents, queries = (
                unit(x @ axes[:dims].T)
                for x in (collection.fitted, collection.documents, collection.queries)
            )
            args: dict[str, Any] = {"calibration_embeddings": fitted} if kind == "int8" else {}
            codes = np.asarray(quantize_embeddings(documents, precision=kind, **args))
            query_values = np.asarray(quantize_embeddings(queries, precision=kind, **args))
            values = codes.astype("f8")
            if kind == "ubinary":
                values = np.unpackbits(codes, axis=1).astype("f8") * 2 - 1
                query_values = np.unpackbits(query_values, axis=1).astype("f8") * 2 - 1
            first = np.argsort(-(query_values.astype("f8") @ values.T), axis=1, kind="stable")[
                :, : 4 * K
            ]
            scores = np.take_along_axis(queries.astype("f8") @ values.T, first, axis=1)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
            yield f"{basis_name} {dims}, {kind}", n_bytes, np.take_along_axis(first, order, axis=1)


def gaussian_limit(collection: Collection, n_bytes: int) -> CodedRows:
    """An ideal code of normally distributed vectors with the covariance of the documents.

    Reverse water-filling (Cover and Thomas 2006, Theorem 10.3.3): the documents' covariance has
    eigenvalues l_i. Distortions D_i = min(l_i, level) have the rate
    sum_i log2(l_i / D_i) / 2 bits. The code is simulated by its test channel. A real code cannot
    reach it for such vectors, but a code that uses more than the covariance may be better.
    """
    mean = collection.documents.mean(axis=0, dtype="f8")
    centred = collection.documents.astype("f8") - mean
    spread, axes = np.linalg.eigh(np.cov(centred.T))
    spread = np.clip(spread, 1e-12, None)
    low, high = 1e-12, float(spread.max())
    for _ in range(200):
        level = np.sqrt(low * high)
        distortion = np.minimum(spread, level)
        if np.log2(spread / distortion).sum() / 2 > 8 * n_bytes:
            low = level
        else:
            high = level
    share = 1 - distortion / spread
    noise = np.random.default_rng(0).normal(size=centred.shape)
    decoded = (centred @ axes * share + np.sqrt(distortion * share) * noise) @ axes.T + mean
    yield "ideal code of normal vectors", n_bytes, top(collection.queries, decoded)


CODES: dict[str, Callable[[Collection, int], CodedRows]] = {
    "gteopt": ours,
    "faiss": by_faiss,
    "sentence-transformers": st,
    "Gaussian limit": gaussian_limit,
}

if __name__ == "__main__":
    main()
