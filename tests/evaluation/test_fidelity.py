"""Fidelity agrees with brute force, and with known results for rotated and shuffled vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import rankdata

from gteopt.config.recipe import Dims, Vectors
from gteopt.errors import InputError, IntegrityError
from gteopt.evaluation.fidelity import (
    FidelitySampler,
    Side,
    SideVectors,
    make_fidelity_sample,
    most_changed_texts,
    read_fidelity_sample,
    score_fidelity,
    text_digest,
    write_fidelity_sample,
)
from gteopt.vectors.fit import fit_vector_transform
from gteopt.vectors.transform import identity_transform

DIMS = 32


def unit(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), dtype=np.float32)


def texts(seed: int, n: int, *, n_clusters: int = 12) -> npt.NDArray[np.float32]:
    """Clustered unit rows, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(n_clusters, DIMS))
    return unit(centres[rng.integers(n_clusters, size=n)] + 0.6 * rng.normal(size=(n, DIMS)))


def side(vectors: npt.NDArray[np.float32]) -> SideVectors:
    return SideVectors(tuple(f"{row:064x}" for row in range(len(vectors))), vectors)


@pytest.fixture
def search() -> dict[Side, SideVectors]:
    return {"query": side(texts(1, 60)), "document": side(texts(2, 400))}


@pytest.fixture
def alike() -> dict[Side, SideVectors]:
    return {"text": side(texts(3, 300))}


@pytest.mark.parametrize("suite", ["search", "alike"])
def test_identical_vectors_score_one_everywhere(suite: str, request: pytest.FixtureRequest) -> None:
    sample = request.getfixturevalue(suite)
    result = score_fidelity(sample, sample, identity_transform(DIMS))
    assert result.mean_cosine == pytest.approx(1, abs=1e-6)
    assert result.p1_cosine == pytest.approx(1, abs=1e-6)
    assert result.neighbour_overlap == 1
    assert result.spearman == pytest.approx(1, abs=1e-6)
    assert result.n_texts == sum(len(vectors.digests) for vectors in sample.values())


def test_a_rotation_keeps_neighbours_and_ranks_but_not_the_cosine(
    search: dict[Side, SideVectors],
) -> None:
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMS, DIMS)))[0]
    rotated: dict[Side, SideVectors] = {
        name: SideVectors(sample.digests, unit(sample.vectors @ rotation))
        for name, sample in search.items()
    }
    result = score_fidelity(search, rotated, identity_transform(DIMS))
    assert result.neighbour_overlap > 0.999  # float32 may swap two neighbours at the border
    assert result.spearman > 0.99999
    assert abs(result.mean_cosine) < 0.3


def test_shuffled_vectors_share_neighbours_only_by_chance() -> None:
    x = texts(4, 500, n_clusters=500)
    shuffled = x[np.random.default_rng(5).permutation(len(x))]
    result = score_fidelity({"text": side(x)}, {"text": side(shuffled)}, identity_transform(DIMS))
    chance = 10 / (len(x) - 1)
    assert result.neighbour_overlap == pytest.approx(chance, abs=0.01)
    assert abs(result.spearman) < 0.05


@pytest.mark.parametrize("code", ["float32", "int8", "binary"])
def test_search_fidelity_equals_brute_force_on_the_stored_codes(
    code: str, search: dict[Side, SideVectors]
) -> None:
    rng = np.random.default_rng(6)
    variant: dict[Side, SideVectors] = {
        name: SideVectors(sample.digests, unit(sample.vectors + 0.05 * rng.normal(size=(1, DIMS))))
        for name, sample in search.items()
    }
    vectors = Vectors.model_validate({"code": code, "rescore": 4})
    transform = fit_vector_transform(texts(7, 500), Dims(n=16), vectors)
    result = score_fidelity(search, variant, transform)

    base_q, base_d = (search[name].vectors.astype(np.float64) for name in ("query", "document"))
    z_q, z_d = (transform.project(variant[name].vectors) for name in ("query", "document"))
    stored_q, stored_d = (
        transform.dequantize(transform.quantize(z)).astype(np.float64) for z in (z_q, z_d)
    )

    def scored(row: int) -> npt.NDArray[np.float64]:
        """Float scores of the 40 best by codes, minus infinity for the others."""
        by_code: npt.NDArray[np.float64] = stored_d @ stored_q[row]
        if code == "float32":
            return by_code
        if code == "binary":
            bits = [np.unpackbits(transform.quantize(z), axis=1) for z in (z_q, z_d)]
            by_code = -(bits[0][row] != bits[1]).sum(axis=1).astype(np.float64)
        candidates = np.argsort(-by_code, kind="stable")[:40]
        out = np.full(len(stored_d), -np.inf)
        out[candidates] = stored_d[candidates] @ z_q[row].astype(np.float64)
        return out

    overlap = []
    for row in range(len(base_q)):
        exact = set(np.argsort(-(base_d @ base_q[row]), kind="stable")[:10])
        nearest = np.argsort(-scored(row), kind="stable")[:10]
        overlap.append(len(exact & set(nearest)) / 10)
    assert result.neighbour_overlap == pytest.approx(np.mean(overlap))

    stored = np.pad(np.concatenate([stored_q, stored_d]), ((0, 0), (0, DIMS - 16)))
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    original = np.concatenate([search[name].vectors for name in ("query", "document")])
    cosines = np.sum(stored * original, axis=1)
    assert result.mean_cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert result.p1_cosine == pytest.approx(np.percentile(cosines, 1), abs=1e-6)

    norm_q, norm_d = (np.linalg.norm(x, axis=1, keepdims=True) for x in (stored_q, stored_d))
    exact_similarity = base_q @ base_d.T
    stored_similarity = (stored_q / norm_q) @ (stored_d / norm_d).T
    ranks = [rankdata(x.ravel()) for x in (exact_similarity, stored_similarity)]
    # The result draws 20,000 of the 24,000 pairs.
    assert result.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=0.01)


def test_cutting_a_vector_costs_the_cosine_that_its_other_dimensions_hold(
    alike: dict[Side, SideVectors],
) -> None:
    x = alike["text"].vectors
    cosines = np.linalg.norm(x[:, :8], axis=1)  # a unit vector's cosine with its part
    result = score_fidelity(alike, alike, identity_transform(DIMS, kept=8))
    assert result.mean_cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert result.p1_cosine == pytest.approx(np.percentile(cosines, 1), abs=1e-6)
    assert result.mean_cosine < 0.7


def test_a_text_is_never_its_own_neighbour() -> None:
    # Each text has one twin. A text is not its own neighbour, so its twin is the nearest.
    # The variant separates the twins.
    x = texts(8, 100, n_clusters=100)
    twins = np.concatenate([x, x])
    result = score_fidelity({"text": side(twins)}, {"text": side(twins)}, identity_transform(DIMS))
    assert result.neighbour_overlap == 1
    apart = np.concatenate([x, -x])
    result = score_fidelity({"text": side(twins)}, {"text": side(apart)}, identity_transform(DIMS))
    assert result.neighbour_overlap < 0.6


def test_collapsed_vectors_have_no_rank_correlation(alike: dict[Side, SideVectors]) -> None:
    collapsed = np.tile(alike["text"].vectors[:1], (300, 1))
    result = score_fidelity(alike, {"text": side(collapsed)}, identity_transform(DIMS))
    assert result.spearman == 0


def test_only_texts_that_both_encoded_are_compared(alike: dict[Side, SideVectors]) -> None:
    half = SideVectors(alike["text"].digests[100:][::-1], alike["text"].vectors[100:][::-1])
    result = score_fidelity(alike, {"text": half}, identity_transform(DIMS))
    assert result.n_texts == 200
    assert result.mean_cosine == pytest.approx(1, abs=1e-6)


def test_models_of_different_width_are_refused(alike: dict[Side, SideVectors]) -> None:
    narrow: dict[Side, SideVectors] = {"text": side(alike["text"].vectors[:, :16])}
    with pytest.raises(InputError, match=r"16 dimensions, but the baseline's has 32"):
        score_fidelity(alike, narrow, identity_transform(16))


def test_nothing_in_common_is_an_error(alike: dict[Side, SideVectors]) -> None:
    with pytest.raises(InputError, match="at least two texts"):
        score_fidelity(alike, {}, identity_transform(DIMS))


def test_the_sample_depends_on_the_texts_alone() -> None:
    names = [f"text {i}" for i in range(300)]
    x = texts(9, 300)
    order = np.random.default_rng(10).permutation(300)

    def sampled(positions: npt.NDArray[np.intp], chunk: int) -> dict[Side, SideVectors]:
        sampler = FidelitySampler({"text": 50})
        for start in range(0, len(positions), chunk):
            part = positions[start : start + chunk]
            sampler.offer("text", [names[i] for i in part], "", x[part])
        return sampler.sample()

    in_order, shuffled = sampled(np.arange(300), 300), sampled(order, 7)
    assert in_order["text"].digests == shuffled["text"].digests
    np.testing.assert_array_equal(in_order["text"].vectors, shuffled["text"].vectors)
    assert len(in_order["text"].digests) == 50
    # Merging the samples of two halves gives the sample of all texts.
    merged = FidelitySampler({"text": 50})
    merged.merge(sampled(order[:150], 150))
    merged.merge(sampled(order[150:], 150))
    assert merged.sample()["text"].digests == in_order["text"].digests


def test_the_record_says_among_how_many_texts_neighbours_were_looked_for() -> None:
    small, n_all = 30, 40_000
    sampler = FidelitySampler()
    sampler.offer("query", [f"query {i}" for i in range(small)], "", texts(11, small))
    document = texts(12, 1)
    documents = np.broadcast_to(document, (n_all, DIMS))
    sampler.offer("document", [f"document {i}" for i in range(n_all)], "", documents)
    sampler.offer("document", [f"document {i}" for i in range(n_all)], "", documents)  # again
    result = score_fidelity(sampler.sample(), sampler.sample(), identity_transform(DIMS))
    assert (result.n_queries, result.n_documents) == (small, 2000)
    # Four standard errors of the estimate from 2000 digests.
    assert result.n_all_documents == pytest.approx(n_all, rel=4 / np.sqrt(1998))
    assert result.among.startswith("of 30 queries among 2,000 of about 4")
    alone = FidelitySampler()
    alone.offer("text", [f"text {i}" for i in range(small)], "", texts(13, small))
    alone_result = score_fidelity(alone.sample(), alone.sample(), identity_transform(DIMS))
    assert alone_result.among == "of 30 queries among 30 documents, tasks pooled"


def test_a_sample_survives_the_disk_bit_for_bit(
    tmp_path: Path, search: dict[Side, SideVectors]
) -> None:
    write_fidelity_sample(tmp_path / "texts.safetensors", search)
    back = read_fidelity_sample(tmp_path / "texts.safetensors")
    assert back.keys() == search.keys()
    for name, sample in search.items():
        assert back[name].digests == sample.digests
        np.testing.assert_array_equal(back[name].vectors, sample.vectors)


def test_a_cut_sample_is_refused(tmp_path: Path, search: dict[Side, SideVectors]) -> None:
    path = tmp_path / "texts.safetensors"
    write_fidelity_sample(path, search)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(IntegrityError, match="delete it"):
        read_fidelity_sample(path)


def test_examples_are_the_texts_that_keep_the_fewest_neighbours() -> None:
    names = [f"text {number}" for number in range(80)]
    base = texts(4, 80)
    changed = unit(base + 0.15 * np.random.default_rng(5).normal(size=base.shape))
    known = {text_digest(name): name for name in names}
    examples = most_changed_texts(
        make_fidelity_sample(names, base),
        make_fidelity_sample(names, changed),
        identity_transform(DIMS),
        known,
    )

    def nearest(vectors: npt.NDArray[np.float32], row: int) -> list[str]:
        similar = vectors @ vectors[row]
        similar[row] = -np.inf
        return [names[neighbour] for neighbour in np.argsort(-similar, kind="stable")[:10]]

    n_kept = {
        name: len(set(nearest(base, row)) & set(nearest(changed, row)))
        for row, name in enumerate(names)
    }
    fewest = sorted(names, key=lambda name: (n_kept[name], names.index(name)))[:10]
    assert [example.text for example in examples] == fewest
    for example in examples:
        row = names.index(example.text)
        assert list(example.before) == nearest(base, row)
        assert list(example.after) == nearest(changed, row)
        assert example.n_kept == n_kept[example.text]
    assert (
        most_changed_texts(
            make_fidelity_sample(names, base),
            make_fidelity_sample(names, base),
            identity_transform(DIMS),
            known,
        )
        == ()
    )


def test_examples_of_a_search_are_queries_with_documents_and_only_of_known_texts(
    search: dict[Side, SideVectors],
) -> None:
    noise = np.random.default_rng(6).normal(size=(400, DIMS))
    changed = {**search, "document": side(unit(search["document"].vectors + 0.2 * noise))}
    documents = {digest: f"document {row}" for row, digest in enumerate(search["document"].digests)}
    # Both sides of this fixture have the same row numbers, so one name stands for two texts.
    known = {digest: documents[digest] for digest in search["document"].digests[:200]}
    examples = most_changed_texts(search, changed, identity_transform(DIMS), known)
    assert len(examples) == 10
    for example in examples:
        row = int(example.text.removeprefix("document "))
        similar = search["document"].vectors[:200] @ search["query"].vectors[row]
        nearest = [
            f"document {neighbour}" for neighbour in np.argsort(-similar, kind="stable")[:10]
        ]
        assert list(example.before) == nearest
    assert most_changed_texts(search, changed, identity_transform(DIMS), {}) == ()
