"""Parse the options for a user's own data, and check that the data can be read.

Refuses to know: torch and the evaluation library. Wrong data is refused before their import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.config.plan import ColumnRole


def parse_name_list(text: str | None) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def parse_columns(text: str | None) -> dict[ColumnRole, str]:
    """Column names by role, from `--columns query=question,positive=answer`.

    Raises:
        InputError: not of this form, or an unknown role.
    """
    from typing import get_args

    from gteopt.config.plan import ColumnRole
    from gteopt.errors import suggest_names

    roles: dict[ColumnRole, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        role, equals, name = part.partition("=")
        role = role.strip()
        if not equals or not name.strip():
            raise InputError(f"--columns '{part}': write ROLE=NAME, as in query=question")
        known = get_args(ColumnRole)
        if role not in known:
            raise InputError(f"--columns: unknown role '{role}': {suggest_names(role, known)}")
        roles[role] = name.strip()  # type: ignore[index]
    return roles


def check_own_data(
    data: Path | None,
    texts: Path | None,
    suite: str | None,
    columns: dict[ColumnRole, str],
    hub_dir: Path | None,
) -> Path | None:
    """Refuse data that cannot be read, before large libraries are imported.

    Returns:
        The local file or folder of `--data`, also where `--data` names a data set.
    """
    from gteopt.evaluation.hub_tables import local_table
    from gteopt.evaluation.user_data import read_own_data, read_texts

    if texts is not None and (data is not None or suite is not None):
        raise InputError("--texts has no labels to score; leave out --data and --suite")
    if columns and data is None and texts is None:
        raise InputError("--columns needs --data or --texts, whose columns it names")
    if data is not None:
        data = local_table(data, hub_dir=hub_dir)
        read_own_data(data, columns)
    if texts is not None:
        read_texts(texts, columns)
    return data
