"""`vectors.bytes`: dimensions and code chosen together by neighbours of held-out vectors."""

from __future__ import annotations

import numpy as np
import pytest

from gteopt.config.recipe import Recipe, Vectors
from gteopt.errors import InputError, NumericsError
from gteopt.vectors.fit import fit_vector_transform
from gteopt.vectors.search import search_vectors
from gteopt.vectors.transform import Floats, VectorTransform, identity_transform
from tests.support.vectors import like_texts


def neighbours_kept(transform: VectorTransform, queries: Floats, documents: Floats) -> float:
    """Share of the 10 nearest in float32 that are among the 10 nearest by codes."""
    codes = transform.quantize(transform.project(documents))
    rows, _ = search_vectors(transform, transform.project(queries), codes, 10)
    wanted, _ = search_vectors(identity_transform(documents.shape[1]), queries, documents, 10)
    pairs = zip(rows, wanted, strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in pairs]))


@pytest.mark.parametrize("mean_cosine", [0.0, 0.83])
def test_what_is_chosen_for_bytes_is_best_on_texts_that_nobody_saw(mean_cosine: float) -> None:
    """Also in a narrow cone, where signs that are not centred hold little information."""
    x = like_texts(1, 600, mean_cosine=mean_cosine)
    queries, documents = (like_texts(s, n, mean_cosine=mean_cosine) for s, n in ((2, 60), (3, 900)))
    transform = fit_vector_transform(x, None, Vectors(bytes=8))
    codes = transform.quantize(transform.project(documents))
    assert codes.nbytes == 8 * len(documents)
    chosen = neighbours_kept(transform, queries, documents)
    for plain in (Vectors(code="binary"), Vectors(code="binary", centred=True)):
        assert (
            chosen
            > neighbours_kept(fit_vector_transform(x, None, plain), queries, documents) + 0.05
        )
    kept = [trial.neighbours_kept for trial in transform.trials]
    assert kept == sorted(kept, reverse=True)
    assert max(trial.bytes_per_vector for trial in transform.trials) <= 8
    assert {"pq", "int8", "int4", "binary", "rabitq"} <= {t.code for t in transform.trials}
    best = transform.trials[0]
    assert (best.code, best.dims, best.similarity) == (
        transform.code,
        transform.dims,
        transform.similarity,
    )


def test_centring_is_what_signs_need_in_a_narrow_cone() -> None:
    x, documents = like_texts(1, 600, mean_cosine=0.83), like_texts(3, 900, mean_cosine=0.83)
    queries = like_texts(2, 60, mean_cosine=0.83)
    plain, centred = (
        neighbours_kept(
            fit_vector_transform(x, None, Vectors(code="binary", centred=c)), queries, documents
        )
        for c in (False, True)
    )
    assert centred > plain + 0.03


@pytest.mark.parametrize("n_bytes", [4, 16, 64])
def test_a_choice_by_bytes_comes_back_exactly_from_its_record_and_tensors(n_bytes: int) -> None:
    x = like_texts(4, 300)
    transform = fit_vector_transform(x, None, Vectors(bytes=n_bytes))
    again = VectorTransform.from_tensors(transform.record(), 64, transform.to_tensors())
    assert again.record() == transform.record()
    assert again.sha256() == transform.sha256()
    z = transform.project(x)
    np.testing.assert_array_equal(again.quantize(again.project(x)), transform.quantize(z))


def test_rows_of_a_dot_product_keep_the_length_that_shortening_leaves() -> None:
    transform = fit_vector_transform(like_texts(4, 300), None, Vectors(code="pq", bytes=8))
    assert transform.similarity == "dot"
    lengths = np.linalg.norm(transform.project(like_texts(5, 50)), axis=1)
    assert ((lengths > 0.3) & (lengths <= 1 + 1e-6)).all()
    assert lengths.std() > 0


def test_a_model_whose_vectors_keep_their_length_is_judged_by_dot_products() -> None:
    lengths = np.random.default_rng(0).uniform(0.5, 2, size=(400, 1)).astype(np.float32)
    x = like_texts(5, 400) * lengths
    transform = fit_vector_transform(x, None, Vectors(bytes=16), similarity="dot")
    assert {trial.similarity for trial in transform.trials} == {"dot"}
    codes = transform.quantize(transform.project(x))
    rows, _ = search_vectors(transform, transform.project(x[:50]), codes, 10)
    wanted = np.argsort(-(x[:50] @ x.T), axis=1, kind="stable")[:, :10]
    pairs = zip(rows, wanted, strict=True)
    assert np.mean([len(np.intersect1d(a, b)) / 10 for a, b in pairs]) > 0.6


def test_all_bytes_of_float32_are_the_vectors_themselves() -> None:
    transform = fit_vector_transform(like_texts(6, 10), None, Vectors(bytes=256))
    assert (transform.code, transform.dims) == ("float32", 64)


@pytest.mark.parametrize(
    ("n_texts", "n_bytes", "expected"),
    [
        (300, 100, "no code of vectors with 64 dimensions .* nearest: 64 and 256 bytes"),
        (300, 999, "nearest: 256 bytes"),
        (120, 8, "needs at least 200 calibration texts to choose by, found 120"),
    ],
)
def test_bytes_that_no_code_has_are_refused_with_the_nearest(
    n_texts: int, n_bytes: int, expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        fit_vector_transform(like_texts(7, n_texts), None, Vectors(bytes=n_bytes))


def test_texts_that_are_all_alike_and_nan_are_refused() -> None:
    alike = np.tile(like_texts(8, 1), (300, 1))
    with pytest.raises(InputError, match="300 calibration texts are too few or too much alike"):
        fit_vector_transform(alike, None, Vectors(code="pq", bytes=8))
    broken = like_texts(8, 300)
    broken[3, 3] = np.nan
    with pytest.raises(NumericsError, match="1 of 300 calibration vectors hold NaN"):
        fit_vector_transform(broken, None, Vectors(bytes=8))


def test_dimensions_that_are_constant_get_no_bits() -> None:
    x = like_texts(9, 300)
    x[:, 20:] = 0.1
    transform = fit_vector_transform(x, None, Vectors(code="pq", bytes=8))
    # One direction holds the common part of all rows, and 20 others vary.
    assert transform.dims <= 21


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        ({"code": "int8", "bytes": 48}, "bytes needs code: auto or pq"),
        ({"code": "pq"}, "code: pq needs bytes"),
        ({"code": "int8", "bits": 2}, "bits needs code: rabitq"),
        ({"code": "int4", "centred": True}, "centred needs code: binary"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    vectors: dict[str, object], expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        Vectors.model_validate(vectors)


def test_a_recipe_with_bytes_and_dims_is_refused() -> None:
    content = {"schema": "gteopt.recipe/1", "name": "x", "vectors": {"bytes": 48}}
    assert Recipe.model_validate(content).vectors.code == "auto"
    with pytest.raises(ValueError, match="leave dims out"):
        Recipe.model_validate({**content, "dims": {"n": 8}})
