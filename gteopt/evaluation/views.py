"""What is scored of one encoder: its own vectors, or other lengths and codes of the same encodings.

Refuses to know: how a transform was fitted, tasks, scores.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gteopt.encoder.description import Description
    from gteopt.vectors.transform import VectorTransform


@dataclass(frozen=True)
class View:
    """Vectors of an encoder as an index would store them.

    Attributes:
        name: what reports call it.
        sha256: identifies encoder and vectors together.
        vectors: from full dimension to what is stored.
    """

    name: str
    sha256: str
    vectors: VectorTransform


def own_view(encoder: Description, name: str | None = None) -> View:
    """The vectors that the base or artifact makes itself."""
    return View(name or encoder.name, encoder.sha256, encoder.vectors)


def view_of(encoder: Description, vectors: VectorTransform, name: str) -> View:
    """Other vectors of the same encodings."""
    if vectors.sha256() == encoder.vectors.sha256():
        return own_view(encoder, name)
    both = f"{encoder.checkpoint.weights_sha256}:{vectors.sha256()}"
    return View(name, hashlib.sha256(both.encode()).hexdigest(), vectors)
