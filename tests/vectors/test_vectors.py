"""Projections, stored codes and search, against plain re-computations and scikit-learn."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.decomposition import TruncatedSVD

from gteopt.config.recipe import Dims, VectorCode, Vectors
from gteopt.errors import GteoptError, InputError, IntegrityError, NumericsError
from gteopt.evaluation.corpus_search import _by_torch
from gteopt.vectors import fit as fit_module
from gteopt.vectors import search as search_module
from gteopt.vectors.fit import fit_vector_transform
from gteopt.vectors.search import BlockwiseSearch, DotProducts, numpy_products, search_vectors
from gteopt.vectors.transform import VectorTransform, identity_transform

Array = npt.NDArray[Any]
CODES: list[VectorCode] = ["float32", "int8", "int4", "binary", "rabitq"]


def unit(x: Array) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype("f4")
    return rows


def clustered(seed: int, n: int, dims: int = 64) -> npt.NDArray[np.float32]:
    """Unit rows around 40 shared centres with falling variance, like a model's vectors."""
    scale = np.linspace(1.0, 0.3, dims)
    centres = np.random.default_rng(99).normal(size=(40, dims)) * scale
    rng = np.random.default_rng(seed)
    return unit(centres[rng.integers(40, size=n)] + 0.7 * rng.normal(size=(n, dims)) * scale + 0.1)


def true_top(queries: Array, documents: Array, k: int) -> Array:
    return np.argsort(-(queries @ documents.T), axis=1, kind="stable")[:, :k]


def recall(retrieved: Array, truth: Array) -> float:
    pairs = zip(retrieved, truth, strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))


def test_slicing_keeps_the_first_dimensions_as_unit_rows() -> None:
    x = clustered(1, 20)
    transform = fit_vector_transform(x, Dims(n=24), Vectors())
    np.testing.assert_allclose(transform.project(x), unit(x[:, :24]), atol=1e-7)
    assert transform.record().method == "slice"


def test_identity_returns_unit_rows_unchanged() -> None:
    x = clustered(2, 20)
    np.testing.assert_allclose(identity_transform(64).project(x), x, atol=1e-7)


def test_a_row_that_the_slice_makes_zero_stays_zero() -> None:
    x = np.zeros((1, 8), dtype=np.float32)
    x[0, 7] = 1
    assert not fit_vector_transform(x, Dims(n=4), Vectors()).project(x).any()


def test_pca_of_low_rank_vectors_keeps_every_cosine() -> None:
    rng = np.random.default_rng(3)
    x = unit(rng.normal(size=(200, 6)) @ rng.normal(size=(6, 64)))
    transform = fit_vector_transform(x, Dims(n=6, method="pca"), Vectors())
    z = transform.project(x)
    assert transform.projection is not None
    np.testing.assert_allclose(z @ z.T, x @ x.T, atol=1e-5)
    np.testing.assert_allclose(z @ transform.projection, x, atol=1e-5)
    assert transform.explained_variance_ratio == pytest.approx(1.0)


def test_pca_rows_are_orthonormal_and_span_scikit_learns_subspace() -> None:
    x = clustered(4, 500)
    transform = fit_vector_transform(x, Dims(n=10, method="pca"), Vectors())
    ours = transform.projection
    assert ours is not None
    np.testing.assert_allclose(ours @ ours.T, np.eye(10), atol=1e-5)
    theirs = TruncatedSVD(10, algorithm="arpack", random_state=0).fit(x.astype(np.float64))
    np.testing.assert_allclose(ours.T @ ours, theirs.components_.T @ theirs.components_, atol=1e-5)
    assert transform.explained_variance_ratio == pytest.approx(
        theirs.explained_variance_ratio_.sum(), abs=1e-6
    )


def nearest_by_codes(transform: VectorTransform, x: Array, k: int) -> Array:
    """The nearest other rows of each row, by dequantized codes."""
    z = transform.dequantize(transform.quantize(transform.project(x))).astype("f8")
    scores = z @ z.T - 9 * np.eye(len(z))
    return np.argsort(-scores.round(9), axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("code", ["float32", "int8", "binary"])
def test_auto_takes_what_keeps_more_neighbours_of_texts_it_was_not_fitted_on(
    code: VectorCode,
) -> None:
    """The oracle holds out a quarter of the texts at a time and searches it by stored codes."""
    rng = np.random.default_rng(5)
    turned = rng.normal(size=(400, 12)) @ np.linalg.qr(rng.normal(size=(64, 64)))[0][:12]
    stored = Vectors(code=code, rescore=1)
    for x, dims, k in ((unit(turned), 12, 1), (clustered(6, 820), 20, 2)):
        transform = fit_vector_transform(x, Dims(n=dims, method="auto"), stored)
        kept = transform.record().neighbours_kept
        assert kept is not None
        if dims == 12 and code == "float32":  # few directions, not along the axes
            assert kept["pca"] > 0.95 > kept["slice"]
        best = max(kept, key=lambda way: kept[way])
        assert (transform.method, transform.rotated) == (best.split()[0], best == "pca rotated")
        for method in ("slice", "pca"):
            shares = []
            for fold in range(4):
                held_out, others = x[fold::4], np.delete(x, np.s_[fold::4], axis=0)
                wanted = nearest_by_codes(identity_transform(64), held_out, k)
                few = Dims.model_validate({"n": dims, "method": method})
                plain = fit_vector_transform(
                    others, few, Vectors() if code == "binary" else stored
                )  # not rotated
                neighbours = nearest_by_codes(replace(plain, code=code), held_out, k)
                shares.append(recall(neighbours, wanted))
            assert kept[method] == pytest.approx(np.mean(shares), abs=6e-3)
        again = VectorTransform.from_tensors(transform.record(), x.shape[1], transform.to_tensors())
        assert again.record() == transform.record()


def test_a_pca_for_bits_is_turned_where_that_keeps_more_and_only_there() -> None:
    dims, stored = Dims(n=24, method="pca"), Vectors(code="binary")
    x, fresh = clustered(8, 800), clustered(9, 400)
    plain, turned = fit_vector_transform(x, dims, Vectors()), fit_vector_transform(x, dims, stored)
    kept = turned.record().neighbours_kept
    assert kept is not None
    assert turned.rotated
    assert kept["pca rotated"] > kept["pca"]
    assert set(kept) == {"pca", "pca rotated"}
    a, b = plain.project(fresh), turned.project(fresh)
    np.testing.assert_allclose(b @ b.T, a @ a.T, atol=1e-5)  # floats have the same cosines
    projection = turned.projection
    assert projection is not None
    np.testing.assert_allclose(projection @ projection.T, np.eye(24), atol=1e-5)
    wanted = nearest_by_codes(identity_transform(64), fresh, 4)
    without = recall(nearest_by_codes(replace(plain, code="binary"), fresh, 4), wanted)
    assert recall(nearest_by_codes(turned, fresh, 4), wanted) > without + 0.02
    few = fit_vector_transform(x[:196], dims, stored)  # 49 held out: too few to choose by
    assert (few.rotated, few.neighbours_kept) == (False, None)


@pytest.mark.parametrize("seed", range(5))
def test_a_square_that_was_turned_is_turned_back_until_its_signs_say_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.choice([-1.0, 1.0], size=(400, 2)) / np.sqrt(2)
    z = corners @ np.linalg.qr(rng.normal(size=(2, 2)))[0]
    turned = z @ fit_module._towards_signs(z.astype("f4"))
    np.testing.assert_allclose(np.abs(turned), 1 / np.sqrt(2), atol=1e-6)


def test_each_step_of_the_rotation_brings_vectors_closer_to_their_signs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    z = fit_vector_transform(clustered(12, 500), Dims(n=24, method="pca"), Vectors()).project(
        clustered(12, 500)
    )
    away = []
    for steps in range(8):
        monkeypatch.setattr(fit_module, "_ROTATION_STEPS", steps)
        turn = fit_module._towards_signs(z)
        np.testing.assert_allclose(turn @ turn.T, np.eye(24), atol=1e-9)
        turned = z @ turn
        away.append(float(np.square(np.where(turned > 0, 1, -1) - turned).sum()))
    assert away == sorted(away, reverse=True)
    assert away[-1] < away[0]


def test_auto_needs_texts_to_choose_by_and_does_without_a_pca_that_they_cannot_give() -> None:
    with pytest.raises(InputError, match="at least 200 calibration texts to choose by, found 60"):
        fit_vector_transform(clustered(3, 60), Dims(n=8, method="auto"), Vectors())
    few = fit_vector_transform(clustered(3, 210, 192), Dims(n=180, method="auto"), Vectors())
    assert (few.method, few.record().neighbours_kept) == ("slice", None)


def test_full_pca_changes_no_cosine() -> None:
    x, other = clustered(5, 100), clustered(6, 30)
    z = fit_vector_transform(x, Dims(n=64, method="pca"), Vectors()).project(other)
    np.testing.assert_allclose(z @ z.T, other @ other.T, atol=1e-5)


def test_projecting_a_row_does_not_depend_on_its_batch() -> None:
    x = clustered(7, 300)
    transform = fit_vector_transform(x, Dims(n=16, method="pca"), Vectors())
    alone = np.concatenate([transform.project(row[None]) for row in x])
    np.testing.assert_array_equal(transform.project(x), alone)


@pytest.mark.parametrize(
    ("n_vectors", "dims", "vectors", "expected"),
    [
        (50, Dims(n=65), Vectors(), "dims.n is 65, but the model's vectors have 64"),
        (50, Dims(n=65, method="pca"), Vectors(), "dims.n is 65, but the model's vectors have 64"),
        (50, Dims(n=51, method="pca"), Vectors(), "at least 51 calibration texts, found 50"),
        (15, None, Vectors(code="int8"), "at least 16 calibration texts .* found 15"),
    ],
)
def test_what_the_calibration_vectors_do_not_allow_is_refused_with_numbers(
    n_vectors: int, dims: Dims | None, vectors: Vectors, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        fit_vector_transform(clustered(8, n_vectors), dims, vectors)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_refused_everywhere(code: VectorCode, bad: float) -> None:
    x = clustered(9, 50)
    transform = fit_vector_transform(x, None, Vectors(code=code))
    stored = transform.quantize(x)
    broken = x.copy()
    broken[3, 5] = bad
    for act in (
        lambda: fit_vector_transform(broken, None, Vectors(code=code)),
        lambda: transform.project(broken),
        lambda: transform.quantize(broken),
        lambda: search_vectors(transform, broken, stored, 3),
    ):
        with pytest.raises(NumericsError, match=r"1 of 50 .* hold NaN or infinity"):
            act()


def test_int8_values_out_of_range_saturate_where_a_bare_cast_flips_their_sign() -> None:
    x = clustered(10, 200)
    transform = fit_vector_transform(x, None, Vectors(code="int8"))
    assert transform.low is not None
    assert transform.high is not None
    step = (transform.high - transform.low) / 255
    outside = np.stack([transform.high + 9 * step, transform.low - 9 * step])
    wrapped = (np.rint((outside - transform.low) / step) - 128).astype(np.int64).astype(np.int8)
    assert (wrapped[0] < 0).all()
    assert (wrapped[1] > 0).all()
    codes = transform.quantize(outside)
    assert (codes[0] == 127).all()
    assert (codes[1] == -128).all()


def test_int8_error_is_at_most_half_a_step_inside_the_range() -> None:
    x = clustered(11, 500)
    transform = fit_vector_transform(x, None, Vectors(code="int8"))
    assert transform.low is not None
    assert transform.high is not None
    inside = (x >= transform.low) & (x <= transform.high)
    assert inside.mean() > 0.999
    error = np.abs(transform.dequantize(transform.quantize(x)) - x)
    assert (error <= (transform.high - transform.low) / 255 / 2 + 1e-7)[inside].all()


def test_a_dimension_constant_in_calibration_is_coded_as_that_constant() -> None:
    x = clustered(12, 50)
    x[:, 7] = 0.25
    transform = fit_vector_transform(unit(x), Dims(n=8), Vectors(code="int8"))
    constant = VectorTransform(
        full_dims=2,
        dims=2,
        code="int8",
        low=np.array([0.5, -1], dtype=np.float32),
        high=np.array([0.5, 1], dtype=np.float32),
    )
    decoded = constant.dequantize(constant.quantize([[0.9, 1.0], [-0.9, -1.0]]))
    np.testing.assert_array_equal(decoded, np.array([[0.5, 1], [0.5, -1]], dtype=np.float32))
    assert np.isfinite(transform.dequantize(transform.quantize(transform.project(x)))).all()


@pytest.mark.parametrize("code", CODES)
def test_a_vector_gets_the_same_code_in_every_batch(code: VectorCode) -> None:
    transform = fit_vector_transform(clustered(13, 100), None, Vectors(code=code))
    x, scaled = clustered(14, 40), 3 * clustered(15, 7)
    together = transform.quantize(np.concatenate([scaled, x]))[7:]
    np.testing.assert_array_equal(together, transform.quantize(x))
    np.testing.assert_array_equal(together[5:6], transform.quantize(x[5:6]))


def test_binary_packs_signs_first_dimension_highest() -> None:
    transform = fit_vector_transform(clustered(16, 20, dims=10), None, Vectors(code="binary"))
    z = [[1, -1, 0, 1, -1, -1, -1, 1, -1, 1]]
    assert transform.quantize(z).tolist() == [[0b10010001, 0b01000000]]
    root = 1 / np.sqrt(10)
    expected = root * np.where(np.array(z) > 0, 1, -1)
    np.testing.assert_allclose(transform.dequantize(transform.quantize(z)), expected, rtol=1e-6)


@pytest.mark.parametrize("dims", [64, 52])
def test_binary_scores_equal_a_count_of_differing_bits(dims: int) -> None:
    x, queries = clustered(17, 60, dims), clustered(18, 5, dims)
    transform = fit_vector_transform(x, None, Vectors(code="binary", rescore=1))
    indices, scores = search_vectors(transform, queries, transform.quantize(x), 60)
    for query, documents, values in zip(queries, indices, scores, strict=True):
        for document, value in zip(documents, values, strict=True):
            differing = sum((a > 0) != (b > 0) for a, b in zip(query, x[document], strict=True))
            assert value == pytest.approx(1 - 2 * differing / dims, abs=1e-6)


def test_float_search_equals_a_full_sort() -> None:
    documents, queries = clustered(19, 700), clustered(20, 30)
    indices, scores = search_vectors(identity_transform(64), queries, documents, 10)
    exact = queries.astype(np.float64) @ documents.astype(np.float64).T
    np.testing.assert_array_equal(indices, np.argsort(-exact, axis=1, kind="stable")[:, :10])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, indices, axis=1), atol=1e-6)


def near_ties(n: int, dims: int) -> Array:
    """Vectors that float32 cannot order: copies, and others that differ in the last place."""
    rng = np.random.default_rng(51)
    rows = np.repeat(clustered(52, n // 20, dims), 20, axis=0)
    steps = rng.integers(-2, 3, rows.shape) * (rng.random(rows.shape) < 0.1)
    steps[::5] = 0
    apart: Array = rows + (steps * np.spacing(rows)).astype(np.float32)
    return apart[rng.permutation(len(rows))]


@pytest.mark.parametrize("code", ["float32", "int8"])
@pytest.mark.parametrize("dims", [48, 1024])
@pytest.mark.parametrize("products", [numpy_products, _by_torch(torch.device("cpu"))])
def test_a_search_ranks_as_float64_does_to_the_last_tie(
    code: VectorCode, dims: int, products: DotProducts
) -> None:
    ties = near_ties(2000, dims)
    # Ties among other vectors need few float64 sums, ties alone need nearly all.
    for documents in (np.concatenate([clustered(53, 4000, dims), ties]), ties):
        queries = np.concatenate([clustered(54, 20, dims), documents[::100]])
        transform = fit_vector_transform(documents[::7], None, Vectors(code=code, rescore=1))
        stored = transform.quantize(documents)
        search = BlockwiseSearch(transform, queries, 10, products)
        for piece in np.split(stored, [1000, 1500]):
            search.add(piece)
        coded = transform.dequantize(transform.quantize(queries)).astype(np.float64)
        decoded = transform.dequantize(stored).astype(np.float64)
        scores = (coded @ decoded.T).astype(np.float32)
        expected = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        indices, values = search.nearest()
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(scores, expected, axis=1))


def test_products_that_find_no_room_on_a_device_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    documents, queries = clustered(57, 900), clustered(58, 7)
    product = _by_torch(torch.device("cpu"))(documents)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "from_numpy", full)
    np.testing.assert_array_equal(product(queries), numpy_products(documents)(queries))


def test_no_float32_product_within_the_bound_can_hide_a_best_one() -> None:
    """The worst rounding within the bound: down for the best, up for all others."""
    documents, queries = near_ties(3000, 64), clustered(56, 12)
    gamma = 64 * 2.0**-24 / (1 - 64 * 2.0**-24)

    def worst(stored: Array) -> Callable[[Array], Array]:
        def product(asked: Array) -> Array:
            true = asked.astype(np.float64) @ stored.astype(np.float64).T
            best = true >= np.sort(true, axis=1)[:, -5:-4]
            return (true + 0.999 * np.where(best, -gamma, gamma)).astype(np.float32)

        return product

    search = BlockwiseSearch(identity_transform(64), queries, 5, worst)
    for piece in np.split(documents, [1400]):
        search.add(piece)
    indices, _ = search.nearest()
    scores = (queries.astype(np.float64) @ documents.astype(np.float64).T).astype(np.float32)
    np.testing.assert_array_equal(indices, np.argsort(-scores, axis=1, kind="stable")[:, :5])


def test_int8_search_loses_no_more_than_its_coding_error() -> None:
    documents, queries = clustered(21, 2000), clustered(22, 50)
    transform = fit_vector_transform(clustered(23, 300), None, Vectors(code="int8"))
    stored = transform.quantize(documents)
    indices, _ = search_vectors(transform, queries, stored, 10)
    truth = true_top(queries, documents, 10)
    # |q.d' - q.d| <= |d' - d| for unit q: once for a hit, once for the document it displaces.
    error = np.linalg.norm(transform.dequantize(stored) - documents, axis=1).max()
    exact = queries @ documents.T
    worst_found = np.take_along_axis(exact, indices, axis=1).min(axis=1)
    tenth = np.take_along_axis(exact, truth, axis=1)[:, -1]
    assert (worst_found >= tenth - 2 * error).all()
    assert error < 0.02
    assert recall(indices, truth) >= 0.95


@pytest.mark.parametrize(("code", "least_gain"), [("int8", 0.0), ("binary", 0.05)])
def test_rescoring_does_not_lower_recall_at_10(code: VectorCode, least_gain: float) -> None:
    transforms = [
        fit_vector_transform(clustered(40, 300), None, Vectors(code=code, rescore=rescore))
        for rescore in (1, 4)
    ]
    gains = []
    for seed in range(100, 108):
        documents, queries = clustered(seed, 2000), clustered(seed + 50, 50)
        truth = true_top(queries, documents, 10)
        plain, rescored = (
            recall(search_vectors(t, queries, t.quantize(documents), 10)[0], truth)
            for t in transforms
        )
        gains.append(rescored - plain)
    assert np.mean(gains) >= least_gain


def test_rescored_scores_are_float_query_times_decoded_document() -> None:
    documents, queries = clustered(27, 300), clustered(28, 8)
    transform = fit_vector_transform(documents, None, Vectors(code="binary", rescore=4))
    stored = transform.quantize(documents)
    indices, scores = search_vectors(transform, queries, stored, 10)
    decoded = transform.dequantize(stored)
    for query, row, values in zip(queries, indices, scores, strict=True):
        np.testing.assert_allclose(values, decoded[row] @ query, atol=1e-6)
        assert (np.diff(values) <= 0).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("rescore", [1, 3])
def test_equal_documents_come_in_order_of_their_index(
    code: VectorCode, rescore: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "_BLOCK_VECTORS", 7)
    documents = np.repeat(clustered(29, 4), 25, axis=0)
    transform = fit_vector_transform(clustered(30, 50), None, Vectors(code=code, rescore=rescore))
    indices, scores = search_vectors(transform, clustered(31, 6), transform.quantize(documents), 60)
    for row, values in zip(indices, scores, strict=True):
        tied = np.diff(values) == 0
        assert tied.sum() >= 50
        assert (np.diff(row)[tied] > 0).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("rescore", [1, 4])
def test_blocks_do_not_change_the_answer(
    code: VectorCode, rescore: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents, queries = clustered(32, 500), clustered(33, 23)
    transform = fit_vector_transform(documents, None, Vectors(code=code, rescore=rescore))
    stored = transform.quantize(documents)
    whole = search_vectors(transform, queries, stored, 12)
    monkeypatch.setattr(search_module, "_BLOCK_VECTORS", 37)
    monkeypatch.setattr(search_module, "_BLOCK_SCORES", 37 * 5)
    blocked = search_vectors(transform, queries, stored, 12)
    np.testing.assert_array_equal(whole[0], blocked[0])
    np.testing.assert_array_equal(whole[1], blocked[1])


def in_two_stages(transform: VectorTransform, query: Array, codes: Array, k: int) -> Array:
    """One query without blocks: candidates by codes, ranked by the float query."""
    stored = transform.dequantize(codes).astype(np.float64)
    coded = transform.dequantize(transform.quantize(query[None]))[0].astype(np.float64)
    by_code = (stored @ coded).astype(np.float32)
    candidates = np.sort(np.argsort(-by_code, kind="stable")[: k * transform.rescore])
    scores = (stored[candidates] @ query.astype(np.float64)).astype(np.float32)
    best: Array = candidates[np.argsort(-scores, kind="stable")[:k]]
    return best


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("cuts", [[0, 300, 301, 350], [1, 1, 200], list(range(0, 400, 9))])
def test_a_corpus_that_comes_in_pieces_is_searched_as_one(
    code: VectorCode, cuts: list[int]
) -> None:
    """Every document occurs twice, so ties lie in different pieces."""
    # With 48 dimensions, scores that are not rounded alike would break ties: 2 / 48 is no float32.
    documents, queries = np.tile(clustered(45, 200, 48), (2, 1)), clustered(46, 9, 48)
    transform = fit_vector_transform(documents, None, Vectors(code=code, rescore=4))
    stored = transform.quantize(documents)
    search = BlockwiseSearch(transform, queries, 12)
    for piece in np.split(stored, cuts):
        search.add(piece)
    whole, in_pieces = search_vectors(transform, queries, stored, 12), search.nearest()
    np.testing.assert_array_equal(in_pieces[0], whole[0])
    np.testing.assert_array_equal(in_pieces[1], whole[1])
    if code != "float32":
        oracle = [in_two_stages(transform, query, stored, 12) for query in queries]
        np.testing.assert_array_equal(in_pieces[0], oracle)


@pytest.mark.parametrize("code", CODES)
def test_candidates_scored_pair_by_pair_rank_as_a_search_among_them(code: VectorCode) -> None:
    documents, queries = clustered(47, 120), clustered(48, 6)
    transform = fit_vector_transform(documents, None, Vectors(code=code, rescore=3))
    stored = transform.quantize(documents)
    for query, candidates in zip(queries, np.split(np.repeat(stored, 2, axis=0), 6), strict=True):
        by_code, rescored = transform.score_pairs(np.tile(query, (len(candidates), 1)), candidates)
        best = transform.best_of(by_code, rescored, 10)
        indices, scores = search_vectors(transform, query[None], candidates, 10)
        np.testing.assert_array_equal(best, indices[0])
        np.testing.assert_array_equal(rescored[best], scores[0])


def test_the_memory_of_a_search_does_not_grow_with_the_corpus() -> None:
    block, queries = clustered(49, 4096), clustered(50, 8)

    def peak(n_blocks: int) -> int:
        search = BlockwiseSearch(identity_transform(64), queries, 10)
        search.add(block)
        tracemalloc.start()
        for _ in range(n_blocks):
            search.add(block)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak_bytes

    assert peak(64) < 1.1 * peak(1) < 16 * block.nbytes


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("n_documents", [0, 1, 5])
def test_k_beyond_the_corpus_returns_all_of_it(code: VectorCode, n_documents: int) -> None:
    transform = fit_vector_transform(clustered(34, 50), None, Vectors(code=code))
    stored = transform.quantize(clustered(35, n_documents))
    indices, scores = search_vectors(transform, clustered(36, 3), stored, 10)
    assert indices.shape == scores.shape == (3, n_documents)
    assert (np.sort(indices, axis=1) == np.arange(n_documents)).all()


def test_search_without_queries_returns_nothing() -> None:
    documents = clustered(37, 20)
    assert search_vectors(identity_transform(64), documents[:0], documents, 5)[0].shape == (0, 5)


@pytest.mark.parametrize("dims", [Dims(n=20), Dims(n=20, method="pca"), None])
@pytest.mark.parametrize("code", CODES)
def test_bytes_per_vector_is_what_codes_take(code: VectorCode, dims: Dims | None) -> None:
    x = clustered(38, 50)
    transform = fit_vector_transform(x, dims, Vectors(code=code))
    codes = transform.quantize(transform.project(x))
    assert transform.bytes_per_vector == codes.nbytes / 50 == transform.record().bytes_per_vector


@pytest.mark.parametrize("dims", [Dims(n=20), Dims(n=20, method="pca"), None])
@pytest.mark.parametrize("code", CODES)
def test_a_stored_transform_comes_back_exactly(code: VectorCode, dims: Dims | None) -> None:
    x = clustered(39, 50)
    transform = fit_vector_transform(x, dims, Vectors(code=code, rescore=3))
    back = VectorTransform.from_tensors(transform.record(), 64, transform.to_tensors())
    assert back.record() == transform.record()
    assert back.to_tensors().keys() == transform.to_tensors().keys()
    np.testing.assert_array_equal(
        back.quantize(back.project(x)), transform.quantize(transform.project(x))
    )


def test_damaged_tensors_are_refused_all_at_once() -> None:
    transform = fit_vector_transform(
        clustered(41, 50), Dims(n=20, method="pca"), Vectors(code="int8")
    )
    tensors: dict[str, Array] = dict(transform.to_tensors())
    tensors["projection"] = tensors["projection"].T
    tensors["high"] = tensors["high"].astype(np.float64)
    tensors["low"] = np.full(20, np.nan, dtype=np.float32)
    tensors["bias"] = tensors["low"]
    with pytest.raises(IntegrityError) as caught:
        VectorTransform.from_tensors(transform.record(), 64, tensors)
    for part in (
        "'bias' is unknown",
        "'high' is float64 (20,)",
        "'projection' is float32 (64, 20), must be float32 (20, 64)",
        "'low' holds NaN",
    ):
        assert part in str(caught.value)
    with pytest.raises(IntegrityError, match="'high' is missing"):
        VectorTransform.from_tensors(transform.record(), 64, {})
    swapped = dict(transform.to_tensors())
    swapped["low"], swapped["high"] = swapped["high"], swapped["low"]
    with pytest.raises(IntegrityError, match="'low' exceeds 'high'"):
        VectorTransform.from_tensors(transform.record(), 64, swapped)


def test_stored_float_vectors_with_nan_are_refused() -> None:
    documents = clustered(43, 20)
    documents[4, 4] = np.nan
    with pytest.raises(NumericsError, match="1 of 20 stored vectors hold NaN"):
        search_vectors(identity_transform(64), clustered(44, 2), documents, 3)


def test_a_record_at_odds_with_itself_is_refused() -> None:
    record = identity_transform(64).record()
    with pytest.raises(IntegrityError, match="64 dimensions do not fit the model's 32"):
        VectorTransform.from_tensors(record, 32, {})
    with pytest.raises(IntegrityError, match=r"its record says 7 bytes a vector, but .* take 256"):
        VectorTransform.from_tensors(record.model_copy(update={"bytes_per_vector": 7}), 64, {})


def test_wrong_shapes_are_refused_with_both_shapes() -> None:
    transform = fit_vector_transform(clustered(42, 50), Dims(n=20), Vectors(code="int8"))
    z = transform.project(clustered(42, 50))
    stored = transform.quantize(z)
    cases: list[tuple[type[GteoptError], str, Any]] = [
        (InputError, r"\[50, 20\], must be \[N, 64\]", lambda: transform.project(z)),
        (InputError, r"\[64\], must be \[N, 20\]", lambda: transform.quantize(np.zeros(64))),
        (InputError, r"float32 \[50, 20\]; int8 vectors", lambda: transform.dequantize(z)),
        (InputError, "k is 0", lambda: search_vectors(transform, z, stored, 0)),
    ]
    for kind, expected, act in cases:
        with pytest.raises(kind, match=expected):
            act()


def test_the_search_of_bits_is_the_stable_order_of_hamming_distances() -> None:
    """3000 codes of 12 bits are nearly all ties, and they fill more than one block."""
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((3000, 12)).astype(np.float32)
    transform = fit_vector_transform(vectors, None, Vectors(code="binary", rescore=1))
    codes = transform.quantize(vectors)
    queries = vectors[::100]
    indices, scores = search_vectors(transform, queries, codes, 50)
    for row, values, query in zip(indices, scores, transform.quantize(queries), strict=True):
        distances = np.unpackbits(query ^ codes, axis=1).sum(axis=1)
        expected = np.argsort(distances, kind="stable")[:50]
        np.testing.assert_array_equal(row, expected)
        np.testing.assert_allclose(values, 1 - 2 * distances[expected] / 12, atol=1e-6)
