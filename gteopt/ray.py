"""`gteopt.ray.Embedder`: embed texts inside a user's own Ray Data pipeline."""

from __future__ import annotations

from gteopt.corpus.ray_data import Embedder

__all__ = ["Embedder"]
