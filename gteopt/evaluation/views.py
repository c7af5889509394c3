"""Define views: the forms of one encoder's vectors that are scored, from the same encodings.

Refuses to know: how a transform was fitted, tasks, scores.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gteopt.encoder.description import EncoderDescription
    from gteopt.vectors.transform import VectorTransform


@dataclass(frozen=True)
class View:
    """Vectors of an encoder as an index would store them.

    Attributes:
        name: name of the view in reports.
        sha256: identifies the encoder and the transform together.
        vectors: the transform from full dimension to stored codes.
    """

    name: str
    sha256: str
    vectors: VectorTransform


def own_view(encoder: EncoderDescription, name: str | None = None) -> View:
    """The view with the transform of the base or artifact itself."""
    return View(name or encoder.name, encoder.sha256, encoder.vectors)


def view_of(encoder: EncoderDescription, vectors: VectorTransform, name: str) -> View:
    """The view of the same encodings with another transform."""
    if vectors.sha256() == encoder.vectors.sha256():
        return own_view(encoder, name)
    both = f"{encoder.checkpoint.weights_sha256}:{vectors.sha256()}"
    return View(name, hashlib.sha256(both.encode()).hexdigest(), vectors)
