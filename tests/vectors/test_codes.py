"""Codes against faiss, published numbers and their own formulas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from gteopt.config.recipe import Dims, VectorCode, Vectors
from gteopt.errors import InputError, UnsupportedError
from gteopt.vectors.codebooks import allot_bits, fit_codebook, normal_distortion, normal_levels
from gteopt.vectors.codes import BinaryCode, RaBitQ, ScalarCode
from gteopt.vectors.faiss_index import to_faiss
from gteopt.vectors.fit import fit_vector_transform
from gteopt.vectors.search import search_vectors
from gteopt.vectors.transform import VectorTransform
from tests.support.vectors import like_texts


def fitted(code: VectorCode, dims: Dims | None = None) -> VectorTransform:
    vectors = Vectors(code=code, bytes=16) if code == "pq" else Vectors(code=code, rescore=1)
    return fit_vector_transform(like_texts(1, 400), dims, vectors)


@pytest.mark.parametrize("dims", [6, 7])
def test_int4_puts_the_first_dimension_into_the_lower_half_of_a_byte(dims: int) -> None:
    code = ScalarCode(4, np.zeros(dims, np.float32), np.full(dims, 15, np.float32))
    rows = np.array([[3, 10, 0, 15, 99, -7, 5][:dims]], np.float32)
    codes = code.encode(rows)
    assert codes.tolist()[0][:3] == [3 + 16 * 10, 0 + 16 * 15, 15 + 16 * 0]
    assert code.decode(codes).tolist() == [[3, 10, 0, 15, 15, 0, 5][:dims]]


def test_centred_signs_are_those_of_the_distance_from_the_mean() -> None:
    x = like_texts(1, 400, mean_cosine=0.83)
    transform = fit_vector_transform(x, None, Vectors(code="binary", centred=True))
    mean = x.astype("f8").mean(axis=0)
    bits = np.unpackbits(transform.quantize(x), axis=1)
    clear = np.abs(x - mean) > 1e-6
    np.testing.assert_array_equal(bits[clear], (x > mean)[clear])
    assert isinstance(transform.coding, BinaryCode)
    decoded = transform.dequantize(transform.quantize(x))
    spread = np.abs(x - mean).mean(axis=0)
    np.testing.assert_allclose(np.abs(decoded - mean), np.tile(spread, (400, 1)), atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rabitq_estimates_dot_products_without_bias_over_rotations(bits: int) -> None:
    """Gao and Long 2024, theorem 3.2: the mean over rotations is the dot product itself."""
    z, query, centre = like_texts(2, 3)[0], like_texts(3, 1)[0], like_texts(4, 1)[0] * 0.3
    rng = np.random.default_rng(0)
    estimates = []
    for _ in range(600):
        turn = np.linalg.qr(rng.normal(size=(64, 64)))[0].astype(np.float32)
        code = RaBitQ(bits, centre @ turn)
        decoded = code.decode(code.encode((z @ turn)[None]))[0]
        estimates.append(float(decoded @ (query @ turn)))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(float(z @ query), abs=4 * error)
    assert error > 0


def test_each_bit_of_rabitq_halves_the_error_at_least_nearly() -> None:
    x = like_texts(5, 300)
    errors = []
    for bits in range(1, 9):
        transform = fit_vector_transform(x, None, Vectors(code="rabitq", bits=bits))
        z = transform.project(x)
        codes = transform.quantize(z)
        assert codes.shape == (300, 64 * bits // 8 + 2)
        errors.append(float(np.linalg.norm(transform.dequantize(codes) - z)))
    ratios = np.array(errors[1:]) / np.array(errors[:-1])
    assert (ratios < 0.62).all()


def test_rabitq_decodes_what_equals_the_centre_to_the_centre() -> None:
    centre = like_texts(6, 1)[0]
    for bits in (1, 3):
        code = RaBitQ(bits, centre)
        np.testing.assert_array_equal(code.decode(code.encode(centre[None]))[0], centre)


def test_levels_have_the_distortions_that_were_published() -> None:
    """Max 1960, table I: 2, 4, 8 and 16 levels."""
    published = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}
    for bits, error in published.items():
        assert normal_distortion(bits) == pytest.approx(error, rel=1e-3)
    # Panter and Dite's limit for many levels: sqrt(3) pi / 2 / L^2.
    assert normal_distortion(8) == pytest.approx(np.sqrt(3) * np.pi / 2 / 256**2, rel=0.02)
    assert normal_levels(1).tolist() == pytest.approx([-0.7979, 0.7979], abs=1e-4)


def test_bits_go_where_variance_is_and_none_is_left() -> None:
    variance = np.geomspace(1, 1e-3, 40)
    bits = allot_bits(variance, 96)
    assert bits.sum() == 96
    assert (np.diff(bits) <= 0).all()
    assert allot_bits(np.ones(16), 32).tolist() == [2] * 16
    assert allot_bits(np.array([1.0, 0.0]), 32).tolist() == [
        8,
        0,
    ]  # a constant dimension needs none


@pytest.mark.parametrize("n_bytes", [1, 5, 12, 24, 48, 64])
def test_a_codebook_uses_each_byte_and_no_dimension_twice(n_bytes: int) -> None:
    x = like_texts(7, 300)
    book = fit_codebook(x, n_bytes)
    assert book.points.shape[:2] == (n_bytes, 256)
    assert len(np.unique(book.places)) == len(book.dimensions)
    used = book.places // book.points.shape[2]
    assert set(used) == set(range(n_bytes))


def test_few_texts_fit_a_codebook_that_unseen_ones_are_closer_to_than_to_k_means() -> None:
    x, unseen = like_texts(8, 300), like_texts(9, 500)
    ours = fit_vector_transform(x, None, Vectors(code="pq", bytes=16))
    z = ours.project(unseen)
    theirs = faiss.ProductQuantizer(64, 16, 8)
    theirs.cp.min_points_per_centroid = 1
    theirs.train(x)
    decoded = theirs.decode(theirs.compute_codes(unseen))  # type: ignore[call-arg, func-returns-value]
    error = np.linalg.norm(unseen - np.asarray(decoded))
    # The part that a PCA leaves out is an error, too.
    lost = np.square(unseen).sum() - np.square(z).sum()
    coded = np.square(ours.dequantize(ours.quantize(z)) - z).sum()
    assert np.sqrt(lost + coded) < 0.9 * error


def test_too_few_dimensions_that_vary_are_said() -> None:
    x = np.tile(like_texts(10, 1), (100, 1))
    x[:, :5] += np.random.default_rng(0).normal(size=(100, 5)).astype("f4")
    with pytest.raises(InputError, match="needs at least 9 dimensions that vary, found 5"):
        fit_codebook(x - x[:1], 9)


CASES: list[tuple[VectorCode, Dims | None]] = [
    ("float32", Dims(n=24, method="pca")),
    ("int8", Dims(n=24)),
    ("int8", None),
    ("int4", Dims(n=25, method="pca")),
    ("binary", Dims(n=40, method="pca")),
    ("binary", Dims(n=40)),
    ("pq", None),
]


@pytest.mark.parametrize(("code", "dims"), CASES)
def test_a_faiss_index_codes_as_we_do_and_finds_what_we_find(
    code: VectorCode, dims: Dims | None
) -> None:
    transform = fitted(code, dims)
    documents, queries = like_texts(11, 500), like_texts(12, 40)
    codes = transform.quantize(transform.project(documents))
    index = to_faiss(transform, codes, of_base=True)
    assert index.ntotal == 500
    scores, rows = index.search(queries, 5)
    asked = transform.project(queries)
    our_rows, our_scores = search_vectors(transform, asked, codes, 5)
    of_rows, _ = to_faiss(transform, codes).search(asked, 5)
    np.testing.assert_allclose(of_rows, scores, atol=1e-5)
    if code == "binary":  # whole numbers with many ties
        np.testing.assert_allclose(1 - 2 * scores / transform.dims, our_scores, atol=1e-6)
    elif code == "int8":  # our first stage compares codes with codes
        exact = asked @ transform.dequantize(codes).T
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :5], atol=1e-5)
    else:
        np.testing.assert_allclose(scores, our_scores, atol=1e-5)
        assert (rows == our_rows).mean() > 0.98
    added = to_faiss(transform)
    added.add(transform.project(documents))
    again, _ = added.search(asked, 5)
    np.testing.assert_allclose(again, scores, atol=0 if code == "binary" else 2e-3)


def test_centred_signs_are_those_of_a_faiss_index() -> None:
    x = like_texts(15, 300, mean_cosine=0.83)
    transform = fit_vector_transform(x, None, Vectors(code="binary", centred=True, rescore=1))
    codes = transform.quantize(x)
    distances, _ = to_faiss(transform, codes).search(x[:20], 5)
    _, ours = search_vectors(transform, x[:20], codes, 5)
    np.testing.assert_allclose(1 - 2 * distances / 64, ours, atol=1e-6)


def test_an_index_opens_where_gteopt_is_not_imported(tmp_path: Path) -> None:
    transform = fitted("pq")
    documents, queries = like_texts(13, 300), like_texts(14, 3)
    codes = transform.quantize(transform.project(documents))
    faiss.write_index(to_faiss(transform, codes), str(tmp_path / "x.faiss"))
    np.save(tmp_path / "queries.npy", transform.project(queries))
    script = (
        "import sys, faiss, numpy as np\n"
        f"index = faiss.read_index({str(tmp_path / 'x.faiss')!r})\n"
        f"print(index.search(np.load({str(tmp_path / 'queries.npy')!r}), 4)[1].tolist())\n"
        "assert 'gteopt' not in sys.modules"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    rows, _ = search_vectors(transform, transform.project(queries), codes, 4)
    assert ran.stdout.strip() == str(rows.tolist())


def test_a_code_without_a_counterpart_in_faiss_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(UnsupportedError, match=r"rabitq codes have no .*float32, int8, int4"):
        to_faiss(fitted("rabitq"))
