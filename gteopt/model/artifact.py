"""The artifact folder: staged, hashed, sealed, verified.

Hides: atomicity (everything is written into a hidden folder beside the target, which is renamed
when whole) and the hash chain (`gteopt.json` hashes every other file; its own hash names the
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
"""What the model hub and its client leave in a folder that they make; no part of the artifact."""
_UNREAD = frozenset(
    {".md", ".rst", ".pdf", ".ipynb", ".csv", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp"}
)
_UNREAD_NAMES = frozenset({".gitignore", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.txt"})
"""What the owner of a repository may put beside an artifact: no loader looks at it."""
_CHUNK_BYTES = 1 << 22
_HASH_THREADS = 4
"""A disk reads faster than a core hashes (1.7 GB/s with SHA instructions)."""


def is_artifact(folder: Path) -> bool:
    """Whether the folder holds a sealed artifact."""
    return (folder / MANIFEST).is_file()


def artifact_sha256(folder: Path) -> str:
    """The hash that names an artifact: of its `gteopt.json`, which hashes everything else."""
    return hash_file(folder / MANIFEST)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def stage_folder(out: Path) -> Path:
    """Where the artifact `out` is put together; kept after an interruption to go on from."""
    return out.parent / f".{out.name}.partial"


@contextmanager
def alone(stage: Path) -> Iterator[None]:
    """Keep a stage folder for this process: two processes in it would mix their hidden states.

    The system holds the lock, so a killed process leaves none. An empty folder is removed again.

    Raises:
        InputError: another process works there.
    """
    import fcntl  # Unix has it, and syncs folders; artifacts are read elsewhere too

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
            with suppress(OSError):  # it has its name by now, or is not empty
                stage.rmdir()
    finally:
        os.close(descriptor)


def clear(folder: Path) -> None:
    """Remove what is in a folder, which stays."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_free(out: Path) -> None:
    """Refuse a target that holds something else, or that no folder can be put at.

    An artifact is put together beside its place and renamed, so both must be possible: a folder is
    made beside `out` and removed again.

    Raises:
        InputError: `out` is a file, a link, a mount point, the folder that the process is in, or
            holds something; or nothing can be written beside it.
    """
    if out.is_symlink():
        raise InputError(f"--out {out} is a link; give the folder itself: {os.path.realpath(out)}")
    if out.is_file():
        raise InputError(f"--out {out} is a file; give a folder that does not exist yet")
    if out.is_dir():
        _check_empty(out)
    there = out.parent
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise InputError(f"--out {out}: {there} is no folder, so nothing can be put into it")
    try:
        with TemporaryDirectory(prefix=".gteopt-", dir=there):
            pass
    except OSError as error:
        raise InputError(
            f"--out {out}: no folder can be made in {there} ({error.strerror}); give a place that "
            f"you may write to"
        ) from error


def _check_empty(out: Path) -> None:
    if any(out.iterdir()):
        what = "another artifact" if is_artifact(out) else "other files"
        raise InputError(
            f"--out {out} exists and holds {what}; give another folder or remove it first"
        )
    is_mount = out.resolve().is_mount()
    if is_mount or out.name in ("", "..") or out.resolve() == Path.cwd():
        what = "a mount point" if is_mount else "the folder that gteopt runs in, or above it"
        raise InputError(
            f"--out {out} is {what}, which cannot be replaced by a finished folder; give a folder "
            f"inside of it, as {out / 'variant'}"
        )


def hash_files(paths: Iterable[Path]) -> list[str]:
    """`hash_file` of each, several at a time."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(hash_file, paths))


def file_records(
    folder: Path, *, only: str = "**/*", scraps: Collection[Path] = ()
) -> tuple[FileRecord, ...]:
    """Every file under `folder` but the manifest, sorted by path, with size and hash.

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
            path=path.relative_to(folder).as_posix(), n_bytes=path.stat().st_size, sha256=found
        )
        for path, found in zip(paths, hash_files(paths), strict=True)
    )


def seal(stage: Path, out: Path, manifest: Manifest) -> None:
    """Make a finished stage folder the artifact `out`: write its manifest, remove what is not in
    it, sync, rename.

    This order loses nothing when it is interrupted: a stage with a manifest has all that the
    artifact needs, and the same call completes it.
    """
    _sync_all(stage)
    write_record(stage / MANIFEST, manifest)
    known = {stage / record.path for record in manifest.files} | {stage / MANIFEST}
    for path in sorted(stage.rglob("*"), reverse=True):  # what is in a folder before the folder
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif not path.is_dir() and path not in known:
            path.unlink()
    # safetensors 0.8 lets nobody but the owner read what it writes, whatever the umask says.
    mode = stat.S_IMODE((stage / MANIFEST).stat().st_mode)
    for path in known:
        if stat.S_IMODE(path.stat().st_mode) != mode:
            with suppress(PermissionError):  # a link to somebody else's file
                path.chmod(mode)
    place(stage, out)


def place(stage: Path, out: Path) -> None:
    """Give a stage folder that has its manifest the artifact's name: sync, rename."""
    _sync_all(stage)
    if out.is_dir():
        out.rmdir()  # check_free allowed it only when empty
    os.replace(stage, out)
    _sync(out.parent)


def discard(folder: Path) -> None:
    """Remove an artifact or a stage folder, never seen half removed under its own name."""
    if folder.is_dir():
        doomed = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact, without looking at the other files.

    Raises:
        InputError: not an artifact.
        IntegrityError: the manifest itself is damaged.
    """
    if not is_artifact(folder):
        raise InputError(f"{folder} is not an artifact: it has no {MANIFEST}")
    return read_record(folder / MANIFEST, Manifest)


def verify(folder: Path) -> Manifest:
    """Compare every file with the manifest's size and hash.

    Licenses, notes and pictures beside them are nobody's input, and passed over.

    Raises:
        InputError: not an artifact.
        IntegrityError: lists each changed, missing or extra file.

    Example:
        >>> manifest = gteopt.verify("artifacts/nano-int4")
    """
    with verifying(folder) as manifest:
        return manifest


@contextmanager
def verifying(folder: Path) -> Iterator[Manifest]:
    """`verify` while the block reads the weights, so that they leave the disk once.

    Names, sizes and small files are checked before the block. The weights are hashed while it runs,
    and the block ends when their hashes are known. Damage is raised then, in place of any error
    that it led to inside. The block must not hand on what it makes of the weights before it ends.

    Raises:
        InputError, IntegrityError: see `verify`.
    """
    manifest = read_manifest(folder)
    problems, whole = [], []
    for record in manifest.files:
        path = folder / record.path
        if not path.is_file():
            problems.append(f"{record.path} is missing")
        elif path.stat().st_size != record.n_bytes:
            problems.append(
                f"{record.path} has {path.stat().st_size} bytes, the manifest says {record.n_bytes}"
            )
        else:
            whole.append(record)
    known = {record.path for record in manifest.files} | {MANIFEST}
    present = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    names = {
        each.as_posix()
        for each in present
        if each.parts[:2] != _HUB_FOLDER and each.as_posix() != _HUB_FILE and is_read(each)
    }
    problems += [f"{path} is not in the manifest" for path in sorted(names - known)]
    large = [record for record in whole if record.path.endswith(".safetensors")]
    small = [record for record in whole if record not in large]
    problems += _changed(small, (hash_file(folder / record.path) for record in small))
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        hashes = pool.map(hash_file, [folder / record.path for record in large])

        def check() -> None:
            found = problems + _changed(large, hashes)
            if found:
                raise IntegrityError(join_problems(f"{folder} is damaged; do not use it", found))

        if problems:
            check()
        try:
            yield manifest
        except Exception:
            check()
            raise
        except BaseException:  # an interruption does not wait for files that are not begun
            pool.shutdown(cancel_futures=True)
            raise
        check()


def _changed(records: Sequence[FileRecord], hashes: Iterable[str]) -> list[str]:
    return [
        f"{record.path} has changed (its SHA-256 differs from the manifest's)"
        for record, sha256 in zip(records, hashes, strict=True)
        if sha256 != record.sha256
    ]


def is_read(path: PurePath) -> bool:
    """Whether some loader might look at a file of this name; one that the manifest does not list is
    then refused.
    """
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
