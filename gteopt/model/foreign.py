"""Reads files that other libraries wrote, with limits and checked paths, without trust.

Hides: which errors a broken file or another library raises. Refuses to know: what the files mean.
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
    shorten_value,
)

MOST_JSON_BYTES = 64 << 20
"""Larger JSON files are refused; the largest index of a published model has 20 MB."""
_LONGEST_PATH = 1024


class ForeignFile(BaseModel):
    """A JSON object that another library wrote: known fields are typed, others are refused.

    `parse_foreign` accepts an unknown field only if it says nothing (null, false, empty).
    """

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)


_File = TypeVar("_File", bound=ForeignFile)


def path_inside_folder(folder: Path, name: object, *, of: str) -> Path:
    """The path of a file or folder that a file of `folder` names.

    Args:
        folder: the model folder.
        name: relative, with forward slashes; "" is the folder itself.
        of: the file that contains the name, for the error.

    Raises:
        IntegrityError: the path is not relative, or leads out of the folder (also by a link).
    """
    if not isinstance(name, str) or "\0" in name:
        raise IntegrityError(f"{folder}/{of} names a path that is no text: {shorten_value(name)!r}")
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        raise IntegrityError(
            f"{folder}/{of} names the path {shorten_value(name)!r}, which leads out of the folder"
        )
    if len(name) > _LONGEST_PATH or any(
        len(part.encode(errors="replace")) > 255 for part in pure.parts
    ):
        raise IntegrityError(
            f"{folder}/{of} names the path {shorten_value(name)!r}, which is longer than a "
            f"path can be"
        )
    path = folder / pure
    check_link(folder, path)
    return path


def check_link(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of a model folder; links of the Hub's cache are followed.

    Raises:
        IntegrityError: says where the link leads.
    """
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a name too long, or links in a circle
        raise IntegrityError(f"{shorten_value(path)} cannot be followed ({error})") from error
    if target.is_relative_to(root):
        return
    # The Hub's cache holds snapshots/<commit>/<file> as links to blobs/<hash>.
    for parent in root.parents:
        if parent.name == "snapshots" and target.is_relative_to(parent.parent / "blobs"):
            return
    raise IntegrityError(f"{path} is a link to {target}, outside of the model folder")


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file; {} if the file is optional and absent.

    Raises:
        InputError: there is no such file.
        IntegrityError: the file is too large, or holds no JSON object.
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
    """The content of a JSON file.

    Raises:
        IntegrityError: the file is too large, or is not JSON.
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
        raise IntegrityError(f"{path} is not valid JSON ({shorten_value(error)})") from error


def parse_foreign(kind: type[_File], content: Mapping[str, Any], path: Path) -> _File:
    """Foreign JSON as a typed object.

    Raises:
        InputError: a field has another type than the library writes.
        UnsupportedError: gteopt does not know an option that is set.
    """
    try:
        read = kind.model_validate(dict(content))
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}, "
            f"found {shorten_value(problem['input'])}"
            for problem in error.errors(include_url=False)[:10]
        ]
        raise InputError(join_problems(f"{path} is wrong", problems)) from error
    unknown = [name for name, value in (read.model_extra or {}).items() if value]
    if unknown:
        raise UnsupportedError(
            f"{path} has options that gteopt does not know: "
            f"{', '.join(map(shorten_value, sorted(unknown)[:10]))}; a model that needs them would "
            f"get other vectors. Remove them if they do not matter"
        )
    return read


@contextmanager
def foreign_errors(folder: Path, action: str) -> Iterator[None]:
    """Turn any error of another library into one line that names the folder.

    Args:
        folder: the model folder, or a file in it.
        action: what the block does, for example "reading the tokenizer".

    Raises:
        IntegrityError: instead of the library's error. gteopt's own errors and lack of memory pass.
    """
    try:
        yield
    except GteoptError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError | MemoryError) and is_out_of_memory(error):
            raise
        raise IntegrityError(
            f"{folder}: {action} failed ({type(error).__name__}: {shorten_value(error)}); the "
            f"files are damaged or belong to another model"
        ) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by Rust code on broken input
            raise
        raise IntegrityError(f"{folder}: {action} failed ({shorten_value(error)})") from error
