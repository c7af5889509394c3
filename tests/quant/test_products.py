"""Products in strips and halves against dense ones in float64."""

from __future__ import annotations

import pytest
import torch

from gteopt.quant.products import (
    add_product_,
    cholesky_,
    invert_lower_,
    matrix_product,
    quadratic_forms,
    times_inverse,
)

N = 1100
"""More than a strip of 1,024, so that strips meet."""


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(computed: torch.Tensor, exact: torch.Tensor) -> float:
    return float((computed.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_a_product_is_that_of_float64_in_every_layout_of_its_factors(layout: str) -> None:
    a, b = seeded(1500, 70), seeded(90, 140, seed=1)[:, ::2]
    b = {"rows": b.contiguous(), "columns": b.T.contiguous().T, "strided": b}[layout]
    exact = a.double() @ b.double().T
    assert error(matrix_product(a, b), exact) < 1e-6
    target = seeded(1500, 180, seed=2)[:, ::2]
    wanted = 0.5 * target.double() - 2 * exact
    add_product_(target, a, b, beta=0.5, alpha=-2)
    assert error(target, wanted) < 1e-6
    assert matrix_product(a[:0], b).shape == (0, 90)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_16_bit_floats_are_added_in_float32(dtype: torch.dtype) -> None:
    """A CPU has no such product; without a GPU, only its dtypes and shapes are checked."""
    device = "cuda" if torch.cuda.is_available() else "meta"
    a, b = seeded(150, 700).to(dtype), seeded(90, 700, seed=1).to(dtype)
    target = seeded(150, 180, seed=2)[:, ::2]
    exact = 0.5 * target.double() - 2 * (a.double() @ b.double().T)
    summed = target.to(device)
    add_product_(summed, a.to(device), b.to(device), beta=0.5, alpha=-2)
    assert (summed.shape, summed.dtype) == (exact.shape, torch.float32)
    if device == "cuda":
        assert error(summed.cpu(), exact) < 1e-6


def test_half_of_the_work_gives_the_whole_products_of_triangles_and_symmetric_matrices() -> None:
    upper, order = seeded(N, N).triu(), torch.randperm(N, generator=torch.Generator())
    values = seeded(30, N, seed=1)
    inverse = torch.empty(N, N, dtype=torch.float64)
    inverse[order[:, None], order] = upper.double().T @ upper.double()
    assert error(times_inverse(values, upper, order), values.double() @ inverse) < 1e-6
    x = seeded(300, N, seed=2)
    second_moment = x.T @ x
    exact = torch.einsum("ni,ij,nj->n", values.double(), second_moment.double(), values.double())
    assert error(quadratic_forms(values, second_moment), exact) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_factor_in_place_is_the_librarys_and_its_inverse_inverts_it(dtype: torch.dtype) -> None:
    x = seeded(2 * N, N).to(dtype)
    matrix = x.T @ x / N
    exact = torch.linalg.cholesky(matrix.double())
    lower = matrix.clone()
    assert cholesky_(lower)
    assert error(lower, exact) < (1e-5 if dtype == torch.float32 else 1e-13)
    inverse = lower.float()
    invert_lower_(inverse)
    assert torch.equal(inverse, inverse.tril())
    assert error(inverse.double() @ exact, torch.eye(N, dtype=torch.float64)) < 1e-4
    matrix[3, 3] = -1
    assert not cholesky_(matrix)
