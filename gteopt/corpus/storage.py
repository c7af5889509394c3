"""Read and write files on this machine, s3://, gs://, hf://, and every URL that fsspec reads.

Hides: which library reads which place, how a file appears complete or not at all. Refuses to know:
what the bytes mean.

A local file is written into a temporary folder, synced and renamed. An object store shows an object
only after its upload is complete, so one upload of the whole content is enough.

`StorageFolder.create` must not replace a file. Locally it makes a hard link, which fails if the
name is taken. An object store is told to refuse (`If-None-Match: *`) if its library for fsspec
(s3fs, gcsfs) is installed. Without it, gteopt first checks whether the file exists: if two writers
do so at the same moment, both write, and the later file stays.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from gteopt.errors import InputError

_HF = "hf://"
_DENIED = ("ACCESS_DENIED", "AccessDenied", "403", "Forbidden", "permission")


def is_remote(place: str) -> bool:
    """Whether a place is a URL that does not name files of this machine."""
    return "://" in place and not place.startswith("file://")


def local_path(place: str) -> Path:
    """The path of a place on this machine."""
    return Path(place.removeprefix("file://")).expanduser().absolute()


@contextmanager
def translate_storage_errors(place: str) -> Iterator[None]:
    """Turn errors of a file system about `place` into an error for the user.

    Raises:
        InputError: no permission, the place does not exist, or it cannot be reached.
    """
    try:
        yield
    except PermissionError as error:
        raise InputError(f"{place}: no permission ({error.strerror or error})") from error
    except FileNotFoundError as error:
        raise InputError(f"{place} does not exist, or you may not read its folder") from error
    except OSError as error:
        if not is_remote(place):
            raise
        message = str(error).strip().split("\n", 1)[0]
        if any(word in message for word in _DENIED):
            raise InputError(
                f"{place}: access denied ({message}); check the credentials and the bucket's policy"
            ) from error
        raise InputError(f"{place} cannot be reached ({message})") from error


def open_file_system(place: str) -> tuple[Any, str]:
    """The pyarrow file system of a place, and the place's path in it.

    If `AWS_ENDPOINT_URL` is set, S3 uses that endpoint, as Amazon's own tools do.

    Raises:
        InputError: no installed library reads the place.
    """
    if not is_remote(place):
        return pafs.LocalFileSystem(), str(local_path(place))
    scheme, _, rest = place.partition("://")
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    with translate_storage_errors(place):
        if scheme == "s3" and endpoint and "endpoint_override" not in place:
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            return pafs.S3FileSystem(endpoint_override=endpoint, region=region), rest
        if scheme in ("s3", "gs", "gcs"):
            system_and_path: tuple[Any, str] = pafs.FileSystem.from_uri(place)
            return system_and_path
        return _by_fsspec(place)


def _by_fsspec(place: str) -> tuple[Any, str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        raise InputError(f"{place}: {error}") from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), str(path)


@dataclass(frozen=True)
class StorageEntry:
    """A file of a folder.

    Attributes:
        path: path in its file system.
        version: changes when the content does: the time of the last change, or an object's hash.
    """

    path: str
    n_bytes: int
    version: str


def list_stored_files(system: Any, folder: str) -> list[StorageEntry]:
    """Every file under a folder, sorted by path; an empty list if the folder does not exist."""
    selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
    infos = system.get_file_info(selector)
    return sorted(
        (make_storage_entry(system, info) for info in infos if info.type == pafs.FileType.File),
        key=lambda entry: entry.path,
    )


def make_storage_entry(system: Any, info: Any) -> StorageEntry:
    """The entry of a file from the `FileInfo` of its file system."""
    if info.mtime_ns is not None:
        return StorageEntry(info.path, info.size or 0, str(info.mtime_ns))
    version = ""
    handler = getattr(system, "handler", None)
    if isinstance(handler, pafs.FSSpecHandler):
        details = handler.fs.info(info.path)
        keys = ("ETag", "etag", "blob_id", "sha256", "last_commit")
        version = str(next((details[key] for key in keys if details.get(key)), ""))
    return StorageEntry(info.path, info.size or 0, version)


class StorageFolder:
    """The folder that a job writes into.

    Attributes:
        place: as the user named it.
        local: path on this machine; None if the folder is on an object store.
    """

    TEMPORARY = "_tmp"
    """Holds half-written files of a local folder; removed when the job is finished."""

    def __init__(self, place: str | Path) -> None:
        self.place = str(place).rstrip("/") or "/"
        self.local = None if is_remote(self.place) else local_path(self.place)
        self._system, self._path = open_file_system(self.place)

    def __str__(self) -> str:
        return self.place

    def write(self, name: str, content: Any) -> None:
        """Write a file that appears complete or not at all.

        Raises:
            InputError: no permission.
            OSError: the disk is full.
        """
        if self.local is None:
            with (
                translate_storage_errors(self.place),
                self._system.open_output_stream(self._at(name)) as out,
            ):
                out.write(content)
            return
        with self._beside(self.local, name, content) as partial:
            os.replace(partial, self.local / name)

    def create(self, name: str, content: Any) -> bool:
        """Write a file unless one with that name exists; the module's docstring says how safely.

        Returns:
            Whether it was written.

        Raises:
            InputError: no permission.
            OSError: the disk is full.
        """
        if self.local is None:
            with translate_storage_errors(self.place):
                return self._create_object(name, content)
        with self._beside(self.local, name, content) as partial:
            try:
                os.link(partial, self.local / name)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if (self.local / name).exists():
                    return False
                os.replace(partial, self.local / name)
        return True

    def _create_object(self, name: str, content: Any) -> bool:
        at = self._at(name)
        if self._refusing is not None:
            with suppress(NotImplementedError):  # a server without conditional writes
                try:
                    self._refusing.pipe_file(at, bytes(content), mode="create")
                except FileExistsError:
                    return False
                return True
        if self._system.get_file_info(at).type == pafs.FileType.File:
            return False
        self.write(name, content)
        return True

    @cached_property
    def _refusing(self) -> Any:
        """A file system that can refuse to replace an object; None if there is none."""
        import fsspec

        if "?" in self.place or not self.place.startswith(("s3://", "gs://", "gcs://")):
            return None
        try:
            system, _ = fsspec.core.url_to_fs(self.place)
        except ImportError:
            return None
        return system

    @contextmanager
    def _beside(self, local: Path, name: str, content: Any) -> Iterator[str]:
        """Write the content into a temporary file, which is removed after the `with` block."""
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        beside = local / self.TEMPORARY
        beside.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=beside)
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(partial, 0o644)
            yield partial
        finally:
            with suppress(OSError):
                os.unlink(partial)

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is no such file."""
        if self.local is not None:
            try:
                return (self.local / name).read_bytes()
            except FileNotFoundError:
                return None
        with translate_storage_errors(self.place):
            info = self._system.get_file_info(self._at(name))
            if info.type != pafs.FileType.File:
                return None
            with self._system.open_input_file(self._at(name)) as handle:
                content: bytes = handle.read()
                return content

    def open(self, name: str) -> Any:
        """Open a file for random access."""
        with translate_storage_errors(self.place):
            return self._system.open_input_file(self._at(name))

    def tail(self, name: str, n_bytes: int) -> bytes:
        """The last bytes of a file."""
        if self.local is not None:
            # Without Python's file objects, because a large job reads 100,000 tails when it goes
            # on.
            descriptor = os.open(f"{self.local}/{name}", os.O_RDONLY)
            try:
                size = os.fstat(descriptor).st_size
                return os.pread(descriptor, n_bytes, max(0, size - n_bytes))
            finally:
                os.close(descriptor)
        with self._system.open_input_file(self._at(name)) as handle:
            size = handle.size()
            handle.seek(max(0, size - n_bytes))
            content: bytes = handle.read()
            return content

    def names(self, under: str) -> list[str]:
        """Sorted names in the subfolder `under`, relative to it.

        On this machine: the files and folders directly in it. On an object store: all files below.
        """
        if self.local is not None:
            try:
                return sorted(entry.name for entry in os.scandir(self.local / under))
            except FileNotFoundError:
                return []
        at = self._at(under).rstrip("/")
        with translate_storage_errors(self.place):
            return [entry.path[len(at) + 1 :] for entry in list_stored_files(self._system, at)]

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
        elif self.read(name) is not None:
            self._system.delete_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"
