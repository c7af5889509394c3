"""gteopt turns a text-embedding model into the cheapest variant that still ranks like it.

The door for Python: `load`, `quantize`, `truncate`. Everything heavy is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gteopt.build import quantize, truncate
    from gteopt.encoder import Encoder
    from gteopt.loading import load

__version__ = "0.1.0"
__all__ = ["Encoder", "load", "quantize", "truncate"]

_HOME = {
    "load": "gteopt.loading",
    "Encoder": "gteopt.encoder",
    "quantize": "gteopt.build",
    "truncate": "gteopt.build",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gteopt' has no attribute '{name}'")
