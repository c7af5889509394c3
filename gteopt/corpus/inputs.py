"""Which files a corpus is made of, and what their bytes are as a stream.

Hides: globs, folders, BEIR's layout, data set folders, the Hub's layout on disk, compression.
Refuses to know: rows.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs

from gteopt.corpus.storage import (
    Entry,
    entry_of,
    is_remote,
    list_files,
    local_path,
    open_file_system,
    reaching,
)
from gteopt.errors import InputError
from gteopt.frozen import Frozen

Format = Literal["jsonl", "csv", "tsv", "parquet", "text", "arrow"]
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".arrow": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_BESIDE = frozenset({"dataset_info.json", "dataset_dict.json", "state.json", "dataset_infos.json"})
"""What `datasets` and the Hub put beside the data."""
_BUFFER_BYTES = 1 << 20
_GLOB = re.compile(r"[*?\[]")


class InputFile(Frozen):
    """A file of the corpus.

    Attributes:
        name: its path below what the user named; what outputs call it.
        n_bytes: its size when the job was planned.
        version: time of its last change, or its hash, then.
        format: what its rows are.
        compression: of the whole file; None without one.
    """

    name: str
    n_bytes: int
    version: str
    format: Format
    compression: str | None = None

    @property
    def identity(self) -> str:
        """Changes when the content does, and not when the corpus moves."""
        said = f"{self.name}\0{self.n_bytes}\0{self.version}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Files in their order, with what a layout says of their columns.

    Attributes:
        places: where each file of that name lies.
        text: template of the layout; None is a column `text`.
        id: column of the layout; None is FILE:ROW.
    """

    files: tuple[InputFile, ...]
    places: dict[str, str]
    text: str | None = None
    id: str | None = None


def find_corpus(
    inputs: Sequence[str], *, role: str = "document", hub_dir: Path | None = None
) -> Corpus:
    """The files that paths, folders, globs, URLs and data set names mean, in that order.

    Args:
        inputs: what the user named; files of a folder or a glob are sorted by name.
        role: which file of a BEIR folder is meant: corpus.jsonl, or queries.jsonl of queries.
        hub_dir: folder in the Hub's layout, where ORG/NAME and hf://datasets/ORG/NAME lie then.

    Raises:
        InputError: nothing is there, or nothing that can be read; all such inputs at once.
    """
    problems: list[str] = []
    found: list[tuple[InputFile, str]] = []
    text = own_id = None
    for said in inputs:
        try:
            more, is_beir = _files_of(_located(said, hub_dir), role)
        except InputError as error:
            problems.append(str(error))
            continue
        if is_beir:
            text, own_id = _beir_text(more[0]), "_id"
        found += more
    if problems:
        raise InputError("\n".join(problems))
    if not found:
        raise InputError(f"{', '.join(inputs)}: no files to embed")
    names = [file.name for file, _ in found]
    files = tuple(
        replaced(file, _plain(place)) if names.count(file.name) > 1 else file
        for file, place in found
    )
    places = {file.name: place for file, (_, place) in zip(files, found, strict=True)}
    if len(places) < len(files):
        twice = sorted(
            {file.name for file in files if [f.name for f in files].count(file.name) > 1}
        )
        raise InputError(f"named twice: {', '.join(twice)}; name every file once")
    return Corpus(files, places, text, own_id)


def _beir_text(found: tuple[InputFile, str]) -> str:
    """Documents begin with their title, where the collection has titles; queries have none."""
    with open_bytes(found[1]) as stream:
        return "{title} {text}" if b'"title"' in stream.readline() else "text"


def replaced(file: InputFile, name: str) -> InputFile:
    """The same file under another name."""
    return file.model_copy(update={"name": name})


def _plain(place: str) -> str:
    return place.partition("://")[2] or place.lstrip("/")


def _located(said: str, hub_dir: Path | None) -> str:
    """Where a data set of the Hub lies; every other name as it is."""
    if said.startswith("hf://") and hub_dir is not None:
        parts = said.removeprefix("hf://").removeprefix("datasets/")
        return str(hub_dir / parts)
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", said) is not None
    if is_remote(said) or not is_name or Path(said).exists():
        return said
    if hub_dir is not None and (hub_dir / said).is_dir():
        return str(hub_dir / said)
    if Path(said).parent.is_dir() or Path(said).suffix:
        return said  # a path, and nothing is there
    return f"hf://datasets/{said}" if hub_dir is None else str(hub_dir / said)


def _files_of(place: str, role: str) -> tuple[list[tuple[InputFile, str]], bool]:
    """Files with where they lie, and whether they are of a BEIR folder."""
    prefix = place.partition("://")[0] + "://" if is_remote(place) else ""
    with reaching(place):
        if _GLOB.search(place):
            fixed = _GLOB.split(place, maxsplit=1)[0].rpartition("/")[0]
            system, root = open_file_system(fixed or ".")
            _, pattern = open_file_system(place)
            entries = [e for e in list_files(system, root) if fnmatch.fnmatch(e.path, pattern)]
            if not entries:
                raise InputError(f"{place}: no file matches")
        else:
            system, root = open_file_system(place)
            info = system.get_file_info(root)
            if info.type == pafs.FileType.File:
                entry = entry_of(system, info)
                name = Path(entry.path).name
                return [(_described(entry, name), prefix + entry.path)], False
            entries = list_files(system, root)
            if not entries:
                where = "holds no files" if info.type != pafs.FileType.NotFound else "is not there"
                raise InputError(f"{place} {where}; give a file, a folder, a glob or ORG/NAME")
    under = len(root.rstrip("/")) + 1
    named = [(entry, entry.path[under:]) for entry in entries]
    tops = {name for _, name in named}
    beir = "corpus.jsonl" in tops and bool({"queries.jsonl"} & tops)
    if beir:
        wanted = "queries.jsonl" if role == "query" else "corpus.jsonl"
        named = [each for each in named if each[1] == wanted]
    data = [
        (_described(entry, name), prefix + entry.path)
        for entry, name in named
        if _format_of(name) is not None and not _is_beside(name)
    ]
    if not data:
        raise InputError(
            f"{place}: none of its {len(named)} files can be read; known are "
            f"{', '.join(sorted(_FORMATS))}, with {', '.join(_COMPRESSIONS)} or without"
        )
    return data, beir


def _is_beside(name: str) -> bool:
    parts = name.split("/")
    return parts[-1] in _BESIDE or any(part.startswith((".", "_")) for part in parts)


def _format_of(name: str) -> tuple[Format, str | None] | None:
    path = Path(name.lower())
    compression = _COMPRESSIONS.get(path.suffix)
    kind = _FORMATS.get(Path(path.stem).suffix if compression else path.suffix)
    if kind is None or (compression and kind in ("parquet", "arrow")):
        return None
    return kind, compression


def _described(entry: Entry, name: str) -> InputFile:
    kind = _format_of(name)
    if kind is None:
        raise InputError(
            f"{name}: what is in it cannot be told from its name; known are "
            f"{', '.join(sorted(_FORMATS))}, with {', '.join(_COMPRESSIONS)} or without"
        )
    return InputFile(
        name=name,
        n_bytes=entry.n_bytes,
        version=entry.version,
        format=kind[0],
        compression=kind[1],
    )


def open_bytes(place: str, compression: str | None = None, at: int = 0) -> io.BufferedReader:
    """The bytes of a file, decompressed, from the offset `at` of an uncompressed one on."""
    with reaching(place):
        if not is_remote(place):
            raw: Any = local_path(place).open("rb", buffering=0)
        else:
            system, path = open_file_system(place)
            raw = system.open_input_file(path)
    if compression is not None:
        source = pa.PythonFile(raw, mode="r") if not isinstance(raw, pa.NativeFile) else raw
        return io.BufferedReader(pa.CompressedInputStream(source, compression), _BUFFER_BYTES)
    raw.seek(at)
    return io.BufferedReader(raw, _BUFFER_BYTES)


def open_arrow(place: str) -> Any:
    """A file for pyarrow, to be read at any place; one of this machine is memory-mapped."""
    with reaching(place):
        if not is_remote(place):
            return pa.memory_map(str(local_path(place)))
        system, path = open_file_system(place)
        return system.open_input_file(path)


def check_unchanged(file: InputFile, place: str) -> None:
    """Make sure that a file is the one that was planned.

    Raises:
        InputError: it has another size or another time of change, or is gone.
    """
    with reaching(place):
        system, path = open_file_system(place)
        info = system.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise InputError(f"{place} is gone since the job was planned; put it back")
        now = entry_of(system, info)
    if (now.n_bytes, now.version) != (file.n_bytes, file.version):
        raise InputError(
            f"{place} has changed since the job was planned ({file.n_bytes:,} bytes then, "
            f"{now.n_bytes:,} now); restore it, or embed into a new folder"
        )
