"""For people with a Ray Data pipeline of their own: `gteopt.ray.Embedder`."""

from __future__ import annotations

from gteopt.corpus.ray_data import Embedder

__all__ = ["Embedder"]
