"""Fidelity: how close a variant's vectors and rankings are to the baseline's, without labels.

Hides: which of a suite's texts are looked at, and the blocks in which they are compared. Refuses to
know: models, tasks, mteb.
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
from gteopt.vectors.search import search
from gteopt.vectors.transform import VectorTransform, identity

Side = Literal["query", "document", "text"]
"""What a text is in its task: searched with, searched among, or compared with its like."""
Floats = npt.NDArray[np.float32]

N_NEIGHBOURS = 10
N_EXAMPLES = 10
N_PAIRS = 20_000
_LIMITS: dict[Side, int] = {"query": 500, "document": 2000, "text": 2000}
_SEED = 0
_BLOCK_ROWS = 4096  # rows of full vectors compared at once: 117 MB in float64 at 3584 dimensions


@dataclass(frozen=True)
class SideVectors:
    """Full-dimension vectors [N, full_dims] of one side's texts, rows in order of their digests."""

    digests: tuple[str, ...]
    vectors: Floats


Sample = Mapping[Side, SideVectors]


class Sampler:
    """Keeps, of all texts that pass, a fixed pseudo-random sample of each side with its vectors.

    The texts whose seeded SHA-256 is least are kept (a bottom-k sketch, Cohen & Kaplan 2007): every
    text is as likely as another, no list of all texts is needed, and the sample does not depend on
    their order, so that two models and a resumed run look at the same texts.
    """

    def __init__(self, limits: Mapping[Side, int] = _LIMITS) -> None:
        self._limits = limits
        self._kept: dict[Side, dict[str, Floats]] = {side: {} for side in limits}

    def offer(self, side: Side, texts: Sequence[str], prompt: str, vectors: Floats) -> None:
        """Texts of one side with their vectors [N, full_dims]; `prompt` tells apart the same text
        encoded in two ways.
        """
        self._keep(side, [digest_of(text, prompt) for text in texts], vectors)

    def merge(self, sample: Sample) -> None:
        """Another sample's texts."""
        for side, each in sample.items():
            self._keep(side, each.digests, each.vectors)

    def sample(self) -> dict[Side, SideVectors]:
        """What is kept; sides without any text are left out."""
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


def digest_of(text: str, prompt: str = "") -> str:
    """What a sample knows a text by; `prompt` as in `Sampler.offer`."""
    return hashlib.sha256(f"{_SEED}\0{prompt}\0{text}".encode()).hexdigest()


def sample_of(texts: Sequence[str], vectors: Floats) -> dict[Side, SideVectors]:
    """Texts that are compared with their like, each with its vector [N, full_dims]: all of them."""
    sampler = Sampler({"text": len(texts)})
    sampler.offer("text", texts, "", vectors)
    return sampler.sample()


def write_sample(path: Path, sample: Sample) -> None:
    """Save a sample; a reader sees the old one or the whole new one.

    Vectors take 16 bits where these hold them exactly, as they do when they come from a cache.
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


def read_sample(path: Path) -> dict[Side, SideVectors]:
    """Read what `write_sample` saved.

    Raises:
        IntegrityError: damaged.
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


def fidelity(baseline: Sample, variant: Sample, transform: VectorTransform) -> Fidelity:
    """Compare two models on the texts that both encoded.

    Neighbours and similarities are those of queries with documents where the suite has a retrieval
    task, else of texts with other texts. The baseline's are exact, in float at full dimension; the
    variant's are on its vectors as stored. Cosines are over all texts, of what is stored with the
    baseline's vector: a cut or coded vector stands for one of full length.

    Args:
        baseline: the baseline's sample.
        variant: the variant's; texts that only one of the two has are left out.
        transform: the variant's; its codes are searched, its ranges are never refitted.

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
    exact = identity(base_d.shape[1])
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


def most_changed(
    baseline: Sample, variant: Sample, transform: VectorTransform, known: Mapping[str, str]
) -> tuple[Example, ...]:
    """The ten texts that keep the fewest of their ten nearest, with both lists.

    Queries are searched with among documents, and texts among one another, as in `fidelity`. Of
    equals, those come first that come first in `known`.

    Args:
        baseline: the baseline's sample.
        variant: the variant's.
        transform: the variant's; its codes are searched.
        known: digest -> text. Texts of the samples that are not in it are left out.
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
    exact = identity(base_d.shape[1])
    before = _neighbours(
        exact, exact.project(base_q), exact.project(base_d), excluding_self=not is_search
    )
    codes = transform.quantize(transform.project(ours_d))
    after = _neighbours(transform, transform.project(ours_q), codes, excluding_self=not is_search)
    found = [
        Example(
            text=known[query],
            before=tuple(known[documents[other]] for other in theirs),
            after=tuple(known[documents[other]] for other in mine),
        )
        for query, theirs, mine in zip(queries, before, after, strict=True)
    ]
    place = {text: number for number, text in enumerate(known.values())}
    changed = [example for example in found if example.n_kept < len(example.before)]
    changed.sort(key=lambda example: (example.n_kept, place[example.text]))
    return tuple(changed[:N_EXAMPLES])


def _known(
    baseline: SideVectors, variant: SideVectors, known: Mapping[str, str]
) -> tuple[list[str], Floats, Floats]:
    """Digests of the texts that both have and that are known, with both models' vectors."""
    rows = set(variant.digests)
    shared = [digest for digest in baseline.digests if digest in rows]
    kept = [number for number, digest in enumerate(shared) if digest in known]
    base, ours = _aligned(baseline, variant)
    return [shared[number] for number in kept], base[kept], ours[kept]


def _n_offered(side: Side, sample: SideVectors) -> int:
    """Different texts that a sample was drawn from; where it is full, the estimate (k - 1) / u of
    Bar-Yossef et al. 2002, u the k-th least digest as a share of the largest: its standard error is
    1 / sqrt(k - 2), 2 % of 2000.
    """
    k = len(sample.digests)
    if k != _LIMITS[side]:
        return k
    largest: float = int(max(sample.digests), 16) / 2.0 ** (4 * len(sample.digests[0]))
    return round((k - 1) / largest)


def _aligned(baseline: SideVectors, variant: SideVectors) -> tuple[Floats, Floats]:
    """Vectors of the texts that both have, in the same order."""
    if baseline.vectors.shape[1] != variant.vectors.shape[1]:
        raise InputError(
            f"the variant's model has {variant.vectors.shape[1]} dimensions, the baseline's "
            f"{baseline.vectors.shape[1]}; fidelity compares a variant with its own base"
        )
    rows = {digest: row for row, digest in enumerate(variant.digests)}
    shared = [digest for digest in baseline.digests if digest in rows]
    mine = {digest: row for row, digest in enumerate(baseline.digests)}
    return (
        baseline.vectors[[mine[digest] for digest in shared]],
        variant.vectors[[rows[digest] for digest in shared]],
    )


def _stored_cosines(
    base: Floats, ours: Floats, transform: VectorTransform
) -> npt.NDArray[np.float64]:
    """Cosine [N] of each of the baseline's vectors with what is stored of the variant's."""
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
            # A zero vector points nowhere: it is like nothing.
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
    found, _ = search(transform, queries, codes, k + excluding_self)
    if not excluding_self:
        return found
    is_self = found == np.arange(len(found))[:, None]
    others_first = np.argsort(is_self, axis=1, kind="stable")
    return np.take_along_axis(found, others_first[:, :k], axis=1)


def _overlap(a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> float:
    """Mean share of a row of a [Q, k] that is in the same row of b [Q, k]."""
    return float((a[:, :, None] == b[:, None, :]).any(axis=2).mean())


def _random_pairs(
    n_left: int, n_right: int, *, distinct: bool
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Seeded pairs of rows, drawn with replacement; `distinct` never pairs a row with itself."""
    rng = np.random.default_rng(_SEED)
    left = rng.integers(n_left, size=N_PAIRS)
    if distinct:
        return left, (left + rng.integers(1, n_right, size=N_PAIRS)) % n_right
    return left, rng.integers(n_right, size=N_PAIRS)


def _spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Rank correlation; 0 where one side is constant, for a constant ranks nothing."""
    from scipy.stats import spearmanr  # most of a second; only here

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)
