"""Random vectors with the statistics of a model's vectors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def unit(x: npt.NDArray[np.floating]) -> Floats:
    """Rows of length 1."""
    rows: Floats = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
    return rows


def like_texts(seed: int, n: int, dims: int = 64, mean_cosine: float = 0.0) -> Floats:
    """Unit rows around 40 shared centres, with falling variance in random directions.

    Args:
        seed: seed of the rows; centres and directions are always the same.
        n: number of rows.
        dims: dimensions of a row.
        mean_cosine: mean cosine of two rows; above 0, all rows lie in one cone.
    """
    shared = np.random.default_rng(99)
    scale = np.arange(1, dims + 1) ** -0.5
    turn = np.linalg.qr(shared.normal(size=(dims, dims)))[0]
    centres = shared.normal(size=(40, dims)) * scale
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(40, size=n)] + 0.7 * rng.normal(size=(n, dims)) * scale
    cone = np.zeros(dims)
    cone[-1] = np.sqrt(mean_cosine / (1 - mean_cosine))
    return unit((unit(rows) + cone) @ turn)
