"""Names that a user types: which exist, and what was probably meant.

Refuses to know: torch, the network, what a name stands for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gteopt.errors import InputError, suggest

if TYPE_CHECKING:
    from gteopt.config.yaml_files import ShippedKind


def check_model_name(name: str) -> None:
    """Refuse a name that is no folder and cannot be one on the Hub.

    Raises:
        InputError: says whether it reads like a folder or like a name.
    """
    if name == "nano" or Path(name).exists():
        return
    from gteopt.model.families import PUBLISHED

    if name in {published.rpartition("/")[2] for published in PUBLISHED}:
        return  # `bench --dummy-weights` takes the name alone
    reads_like_a_folder = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if reads_like_a_folder:
        raise InputError(f"there is no folder {name}; give an existing folder, nano or ORG/NAME")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None:
        raise InputError(
            f"there is no folder {name}, and a model on the Hub is called ORG/NAME; "
            f"{suggest(name, ['nano', *PUBLISHED])}"
        )


def names_of(kind: ShippedKind) -> Callable[[str], list[str]]:
    """What a shell may complete: the shipped files of one kind."""

    def complete(incomplete: str) -> list[str]:
        from gteopt.config.yaml_files import shipped_names

        return [name for name in shipped_names(kind) if name.startswith(incomplete)]

    return complete
