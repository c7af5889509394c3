"""Files that others wrote: read with limits, found inside their folder, never trusted.

Hides: what a broken file or another library may raise. Refuses to know: what the files mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from gteopt.errors import (
    GteoptError,
    InputError,
    IntegrityError,
    UnsupportedError,
    is_out_of_memory,
    join_problems,
    visible,
)

MOST_JSON_BYTES = 64 << 20
"""The largest index of a published model takes 20 MB."""
_LONGEST_PATH = 1024
_SHOWN = 200
"""Most characters of a foreign value that a message quotes."""


class ForeignFile(BaseModel):
    """A JSON object that another library wrote: known fields have a type, others are refused.

    Fields that are not known are let through only where they say nothing (null, false, empty).
    """

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)


_File = TypeVar("_File", bound=ForeignFile)


def shorten(value: object) -> str:
    """A value as a message quotes it: one line, no control characters, at most 200 characters."""
    text = visible(" ".join(str(value).split()))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]} ..."


def inside(folder: Path, name: object, *, of: str) -> Path:
    """The path of a file or folder that a file of `folder` names.

    Args:
        folder: the model folder.
        name: relative, with forward slashes; "" is the folder itself.
        of: the file that names it, for the error.

    Raises:
        IntegrityError: it is no relative path, or leads out of the folder, also by a link.
    """
    if not isinstance(name, str) or "\0" in name:
        raise IntegrityError(f"{folder}/{of} names a path that is no text: {shorten(name)!r}")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        raise IntegrityError(
            f"{folder}/{of} names the path {shorten(name)!r}, which leads out of the folder"
        )
    if len(name) > _LONGEST_PATH or any(
        len(part.encode(errors="replace")) > 255 for part in pure.parts
    ):
        raise IntegrityError(
            f"{folder}/{of} names the path {shorten(name)!r}, which is longer than a path can be"
        )
    path = folder / pure
    check_link(folder, path)
    return path


def check_link(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of a model folder; those of the Hub's own cache are followed.

    Raises:
        IntegrityError: where it leads.
    """
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # too long a name, or a circle of links
        raise IntegrityError(f"{shorten(path)} cannot be followed ({error})") from error
    if target.is_relative_to(root):
        return
    # The Hub's cache holds snapshots/<commit>/<file> as links to blobs/<hash>.
    for parent in root.parents:
        if parent.name == "snapshots" and target.is_relative_to(parent.parent / "blobs"):
            return
    raise IntegrityError(f"{path} is a link to {target}, outside of the model folder")


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file; {} where it is optional and absent.

    Raises:
        InputError: there is no such file.
        IntegrityError: too large, or no JSON object.
    """
    if not path.is_file():
        if optional:
            return {}
        raise InputError(
            f"{path.parent} is not a model folder: it has no {path.name}; give a folder that "
            f"transformers or sentence-transformers saved, or an artifact"
        )
    content = read_any_json(path)
    if not isinstance(content, dict):
        raise IntegrityError(f"{path} should hold a JSON object, found {type(content).__name__}")
    return content


def read_any_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        IntegrityError: too large, or no JSON.
    """
    try:
        if (n_bytes := path.stat().st_size) > MOST_JSON_BYTES:
            raise IntegrityError(
                f"{path} has {n_bytes:,} bytes; JSON files of a model have at most "
                f"{MOST_JSON_BYTES:,}"
            )
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise IntegrityError(f"{path} is nested too deeply") from error
    except (ValueError, OSError) as error:
        raise IntegrityError(f"{path} is not valid JSON ({shorten(error)})") from error


def parse(kind: type[_File], content: Mapping[str, Any], path: Path) -> _File:
    """Foreign JSON as a typed object.

    Raises:
        InputError: a field of another type than the library writes.
        UnsupportedError: an option that gteopt does not know and that says something.
    """
    try:
        read = kind.model_validate(dict(content))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}, found {shorten(each['input'])}"
            for each in error.errors(include_url=False)[:10]
        ]
        raise InputError(join_problems(f"{path} is wrong", problems)) from error
    unknown = [name for name, value in (read.model_extra or {}).items() if value]
    if unknown:
        raise UnsupportedError(
            f"{path} has options that gteopt does not know: "
            f"{', '.join(map(shorten, sorted(unknown)[:10]))}; a model that needs them would get "
            f"other vectors. Remove them if they do not matter"
        )
    return read


@contextmanager
def foreign_errors(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever another library raises into one line that names the folder.

    Args:
        folder: the model folder, or a file in it.
        what: what is being done, as "reading the tokenizer".

    Raises:
        IntegrityError: in place of any error of the library; ours and those of memory pass.
    """
    try:
        yield
    except GteoptError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
            raise
        raise IntegrityError(
            f"{folder}: {what} failed ({type(error).__name__}: {shorten(error)}); the files are "
            f"damaged or belong to another model"
        ) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # what Rust code raises on broken input
            raise
        raise IntegrityError(f"{folder}: {what} failed ({shorten(error)})") from error
