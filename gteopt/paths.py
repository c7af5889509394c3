"""Paths of the files that ship with gteopt, in a checkout and in a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from gteopt.errors import IntegrityError
from gteopt.frozen import Frozen

_Shipped = TypeVar("_Shipped", bound=Frozen)
_PACKAGE = Path(__file__).parent
ASSETS = _PACKAGE / "assets"
"""Data files of the package: the embedded model, published configs, texts, the report's style."""


def shipped_dir(kind: str) -> Path:
    """Folder of shipped YAML and data, such as `recipes` or `eval/suites`.

    In a wheel these folders are inside the package, in a checkout beside it.
    """
    inside_wheel = _PACKAGE / "shipped" / kind
    return inside_wheel if inside_wheel.is_dir() else _PACKAGE.parent / kind


def read_shipped_json(path: Path, model: type[_Shipped]) -> _Shipped:
    """Read a JSON file that ships with gteopt.

    Raises:
        IntegrityError: the installation is damaged.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read ({error}); install gteopt again") from error
