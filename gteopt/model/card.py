"""Reads license and languages from the front matter of a model's card, its README.md.

Refuses to know: what else is in the folder.
"""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from gteopt.errors import shorten_value

_MAX_FRONT_MATTER = 1 << 16
"""Characters of a card that are searched."""


def stated_languages(folder: Path) -> tuple[str, ...]:
    """Languages that a model's card states, as ISO 639 codes; empty if it states none.

    "multilingual" does not count as a language: the result is empty then.
    """
    stated = _front_matter(folder).get("language")
    listed = [stated] if isinstance(stated, str) else stated
    if not isinstance(listed, list) or not all(isinstance(code, str) for code in listed):
        return ()
    codes = tuple(code.lower() for code in listed)
    return codes if all(re.fullmatch(r"[a-z]{2,3}", code) for code in codes) else ()


def stated_license(folder: Path) -> str | None:
    """The license that a model's card states; None if it states none."""
    stated = _front_matter(folder).get("license")
    return shorten_value(stated) if isinstance(stated, str) and stated else None


def _front_matter(folder: Path) -> dict[str, object]:
    """The YAML at the start of a model's card; empty if there is none or it is broken."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    with readme.open(encoding="utf-8", errors="replace") as handle:
        match = re.match(r"---\n(.*?)\n---", handle.read(_MAX_FRONT_MATTER), re.S)
    if match is None:
        return {}
    try:
        front = yaml.safe_load(match.group(1))
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return front if isinstance(front, dict) else {}
