"""Texts to vectors: an `Encoder`, how it is loaded, and what computes its forward pass."""

from gteopt.encoder.encoder import Encoder

__all__ = ["Encoder"]
