"""Stages, hashes, seals and verifies artifact folders.

Hides: atomicity (everything is written into a hidden folder beside the target, which is renamed
when complete) and the hash chain (`gteopt.json` hashes every other file; its own hash names the
artifact). Refuses to know: what the files mean. The format's specification: artifacts/README.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory

from gteopt.errors import InputError, IntegrityError, join_problems
from gteopt.records.files import read_record, write_record
from gteopt.records.manifest import FileRecord, Manifest

MANIFEST = "gteopt.json"
_HUB_FILE, _HUB_FOLDER = ".gitattributes", (".cache", "huggingface")
"""Files of the model hub and its client in a downloaded folder; no part of the artifact."""
_UNREAD = frozenset(
    {".md", ".rst", ".pdf", ".ipynb", ".csv", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"}
)
_UNREAD_NAMES = frozenset({".gitignore", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt"})
"""The owner of a repository may add these files to an artifact: no loader reads them."""
_CHUNK_BYTES = 1 << 22
_HASH_THREADS = 4
"""A disk reads faster than one core hashes (1.7 GB/s with SHA instructions)."""


def is_artifact(folder: Path) -> bool:
    """Whether the folder holds a sealed artifact."""
    return (folder / MANIFEST).is_file()


def artifact_sha256(folder: Path) -> str:
    """The hash that names an artifact: that of `gteopt.json`, which hashes every other file."""
    return hash_file(folder / MANIFEST)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def stage_folder(out: Path) -> Path:
    """The folder where the artifact `out` is built; a build that was stopped resumes from it."""
    return out.parent / f".{out.name}.partial"


@contextmanager
def lock_stage(stage: Path) -> Iterator[None]:
    """Lock a stage folder for this process: two processes in it would mix their hidden states.

    The system drops the lock when the process ends, even if it is killed. An empty folder is
    removed again.

    Raises:
        InputError: another process works there.
    """
    import fcntl  # Unix only: other systems can read artifacts, but not build them

    stage.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(stage, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is making the same artifact, in {stage}; wait for it, or give "
                f"another --out"
            ) from error
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            with suppress(OSError):  # it was renamed, or is not empty
                stage.rmdir()
    finally:
        os.close(descriptor)


def empty_folder(folder: Path) -> None:
    """Remove everything in a folder; the folder itself stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_free_folder(out: Path) -> None:
    """Refuse a target that is not empty, or that a finished folder cannot replace.

    An artifact is built beside its target and renamed. To test this, a folder is made beside `out`
    and removed again.

    Raises:
        InputError: `out` is a file, a link, a mount point, the current folder or not empty; or
            nothing can be written beside it.
    """
    if out.is_symlink():
        raise InputError(f"--out {out} is a link; give the folder itself: {os.path.realpath(out)}")
    if out.is_file():
        raise InputError(f"--out {out} is a file; give a folder that does not exist yet")
    if out.is_dir():
        _check_empty(out)
    parent = out.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--out {out}: {parent} is no folder, so nothing can be put into it")
    try:
        with TemporaryDirectory(prefix=".gteopt-", dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"--out {out}: no folder can be made in {parent} ({error.strerror}); give a place that "
            f"you may write to"
        ) from error


def _check_empty(out: Path) -> None:
    if any(out.iterdir()):
        content = "another artifact" if is_artifact(out) else "other files"
        raise InputError(
            f"--out {out} exists and holds {content}; give another folder or remove it first"
        )
    is_mount = out.resolve().is_mount()
    if is_mount or out.name in ("", "..") or out.resolve() == Path.cwd():
        place = "a mount point" if is_mount else "the folder that gteopt runs in, or above it"
        raise InputError(
            f"--out {out} is {place}, which cannot be replaced by a finished folder; give a folder "
            f"inside of it, as {out / 'variant'}"
        )


def hash_files(paths: Iterable[Path]) -> list[str]:
    """`hash_file` of each path, several at a time."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(hash_file, paths))


def file_records(
    folder: Path, *, only: str = "**/*", scraps: Collection[Path] = ()
) -> tuple[FileRecord, ...]:
    """Path, size and hash of every file under `folder` except the manifest, sorted by path.

    Args:
        folder: an artifact, or the stage of one.
        only: pattern of the paths to record.
        scraps: files to leave out.
    """
    paths = [
        path
        for path in sorted(folder.glob(only))
        if path.is_file() and path.name != MANIFEST and path not in scraps
    ]
    return tuple(
        FileRecord(
            path=path.relative_to(folder).as_posix(), n_bytes=path.stat().st_size, sha256=sha256
        )
        for path, sha256 in zip(paths, hash_files(paths), strict=True)
    )


def seal_artifact(stage: Path, out: Path, manifest: Manifest) -> None:
    """Turn a finished stage folder into the artifact `out`.

    Writes the manifest, removes files that it does not list, syncs and renames. Nothing is lost if
    this is interrupted: a stage with a manifest is complete, and the same call finishes it.
    """
    _sync_all(stage)
    write_record(stage / MANIFEST, manifest)
    known = {stage / record.path for record in manifest.files} | {stage / MANIFEST}
    for path in sorted(stage.rglob("*"), reverse=True):  # files before their folder
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif not path.is_dir() and path not in known:
            path.unlink()
    # safetensors 0.8 ignores the umask: only the owner may read the files that it writes.
    mode = stat.S_IMODE((stage / MANIFEST).stat().st_mode)
    for path in known:
        if stat.S_IMODE(path.stat().st_mode) != mode:
            with suppress(PermissionError):  # a link to a file of another user
                path.chmod(mode)
    rename_stage(stage, out)


def rename_stage(stage: Path, out: Path) -> None:
    """Sync a stage folder that has its manifest, and rename it to `out`."""
    _sync_all(stage)
    if out.is_dir():
        out.rmdir()  # check_free_folder allows only an empty folder
    os.replace(stage, out)
    _sync(out.parent)


def remove_artifact(folder: Path) -> None:
    """Remove an artifact or a stage folder; it is renamed first, so none is ever half removed."""
    if folder.is_dir():
        renamed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(renamed, ignore_errors=True)
        os.replace(folder, renamed)
        shutil.rmtree(renamed)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact; its other files are not checked.

    Raises:
        InputError: the folder is not an artifact.
        IntegrityError: the manifest is damaged.
    """
    if not is_artifact(folder):
        raise InputError(f"{folder} is not an artifact: it has no {MANIFEST}")
    return read_record(folder / MANIFEST, Manifest)


def verify(folder: Path) -> Manifest:
    """Compare the size and hash of every file with the manifest.

    Added licenses, notes and pictures are ignored, because no loader reads them.

    Raises:
        InputError: the folder is not an artifact.
        IntegrityError: lists each changed, missing or extra file.

    Example:
        >>> manifest = gteopt.verify("artifacts/nano-int4")
    """
    with verify_while_reading(folder) as manifest:
        return manifest


@contextmanager
def verify_while_reading(folder: Path) -> Iterator[Manifest]:
    """`verify` while the `with` block reads the weights, so that the disk is read only once.

    Names, sizes and small files are checked before the block. The weights are hashed while the
    block runs, and damage is raised at its end, in place of any error that it caused inside. Until
    then the block must not pass on anything that it made from the weights.

    Raises:
        InputError, IntegrityError: see `verify`.
    """
    manifest = read_manifest(folder)
    problems, right_size = [], []
    for record in manifest.files:
        path = folder / record.path
        if not path.is_file():
            problems.append(f"{record.path} is missing")
        elif path.stat().st_size != record.n_bytes:
            problems.append(
                f"{record.path} has {path.stat().st_size} bytes, the manifest says {record.n_bytes}"
            )
        else:
            right_size.append(record)
    known = {record.path for record in manifest.files} | {MANIFEST}
    present = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    names = {
        path.as_posix()
        for path in present
        if path.parts[:2] != _HUB_FOLDER and path.as_posix() != _HUB_FILE and is_loadable_file(path)
    }
    problems += [f"{path} is not in the manifest" for path in sorted(names - known)]
    large = [record for record in right_size if record.path.endswith(".safetensors")]
    small = [record for record in right_size if record not in large]
    problems += _changed(small, (hash_file(folder / record.path) for record in small))
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        hashes = pool.map(hash_file, [folder / record.path for record in large])

        def check() -> None:
            all_problems = problems + _changed(large, hashes)
            if all_problems:
                raise IntegrityError(
                    join_problems(f"{folder} is damaged; do not use it", all_problems)
                )

        if problems:
            check()
        try:
            yield manifest
        except Exception:
            check()
            raise
        except BaseException:  # an interruption does not wait for the remaining files
            pool.shutdown(cancel_futures=True)
            raise
        check()


def _changed(records: Sequence[FileRecord], hashes: Iterable[str]) -> list[str]:
    return [
        f"{record.path} has changed (its SHA-256 differs from the manifest's)"
        for record, sha256 in zip(records, hashes, strict=True)
        if sha256 != record.sha256
    ]


def is_loadable_file(path: PurePath) -> bool:
    """Whether a loader might read a file of this name, so that an unlisted one is refused."""
    return path.suffix.lower() not in _UNREAD and path.name not in _UNREAD_NAMES


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
