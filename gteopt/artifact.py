"""The artifact folder: staged, hashed, sealed, verified.

Hides: atomicity (everything is written into a hidden folder beside the target, which is renamed
when whole) and the hash chain (`gteopt.json` hashes every other file; its own hash names the
artifact). Refuses to know: what the files mean. The format's specification: artifacts/README.md.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from gteopt.errors import InputError, IntegrityError, join_problems
from gteopt.records import FileRecord, Manifest, read_record, write_record

MANIFEST = "gteopt.json"
_HUB_FILE, _HUB_FOLDER = ".gitattributes", (".cache", "huggingface")
"""What the model hub and its client leave in a folder that they make; no part of the artifact."""
_CHUNK_BYTES = 1 << 22


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


def check_free(out: Path) -> None:
    """Refuse a target that holds something else.

    Raises:
        InputError: `out` is a file, or a folder that is not empty.
    """
    if out.is_file():
        raise InputError(f"--out {out} is a file; give a folder that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        what = "another artifact" if is_artifact(out) else "other files"
        raise InputError(
            f"--out {out} exists and holds {what}; give another folder or remove it first"
        )


def file_records(folder: Path, *, only: str = "**/*") -> tuple[FileRecord, ...]:
    """Every file under `folder` but the manifest, sorted by path, with size and hash.

    Args:
        folder: an artifact, or the stage of one.
        only: pattern of the paths to record.
    """
    return tuple(
        FileRecord(
            path=path.relative_to(folder).as_posix(),
            n_bytes=path.stat().st_size,
            sha256=hash_file(path),
        )
        for path in sorted(folder.glob(only))
        if path.is_file() and path.name != MANIFEST
    )


def seal(stage: Path, out: Path, manifest: Manifest) -> None:
    """Make a finished stage folder the artifact `out`: write its manifest, sync, rename."""
    write_record(stage / MANIFEST, manifest)
    place(stage, out)


def place(stage: Path, out: Path) -> None:
    """Give a stage folder that has its manifest the artifact's name: sync, rename."""
    for path in stage.rglob("*"):
        _sync(path)
    _sync(stage)
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

    Raises:
        InputError: not an artifact.
        IntegrityError: lists each changed, missing or extra file.
    """
    manifest = read_manifest(folder)
    problems = []
    for record in manifest.files:
        path = folder / record.path
        if not path.is_file():
            problems.append(f"{record.path} is missing")
        elif path.stat().st_size != record.n_bytes:
            problems.append(
                f"{record.path} has {path.stat().st_size} bytes, the manifest says {record.n_bytes}"
            )
        elif hash_file(path) != record.sha256:
            problems.append(f"{record.path} has changed (its SHA-256 differs from the manifest's)")
    known = {record.path for record in manifest.files} | {MANIFEST}
    present = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    names = {each.as_posix() for each in present if each.parts[:2] != _HUB_FOLDER} - {_HUB_FILE}
    problems += [f"{path} is not in the manifest" for path in sorted(names - known)]
    if problems:
        raise IntegrityError(join_problems(f"{folder} is damaged; do not use it", problems))
    return manifest


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
