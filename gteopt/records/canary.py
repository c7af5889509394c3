"""A text and its vector, stored in an artifact to check after loading that encoding is right.

Hides: how the vector is written. Refuses to know: what computes the vector.
"""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from gteopt.frozen import Frozen

CANARY = "The quick brown fox jumps over the lazy dog; 12 wizards box 34 quick jugglers."
LEAST_COSINE = 0.98
"""Least cosine of a newly computed vector with the stored one.

Another kernel or dtype with the same weights stays above it. Another model or tokenizer falls below
it.
"""
Floats = NDArray[np.float32]


class CanaryRecord(Frozen):
    """A text, encoded as a document by the build with the finished weights.

    Attributes:
        text: the encoded text.
        vector: base64 of float16 [dims], little endian.
    """

    text: str
    vector: str

    @field_validator("vector")
    @classmethod
    def _holds_numbers(cls, vector: str) -> str:
        try:
            numbers = np.frombuffer(base64.b64decode(vector, validate=True), "<f2")
        except ValueError as error:
            raise ValueError(f"the canary's vector is not base64 of float16: {error}") from error
        if not numbers.size or not np.isfinite(numbers).all():
            raise ValueError("the canary's vector is empty or holds numbers that are not finite")
        return vector

    @staticmethod
    def of(text: str, vector: Floats) -> CanaryRecord:
        """The record of a text and its vector [dims]."""
        return CanaryRecord(
            text=text, vector=base64.b64encode(vector.astype("<f2").tobytes()).decode()
        )

    def values(self) -> Floats:
        """The vector [dims]."""
        return np.frombuffer(base64.b64decode(self.vector), "<f2").astype(np.float32)

    def cosine(self, vector: Floats) -> float:
        """Cosine of a vector with the stored one; 0 where shapes differ or a vector is zero."""
        stored = self.values()
        norms = float(np.linalg.norm(stored) * np.linalg.norm(vector))
        return float(stored @ vector) / norms if stored.shape == vector.shape and norms > 0 else 0.0
