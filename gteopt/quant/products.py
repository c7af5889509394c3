"""Multiply, factorize and invert large float32 matrices with little memory beside the result.

Hides: which library multiplies, and how triangular and symmetric matrices halve the work. Refuses
to know: what the matrices mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

STRIP = 1024
"""Rows or columns of a matrix [I, I] that are processed at a time, so that no second matrix is
needed."""


def block_spans(n: int, width: int) -> list[tuple[int, int]]:
    """Cut 0 to n into (start, end) pieces of at most `width`."""
    return [(start, min(start + width, n)) for start in range(0, n, width)]


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """The product a b^T of two matrices [M, K] and [N, K] of one dtype: [M, N].

    On a processor with AVX-512, oneDNN multiplies float32, because MKL uses only half of the vector
    width on AMD's processors.
    """
    if a.device.type != "cpu" or a.dtype != torch.float32 or not torch.cpu._is_avx512_supported():
        return a @ b.T
    if not a.numel() or not b.numel():
        return a.new_zeros(len(a), len(b))
    result: Tensor = torch.ops.mkldnn._linear_pointwise(
        a.contiguous(), _readable(b), None, "none", [], ""
    )
    return result


def _readable(b: Tensor) -> Tensor:
    """The matrix with strides that oneDNN reads fast; other strides are a thousand times slower."""
    return b if b.is_contiguous() or b.T.is_contiguous() else b.contiguous()


def _product_rows(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a b^T at a time, because a result that fits the cache is cheap to add."""
    b = _readable(b)
    for start, end in block_spans(len(a), STRIP if a.device.type == "cpu" else max(1, len(a))):
        yield slice(start, end), matrix_product(a[start:end], b)


def add_product_(target: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float) -> None:
    """Set target = beta * target + alpha * a b^T in place.

    Args:
        target: [M, N]; may be a view with strides.
        a: [M, K], of the target's dtype. On a GPU it may be of 16 bits for a float32 target.
        b: [N, K], of the dtype of `a`.
        beta: factor of the target.
        alpha: factor of the product.
    """
    if a.dtype != target.dtype:
        target.mul_(beta).add_(torch.mm(a, b.T, out_dtype=target.dtype), alpha=alpha)
        return
    if a.device.type != "cpu" or a.dtype != torch.float32:
        target.addmm_(a, b.T, beta=beta, alpha=alpha)
        return
    for at, rows in _product_rows(a, b):
        if beta != 1:
            target[at].mul_(beta)
        target[at].add_(rows, alpha=alpha)


def times_inverse(values: Tensor, upper: Tensor, order: Tensor) -> Tensor:
    """X (U^T U) for an upper triangular U, with half of the dense work: float32 [O, I].

    Args:
        values: X, float32 [O, I]; X and the result have their features in the original order.
        upper: U, float32 [I, I].
        order: [I], the feature of X that each row of U belongs to.
    """
    ordered = values.index_select(1, order)
    left, both = torch.empty_like(ordered), torch.empty_like(ordered)
    for start, end in block_spans(len(upper), STRIP):
        for at, rows in _product_rows(ordered[:, start:], upper[start:end, start:]):
            left[at, start:end] = rows
    for start, end in block_spans(len(upper), STRIP):
        for at, rows in _product_rows(left[:, :end], upper[:end, start:end].contiguous().T):
            both[at, start:end] = rows
    return both.index_select(1, inverse_order(order))


def inverse_order(order: Tensor) -> Tensor:
    """The position of each feature in an order [I]: int64 [I]."""
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order), device=order.device)
    return positions


def quadratic_forms(rows: Tensor, symmetric: Tensor) -> Tensor:
    """The diagonal of E H E^T for rows E [n, I] and a symmetric H [I, I]: float32 [n].

    Only the diagonal blocks of H and the blocks right of them are read, which halves the products.
    """
    sums = torch.zeros(len(rows), device=rows.device)
    for start, end in block_spans(len(symmetric), STRIP // 2):
        strip = symmetric[start:end, start:].clone()
        strip[:, end - start :] *= 2
        for at, part in _product_rows(rows[:, start:], strip):
            sums[at] += part.mul_(rows[at, start:end]).sum(1)
    return sums


def cholesky_(matrix: Tensor) -> bool:
    """Replace a symmetric matrix [n, n] by its lower Cholesky factor; False if it has none.

    The algorithm is blocked and right-looking (Golub and Van Loan, Matrix Computations, 4.2.9),
    because a library routine would need a second matrix. The upper triangle is not read, and is set
    to zero.
    """
    n = len(matrix)
    # float64 uses narrow panels, because wide panels leave more work to the slower solve.
    for start, end in block_spans(n, STRIP if matrix.dtype == torch.float32 else STRIP // 4):
        corner, info = torch.linalg.cholesky_ex(matrix[start:end, start:end])
        if info.item():
            return False
        matrix[start:end, start:end] = corner
        panel = _solve_lower(corner, matrix[end:, start:end])
        matrix[end:, start:end] = panel
        for first, last in block_spans(n - end, STRIP):
            trailing = matrix[end + first :, end + first : end + last]
            add_product_(trailing, panel[first:], panel[first:last], alpha=-1)
    matrix.tril_()
    return True


def _solve_lower(corner: Tensor, below: Tensor) -> Tensor:
    """B C^-T for a lower triangular C [w, w] and B [m, w]."""
    if corner.dtype == torch.float32 and corner.device.type == "cpu":
        identity = torch.eye(len(corner), dtype=corner.dtype)
        return matrix_product(below, torch.linalg.solve_triangular(corner, identity, upper=False))
    solved: Tensor = torch.linalg.solve_triangular(corner, below.T, upper=False).T
    return solved


def invert_lower_(lower: Tensor) -> None:
    """Replace a lower triangular matrix float32 [n, n] by its inverse, the last columns first.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]], and C^-1 was computed before.
    """
    n = len(lower)
    width = STRIP // 2
    identity = torch.eye(min(n, width), dtype=lower.dtype, device=lower.device)
    for start, end in reversed(block_spans(n, width)):
        unit = identity[: end - start, : end - start]
        corner = torch.linalg.solve_triangular(lower[start:end, start:end], unit, upper=False)
        below = matrix_product(lower[end:, start:end], corner.T)
        for first, last in block_spans(n - end, STRIP):
            rows = lower[end + first : end + last, end : end + last]
            lower[end + first : end + last, start:end] = -matrix_product(rows, below[:last].T)
        lower[start:end, start:end] = corner


def row_spans(weight: Tensor, n_weights: int) -> Sequence[tuple[int, int]]:
    """Cut the rows of a weight [O, I] into (start, end) pieces of about `n_weights` weights."""
    return block_spans(len(weight), max(1, n_weights // weight.shape[1]))
