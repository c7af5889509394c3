"""gteopt turns a text-embedding model into the cheapest variant that still ranks like it.

The door for Python: `load`, `quantize`, `truncate`. Everything heavy is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gteopt.version import __version__

if TYPE_CHECKING:
    from gteopt.build.quantize import quantize
    from gteopt.build.truncate import truncate
    from gteopt.encoder.encoder import Encoder
    from gteopt.encoder.loading import load

__all__ = ["Encoder", "__version__", "load", "quantize", "truncate"]

_HOME = {
    "load": "gteopt.encoder.loading",
    "Encoder": "gteopt.encoder.encoder",
    "quantize": "gteopt.build.quantize",
    "truncate": "gteopt.build.truncate",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gteopt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
