"""Find the files of a corpus, and open them as streams of bytes.

Hides: globs, folders, BEIR's layout, data set folders, the Hub's layout on disk, compression.
Refuses to know: rows.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs

from gteopt.corpus.storage import (
    StorageEntry,
    is_remote,
    list_stored_files,
    local_path,
    make_storage_entry,
    open_file_system,
    translate_storage_errors,
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
"""Files that `datasets` and the Hub put beside the data; they hold no rows."""
_BUFFER_BYTES = 1 << 20
_GLOB = re.compile(r"[*?\[]")


class InputFile(Frozen):
    """A file of the corpus.

    Attributes:
        name: path below the folder that the user gave; outputs use this name.
        n_bytes: size when the job was planned.
        version: time of the last change, or hash, when the job was planned.
        format: how rows are stored.
        compression: compression of the whole file; None if it is not compressed.
    """

    name: str
    n_bytes: int
    version: str
    format: Format
    compression: str | None = None

    @property
    def identity(self) -> str:
        """A hash that changes when the file changes, but not when the corpus moves."""
        facts = f"{self.name}\0{self.n_bytes}\0{self.version}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Corpus:
    """Files in their order, with the columns that a known layout such as BEIR's has.

    Attributes:
        places: path or URL of each file, by its name.
        text: the layout's template for texts; None means a column `text`.
        id: the layout's column of ids; None means FILE:ROW.
    """

    files: tuple[InputFile, ...]
    places: dict[str, str]
    text: str | None = None
    id: str | None = None


def find_corpus(
    inputs: Sequence[str], *, role: str = "document", hub_dir: Path | None = None
) -> Corpus:
    """Find the files of paths, folders, globs, URLs and data set names, in the order given.

    Args:
        inputs: what the user named; files of a folder or a glob are sorted by name.
        role: which file of a BEIR folder to read: "query" for queries.jsonl, else corpus.jsonl.
        hub_dir: folder in the Hub's layout, from which ORG/NAME and hf://datasets/ORG/NAME are
            read.

    Raises:
        InputError: an input does not exist or has no readable file; lists all such inputs.
    """
    problems: list[str] = []
    located: list[tuple[InputFile, str]] = []
    text = id_column = None
    for name in inputs:
        try:
            of_input, is_beir = _files_of(_located(name, hub_dir), role)
        except InputError as error:
            problems.append(str(error))
            continue
        if is_beir:
            text, id_column = _beir_text(of_input[0]), "_id"
        located += of_input
    if problems:
        raise InputError("\n".join(problems))
    if not located:
        raise InputError(f"{', '.join(inputs)}: no files to embed")
    n_named = Counter(file.name for file, _ in located)
    files = tuple(
        rename_input(file, _plain(place)) if n_named[file.name] > 1 else file
        for file, place in located
    )
    places = {file.name: place for file, (_, place) in zip(files, located, strict=True)}
    if len(places) < len(files):
        n_named = Counter(file.name for file in files)
        twice = sorted(name for name, n in n_named.items() if n > 1)
        raise InputError(f"named twice: {', '.join(twice)}; name every file once")
    return Corpus(files, places, text, id_column)


def _beir_text(located: tuple[InputFile, str]) -> str:
    """The template for a BEIR file: a title comes before the text, if the file has titles."""
    with open_input_bytes(located[1]) as stream:
        return "{title} {text}" if b'"title"' in stream.readline() else "text"


def rename_input(file: InputFile, name: str) -> InputFile:
    """The same file under another name."""
    return file.model_copy(update={"name": name})


def _plain(place: str) -> str:
    return place.partition("://")[2] or place.lstrip("/")


def _located(name: str, hub_dir: Path | None) -> str:
    """The path or URL of a data set of the Hub; every other name unchanged."""
    if name.startswith("hf://") and hub_dir is not None:
        parts = name.removeprefix("hf://").removeprefix("datasets/")
        return str(hub_dir / parts)
    is_data_set = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    if is_remote(name) or not is_data_set or Path(name).exists():
        return name
    if hub_dir is not None and (hub_dir / name).is_dir():
        return str(hub_dir / name)
    if Path(name).parent.is_dir() or Path(name).suffix:
        return name  # a path that does not exist; the caller reports it
    return f"hf://datasets/{name}" if hub_dir is None else str(hub_dir / name)


def _files_of(place: str, role: str) -> tuple[list[tuple[InputFile, str]], bool]:
    """Files with their paths or URLs, and whether the place is a BEIR folder."""
    prefix = place.partition("://")[0] + "://" if is_remote(place) else ""
    with translate_storage_errors(place):
        if _GLOB.search(place):
            fixed = _GLOB.split(place, maxsplit=1)[0].rpartition("/")[0]
            system, root = open_file_system(fixed or ".")
            _, pattern = open_file_system(place)
            entries = [
                e for e in list_stored_files(system, root) if fnmatch.fnmatch(e.path, pattern)
            ]
            if not entries:
                raise InputError(f"{place}: no file matches")
        else:
            system, root = open_file_system(place)
            info = system.get_file_info(root)
            if info.type == pafs.FileType.File:
                entry = make_storage_entry(system, info)
                name = Path(entry.path).name
                return [(_described(entry, name), prefix + entry.path)], False
            entries = list_stored_files(system, root)
            if not entries:
                where = "holds no files" if info.type != pafs.FileType.NotFound else "is not there"
                raise InputError(f"{place} {where}; give a file, a folder, a glob or ORG/NAME")
    n_root = len(root.rstrip("/")) + 1
    named = [(entry, entry.path[n_root:]) for entry in entries]
    names = {name for _, name in named}
    is_beir = "corpus.jsonl" in names and "queries.jsonl" in names
    if is_beir:
        wanted = "queries.jsonl" if role == "query" else "corpus.jsonl"
        named = [(entry, name) for entry, name in named if name == wanted]
    data = [
        (_described(entry, name), prefix + entry.path)
        for entry, name in named
        if _format_of(name) is not None and not _is_beside(name)
    ]
    if not data:
        raise InputError(
            f"{place}: none of its {len(named)} files can be read; gteopt reads "
            f"{', '.join(sorted(_FORMATS))}; all but Parquet and Arrow may be compressed "
            f"({', '.join(_COMPRESSIONS)})"
        )
    return data, is_beir


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


def _described(entry: StorageEntry, name: str) -> InputFile:
    kind = _format_of(name)
    if kind is None:
        raise InputError(
            f"{name}: its name does not say its format; gteopt reads "
            f"{', '.join(sorted(_FORMATS))}; all but Parquet and Arrow may be compressed "
            f"({', '.join(_COMPRESSIONS)})"
        )
    return InputFile(
        name=name,
        n_bytes=entry.n_bytes,
        version=entry.version,
        format=kind[0],
        compression=kind[1],
    )


def open_input_bytes(place: str, compression: str | None = None, at: int = 0) -> io.BufferedReader:
    """Open a file and decompress it; an uncompressed file is read from the byte `at` on."""
    with translate_storage_errors(place):
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


def open_input_arrow(place: str) -> Any:
    """Open a file for random access by pyarrow; a file of this machine is memory-mapped."""
    with translate_storage_errors(place):
        if not is_remote(place):
            return pa.memory_map(str(local_path(place)))
        system, path = open_file_system(place)
        return system.open_input_file(path)


def check_input_unchanged(file: InputFile, place: str) -> None:
    """Check that a file has not changed since the job was planned.

    Raises:
        InputError: the file is gone, or its size or its time of change differs.
    """
    with translate_storage_errors(place):
        system, path = open_file_system(place)
        info = system.get_file_info(path)
        if info.type != pafs.FileType.File:
            raise InputError(f"{place} was removed after the job was planned; put it back")
        now = make_storage_entry(system, info)
    if (now.n_bytes, now.version) != (file.n_bytes, file.version):
        raise InputError(
            f"{place} has changed since the job was planned ({file.n_bytes:,} bytes then, "
            f"{now.n_bytes:,} now); restore it, or embed into a new folder"
        )
