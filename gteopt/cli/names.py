"""Check names that a user types, and suggest known names.

Refuses to know: torch, the network, what a name stands for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gteopt.errors import InputError, suggest_names

if TYPE_CHECKING:
    from gteopt.config.yaml_files import ShippedKind


def check_model_name(name: str) -> None:
    """Refuse a name that is neither an existing folder nor a possible name on the Hub.

    Raises:
        InputError: the message depends on whether the name looks like a folder.
    """
    if name == "nano" or Path(name).exists():
        return
    from gteopt.model.families import PUBLISHED

    if name in {published.rpartition("/")[2] for published in PUBLISHED}:
        return  # `bench --dummy-weights` accepts the name without ORG/
    looks_like_a_folder = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_like_a_folder:
        raise InputError(f"there is no folder {name}; give an existing folder, nano or ORG/NAME")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise InputError(
            f"there is no folder {name}, and models on the Hub are named ORG/NAME; "
            f"{suggest_names(name, ['nano', *PUBLISHED])}"
        )


def complete_shipped_names(kind: ShippedKind) -> Callable[[str], list[str]]:
    """A shell completion for the shipped files of one kind."""

    def complete(incomplete: str) -> list[str]:
        from gteopt.config.yaml_files import list_shipped_names

        return [name for name in list_shipped_names(kind) if name.startswith(incomplete)]

    return complete
