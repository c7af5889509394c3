"""Data sets in a local folder, identified by a hash of the folder's files.

`datasets` caches what it reads under the folder's base name. It would therefore return the old copy
after files were replaced, and for another folder of the same name. Here every state of a folder has
its own cache directory.

Hides: hashing, the cache directory, the notes of `hf download`. Refuses to know: tasks, columns.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gteopt.errors import InputError

_CACHE = "gteopt-local"
_Stamp = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class LocalData:
    """The state of a data folder when it was hashed.

    Attributes:
        folder: the folder that holds the files.
        sha256: over names and bytes of the files, without dot files.
        stamps: name, inode, size and both times of each file; they show that a file was replaced.
        files: SHA-256 of each file, by its name relative to the folder.
    """

    folder: Path
    sha256: str
    stamps: tuple[_Stamp, ...]
    files: tuple[tuple[str, str], ...]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A context in which `datasets.load_dataset` reads the folder as it was hashed.

        The cache directory is named after the hash, and a file that changes meanwhile is an error.

        Raises:
            InputError: the folder changed after it was hashed.
        """
        import datasets

        key = hashlib.sha256(f"{self.sha256}\0{self.stamps!r}".encode()).hexdigest()[:32]
        before = datasets.config.HF_DATASETS_CACHE
        cache = Path(before) / _CACHE / key
        datasets.config.HF_DATASETS_CACHE = cache
        try:
            yield
        finally:
            datasets.config.HF_DATASETS_CACHE = before
            changed = _stamps(self.folder, _files(self.folder)) != self.stamps
            if changed:
                shutil.rmtree(cache, ignore_errors=True)
        if changed:
            raise InputError(
                f"files of {self.folder} changed while they were read; start again when nothing "
                f"writes to the folder"
            )


def describe_local_data(folder: Path, pattern: str = "*") -> LocalData:
    """Hash those files of a data folder whose names match the pattern.

    Example: `describe_local_data(Path("hub/mteb/banking77")).sha256`

    Raises:
        InputError: the folder changed while it was hashed.
    """
    files = _files(folder, pattern)
    stamps = _stamps(folder, files)
    hashes = []
    for path in files:
        with path.open("rb") as handle:
            file_sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        hashes.append((path.relative_to(folder).as_posix(), file_sha256))
    if _stamps(folder, _files(folder, pattern)) != stamps:
        raise InputError(
            f"files of {folder} changed while they were hashed; start again when nothing writes to "
            f"the folder"
        )
    listing = "".join(f"{name}\0{file_sha256}\n" for name, file_sha256 in hashes)
    return LocalData(folder, hashlib.sha256(listing.encode()).hexdigest(), stamps, tuple(hashes))


def downloaded_commit(data: LocalData) -> tuple[str | None, list[str]]:
    """The commit that `hf download` noted for a folder, and the files that differ from it.

    The Hub client writes `.cache/huggingface/download/<file>.metadata` with commit, etag and time.
    The etag is the SHA-256 of a large file and git's hash of a small one.

    Returns:
        The commit that all notes name, or None where they name several. The second value lists
        files without a note, and files whose bytes differ from their note.
    """
    notes = data.folder / ".cache" / "huggingface" / "download"
    commits: set[str] = set()
    changed = []
    for name, file_sha256 in data.files:
        note = notes / f"{name}.metadata"
        lines = note.read_text(encoding="utf-8").splitlines() if note.is_file() else []
        if len(lines) < 2:
            changed.append(name)
            continue
        commits.add(lines[0].strip())
        etag = lines[1].strip()
        if etag not in (file_sha256, "" if len(etag) == 64 else _git_hash(data.folder / name)):
            changed.append(name)
    return (commits.pop() if len(commits) == 1 else None), changed


def _files(folder: Path, pattern: str = "*") -> list[Path]:
    """The folder's files without the Hub client's dot files, in the order of their names."""
    return [
        path
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _stamps(folder: Path, files: Sequence[Path]) -> tuple[_Stamp, ...]:
    stamps = []
    for path in files:
        stat = path.stat()
        name = str(path.relative_to(folder))
        stamps.append((name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(stamps)


def _git_hash(path: Path) -> str:
    """Git's hash of a file: SHA-1 of "blob", its size and its bytes."""
    content = path.read_bytes()
    header = f"blob {len(content)}\0".encode()
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
