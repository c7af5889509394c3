"""Measure fidelity: how close a variant's vectors and rankings are to the baseline's.

Fidelity needs no labels. Hides: the sample of a suite's texts, and the blocks in which vectors are
compared. Refuses to know: models, tasks, mteb.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from gteopt.errors import InputError, IntegrityError
from gteopt.records.evaluation import Fidelity
from gteopt.records.examples import Example
from gteopt.records.files import write_atomically
from gteopt.records.manifest import Similarity
from gteopt.vectors.search import search_vectors
from gteopt.vectors.transform import VectorTransform, identity_transform

Side = Literal["query", "document", "text"]
"""The role of a text in its task: a query, a document, or a text compared with other texts."""
Floats = npt.NDArray[np.float32]

N_NEIGHBOURS = 10
N_EXAMPLES = 10
N_PAIRS = 20_000
_LIMITS: dict[Side, int] = {"query": 500, "document": 2000, "text": 2000}
_SEED = 0
_BLOCK_ROWS = 4096  # rows of full vectors compared at once: 117 MB in float64 at 3584 dimensions


@dataclass(frozen=True)
class SideVectors:
    """Full-dimension vectors [N, full_dims] of one side's texts, in ascending order of digests."""

    digests: tuple[str, ...]
    vectors: Floats


FidelitySample = Mapping[Side, SideVectors]


class FidelitySampler:
    """Keeps a fixed pseudo-random sample of the texts of each side, with their vectors.

    The texts with the least seeded SHA-256 are kept (a bottom-k sketch, Cohen & Kaplan 2007). Every
    text is equally likely, and no list of all texts is needed. The sample does not depend on the
    order of the texts, so two models and a resumed run sample the same texts.
    """

    def __init__(self, limits: Mapping[Side, int] = _LIMITS) -> None:
        self._limits = limits
        self._kept: dict[Side, dict[str, Floats]] = {side: {} for side in limits}

    def offer(self, side: Side, texts: Sequence[str], prompt: str, vectors: Floats) -> None:
        """Offer texts of one side with their vectors [N, full_dims].

        A text that is encoded with two values of `prompt` counts as two texts.
        """
        self._keep(side, [text_digest(text, prompt) for text in texts], vectors)

    def merge(self, sample: FidelitySample) -> None:
        """Offer the texts of another sample."""
        for side, side_vectors in sample.items():
            self._keep(side, side_vectors.digests, side_vectors.vectors)

    def sample(self) -> dict[Side, SideVectors]:
        """The kept texts; sides without any text are left out."""
        return {
            side: SideVectors(tuple(sorted(kept)), np.stack([kept[d] for d in sorted(kept)]))
            for side, kept in self._kept.items()
            if kept
        }

    def _keep(self, side: Side, digests: Sequence[str], vectors: Floats) -> None:
        kept, limit = self._kept[side], self._limits[side]
        largest = max(kept, default="")
        for digest, vector in zip(digests, vectors, strict=True):
            if digest in kept or (len(kept) == limit and digest > largest):
                continue
            if len(kept) == limit:
                del kept[largest]
            kept[digest] = vector.copy()  # a view would keep its whole batch in memory
            largest = max(kept)


def text_digest(text: str, prompt: str = "") -> str:
    """The digest that identifies a text in a sample; `prompt` as in `FidelitySampler.offer`."""
    return hashlib.sha256(f"{_SEED}\0{prompt}\0{text}".encode()).hexdigest()


def make_fidelity_sample(texts: Sequence[str], vectors: Floats) -> dict[Side, SideVectors]:
    """A sample of all the given texts, which are compared with one another.

    Args:
        texts: N texts.
        vectors: [N, full_dims].
    """
    sampler = FidelitySampler({"text": len(texts)})
    sampler.offer("text", texts, "", vectors)
    return sampler.sample()


def write_fidelity_sample(path: Path, sample: FidelitySample) -> None:
    """Save a sample; a reader sees the old file or the complete new file.

    Vectors are saved as float16 if that is exact, as it is for vectors from a float16 cache.
    """
    tensors: dict[str, npt.NDArray[np.generic]] = {}
    for side, vectors_of_side in sample.items():
        digests = np.frombuffer(bytes.fromhex("".join(vectors_of_side.digests)), dtype=np.uint8)
        tensors[f"{side}.digests"] = digests.reshape(len(vectors_of_side.digests), -1)
        half = vectors_of_side.vectors.astype(np.float16)
        tensors[f"{side}.vectors"] = (
            half if (half == vectors_of_side.vectors).all() else vectors_of_side.vectors
        )
    write_atomically(path, save(tensors))


def read_fidelity_sample(path: Path) -> dict[Side, SideVectors]:
    """Read what `write_fidelity_sample` saved.

    Raises:
        IntegrityError: the file is damaged.
    """
    try:
        tensors = load_file(path)
        return {
            side: SideVectors(
                tuple(row.tobytes().hex() for row in tensors[f"{side}.digests"]),
                tensors[f"{side}.vectors"].astype(np.float32),
            )
            for side in get_args(Side)
            if f"{side}.digests" in tensors
        }
    except (SafetensorError, KeyError, OSError) as error:
        raise IntegrityError(
            f"{path}: not a sample of vectors that gteopt wrote ({error}); delete it"
        ) from error


def score_fidelity(
    baseline: FidelitySample, variant: FidelitySample, transform: VectorTransform
) -> Fidelity:
    """Compare two models on the texts that both encoded.

    If the suite has a retrieval task, neighbours and similarities are between queries and
    documents. Otherwise they are between texts. For the baseline they are exact, in float at full
    dimension. For the variant they are computed from stored vectors.

    Cosines are over all texts, between the baseline's vector and the variant's stored vector. A
    shortened or coded vector is first mapped back to full dimension.

    Args:
        baseline: the baseline's sample.
        variant: the variant's sample; texts that only one of the two has are left out.
        transform: the variant's transform; its codes are searched, its ranges are not refitted.

    Raises:
        InputError: fewer than two texts to compare, or full vectors of different dimension.
    """
    both: dict[Side, tuple[Floats, Floats]] = {}
    for side in get_args(Side):
        if side in baseline and side in variant:
            pair = _aligned(baseline[side], variant[side])
            if len(pair[0]):
                both[side] = pair
    cosines = [_stored_cosines(a, b, transform) for a, b in both.values()]
    cosine = np.concatenate([np.empty(0), *cosines])
    is_search = "query" in both and "document" in both
    queries: Side = "query" if is_search else "text"
    documents: Side = "document" if is_search else "text"
    if documents not in both or len(both[documents][0]) < 2:
        raise InputError(
            f"fidelity needs at least two texts that both models encoded, found {len(cosine)}; "
            f"the suite is too small, or its tasks failed"
        )
    base_q, ours_q = both[queries]
    base_d, ours_d = both[documents]
    codes = transform.quantize(transform.project(ours_d))
    exact = identity_transform(base_d.shape[1])
    overlap = _overlap(
        _neighbours(
            exact, exact.project(base_q), exact.project(base_d), excluding_self=not is_search
        ),
        _neighbours(transform, transform.project(ours_q), codes, excluding_self=not is_search),
    )
    stored_d = transform.dequantize(codes)
    stored_q = transform.dequantize(transform.quantize(transform.project(ours_q)))
    left, right = _random_pairs(len(base_q), len(base_d), distinct=not is_search)
    return Fidelity(
        n_texts=len(cosine),
        mean_cosine=float(cosine.mean()),
        p1_cosine=float(np.percentile(cosine, 1)),
        neighbour_overlap=overlap,
        n_queries=len(base_q),
        n_documents=len(base_d),
        n_all_documents=max(len(base_d), _n_offered(documents, baseline[documents])),
        spearman=_spearman(
            _similarities(base_q, left, base_d, right),
            _similarities(stored_q, left, stored_d, right, transform.similarity),
        ),
    )


def most_changed_texts(
    baseline: FidelitySample,
    variant: FidelitySample,
    transform: VectorTransform,
    known: Mapping[str, str],
) -> tuple[Example, ...]:
    """The ten texts that keep the fewest of their ten nearest neighbours, with both lists.

    Queries are searched among documents, or texts among texts, as in `score_fidelity`. Ties keep
    the order of `known`.

    Args:
        baseline: the baseline's sample.
        variant: the variant's sample.
        transform: the variant's transform; its codes are searched.
        known: digest -> text. Sampled texts that are not in `known` are left out.
    """
    is_search = "query" in baseline and "query" in variant
    sides: tuple[Side, Side] = ("query", "document") if is_search else ("text", "text")
    if any(side not in baseline or side not in variant for side in sides):
        return ()
    (queries, base_q, ours_q), (documents, base_d, ours_d) = (
        _known(baseline[side], variant[side], known) for side in sides
    )
    if not queries or len(documents) < 2:
        return ()
    exact = identity_transform(base_d.shape[1])
    before = _neighbours(
        exact, exact.project(base_q), exact.project(base_d), excluding_self=not is_search
    )
    codes = transform.quantize(transform.project(ours_d))
    after = _neighbours(transform, transform.project(ours_q), codes, excluding_self=not is_search)
    examples = [
        Example(
            text=known[query],
            before=tuple(known[documents[row]] for row in rows_before),
            after=tuple(known[documents[row]] for row in rows_after),
        )
        for query, rows_before, rows_after in zip(queries, before, after, strict=True)
    ]
    position = {text: number for number, text in enumerate(known.values())}
    changed = [example for example in examples if example.n_kept < len(example.before)]
    changed.sort(key=lambda example: (example.n_kept, position[example.text]))
    return tuple(changed[:N_EXAMPLES])


def _known(
    baseline: SideVectors, variant: SideVectors, known: Mapping[str, str]
) -> tuple[list[str], Floats, Floats]:
    """Digests of the known texts that both samples have, with both models' vectors."""
    rows = set(variant.digests)
    shared = [digest for digest in baseline.digests if digest in rows]
    kept = [number for number, digest in enumerate(shared) if digest in known]
    base, ours = _aligned(baseline, variant)
    return [shared[number] for number in kept], base[kept], ours[kept]


def _n_offered(side: Side, sample: SideVectors) -> int:
    """How many different texts a sample was drawn from; an estimate if the sample is full.

    The estimate is (k - 1) / u, where u is the k-th least digest as a share of the largest digest
    (Bar-Yossef et al. 2002). Its relative standard error is 1 / sqrt(k - 2).
    """
    k = len(sample.digests)
    if k != _LIMITS[side]:
        return k
    largest: float = int(max(sample.digests), 16) / 2.0 ** (4 * len(sample.digests[0]))
    return round((k - 1) / largest)


def _aligned(baseline: SideVectors, variant: SideVectors) -> tuple[Floats, Floats]:
    """Vectors of the texts that both samples have, in the same order."""
    if baseline.vectors.shape[1] != variant.vectors.shape[1]:
        raise InputError(
            f"the variant's model has {variant.vectors.shape[1]} dimensions, but the baseline's "
            f"has {baseline.vectors.shape[1]}; fidelity compares a variant with its own base"
        )
    variant_rows = {digest: row for row, digest in enumerate(variant.digests)}
    shared = [digest for digest in baseline.digests if digest in variant_rows]
    baseline_rows = {digest: row for row, digest in enumerate(baseline.digests)}
    return (
        baseline.vectors[[baseline_rows[digest] for digest in shared]],
        variant.vectors[[variant_rows[digest] for digest in shared]],
    )


def _stored_cosines(
    base: Floats, ours: Floats, transform: VectorTransform
) -> npt.NDArray[np.float64]:
    """Cosines [N] of the baseline's vectors with the variant's stored vectors."""
    out = np.empty(len(base))
    for start in range(0, len(base), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        codes = transform.quantize(transform.project(ours[part]))
        stored = transform.restore(transform.dequantize(codes))
        rows = np.arange(len(stored))
        out[part] = _similarities(base[part], rows, stored, rows)
    return out


def _similarities(
    a: Floats,
    rows_a: npt.NDArray[np.intp],
    b: Floats,
    rows_b: npt.NDArray[np.intp],
    similarity: Similarity = "cosine",
) -> npt.NDArray[np.float64]:
    """Similarity [P] of row rows_a[i] of a [*, D] with row rows_b[i] of b [*, D], in float64."""
    out = np.empty(len(rows_a))
    for start in range(0, len(rows_a), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        x, y = a[rows_a[part]].astype(np.float64), b[rows_b[part]].astype(np.float64)
        dots = np.einsum("nd,nd->n", x, y)
        if similarity == "cosine":
            norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
            # A zero vector has no direction, so its cosine counts as 0.
            dots = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        out[part] = dots
    return out


def _neighbours(
    transform: VectorTransform,
    queries: Floats,
    codes: npt.NDArray[np.generic],
    *,
    excluding_self: bool,
) -> npt.NDArray[np.intp]:
    """Indices of the nearest stored vectors of each query: [Q, k]."""
    k = min(N_NEIGHBOURS, len(codes) - excluding_self)
    nearest, _ = search_vectors(transform, queries, codes, k + excluding_self)
    if not excluding_self:
        return nearest
    is_self = nearest == np.arange(len(nearest))[:, None]
    others_first = np.argsort(is_self, axis=1, kind="stable")
    return np.take_along_axis(nearest, others_first[:, :k], axis=1)


def _overlap(a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> float:
    """Mean share of the entries in a row of a [Q, k] that are also in that row of b [Q, k]."""
    return float((a[:, :, None] == b[:, None, :]).any(axis=2).mean())


def _random_pairs(
    n_left: int, n_right: int, *, distinct: bool
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Seeded random pairs of rows, with replacement; `distinct` pairs no row with itself."""
    rng = np.random.default_rng(_SEED)
    left = rng.integers(n_left, size=N_PAIRS)
    if distinct:
        return left, (left + rng.integers(1, n_right, size=N_PAIRS)) % n_right
    return left, rng.integers(n_right, size=N_PAIRS)


def _spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Spearman's rank correlation; 0 if one side is constant, because it has no ranks."""
    from scipy.stats import spearmanr  # the import takes most of a second

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)
