"""gteopt turns a text-embedding model into the cheapest variant that still ranks like it.

The public names: `gteopt.quantize` makes a variant, `gteopt.bench` and `gteopt.evaluate` measure
it, `gteopt.load` opens it, `gteopt.embed` embeds a corpus with it. Each name is imported on first
use, so that `import gteopt` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gteopt.errors import (
    GteoptError,
    InputError,
    IntegrityError,
    NumericsError,
    UnsupportedError,
)
from gteopt.version import __version__

if TYPE_CHECKING:
    from gteopt.build.quantize import quantize
    from gteopt.build.truncate import truncate
    from gteopt.commands.calls import bench, choose, evaluate
    from gteopt.commands.compare import compare
    from gteopt.commands.embed import embed
    from gteopt.commands.inspect import inspect
    from gteopt.commands.judges import Judges
    from gteopt.commands.optimize import Search, optimize
    from gteopt.commands.search import search
    from gteopt.config.limits import Limits
    from gteopt.config.recipe import Recipe
    from gteopt.encoder.encoder import Encoder
    from gteopt.encoder.loading import load
    from gteopt.model.artifact import verify

__all__ = [
    "Encoder",
    "GteoptError",
    "InputError",
    "IntegrityError",
    "Judges",
    "Limits",
    "NumericsError",
    "Recipe",
    "Search",
    "UnsupportedError",
    "__version__",
    "bench",
    "choose",
    "compare",
    "embed",
    "evaluate",
    "inspect",
    "load",
    "optimize",
    "quantize",
    "search",
    "truncate",
    "verify",
]

_MODULES = {
    "Encoder": "gteopt.encoder.encoder",
    "Judges": "gteopt.commands.judges",
    "Limits": "gteopt.config.limits",
    "Recipe": "gteopt.config.recipe",
    "Search": "gteopt.commands.optimize",
    "bench": "gteopt.commands.calls",
    "choose": "gteopt.commands.calls",
    "compare": "gteopt.commands.compare",
    "embed": "gteopt.commands.embed",
    "evaluate": "gteopt.commands.calls",
    "inspect": "gteopt.commands.inspect",
    "load": "gteopt.encoder.loading",
    "optimize": "gteopt.commands.optimize",
    "quantize": "gteopt.build.quantize",
    "search": "gteopt.commands.search",
    "truncate": "gteopt.build.truncate",
    "verify": "gteopt.model.artifact",
}
"""The module of each name that is imported on first use."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "ray":  # lets `import gteopt` alone reach `gteopt.ray.Embedder`
        return import_module("gteopt.ray")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'gteopt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
