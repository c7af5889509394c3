"""Write records to files atomically, and read them with errors that name the file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from gteopt.errors import IntegrityError
from gteopt.frozen import Frozen

Record = TypeVar("Record", bound=Frozen)


def record_to_json(record: Frozen) -> str:
    """The record as indented JSON that ends in a newline."""
    return record.model_dump_json(by_alias=True, indent=2) + "\n"


def write_record(path: Path, record: Frozen) -> None:
    """Write a record so that a reader sees either the old file or the complete new one."""
    write_atomically(path, record_to_json(record).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file in the same folder, fsync it, and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as handle:
        try:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
            os.chmod(handle.name, 0o644)
            os.replace(handle.name, path)
        except BaseException:
            Path(handle.name).unlink(missing_ok=True)
            raise


def read_record(path: Path, kind: type[Record]) -> Record:
    """Read and validate a record.

    Raises:
        IntegrityError: missing, not JSON, of another schema, or not valid.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        first: dict[str, Any] = dict(error.errors()[0])
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise IntegrityError(
            f"{path}: is not a valid {kind.__name__} ({where}: {first['msg']}; "
            f"{error.error_count()} problem(s) in all); it was edited, cut short, or written by "
            f"another version of gteopt"
        ) from error
