"""Lists, uploads and downloads files of the model hub.

Hides: huggingface_hub and its many errors, the access token, which files need to be transferred.
Refuses to know: what the files mean.

huggingface_hub reads the token (`HF_TOKEN`, or the one that `hf auth login` stored). It is never
kept here, and is removed from every message, because a server might repeat it.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    DatasetInfo,
    HfApi,
    ModelInfo,
    get_token,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from gteopt.errors import GteoptError, HubUnreachableError, InputError

RepositoryKind = Literal["model", "dataset"]
_MADE_BY_THE_HUB = frozenset({".gitattributes"})
"""Files that the hub adds when it creates a repository; no user's content."""
_STEP_BYTES = 8 << 20
"""Bytes of an upload step. A Xet upload that stops within a step is sent again; each step takes a
few requests."""
_AGAIN = "run the same command again: files that have arrived are not sent twice"
_READ_AGAIN = "run the same command again: files that have arrived are not fetched twice"


@dataclass(frozen=True)
class UploadContent:
    """A file to send: its path or bytes, its size and its SHA-256."""

    source: Path | bytes
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub describes it.

    Attributes:
        git_sha1: git's hash of the bytes; for a large file, of the pointer to them.
        sha256: hash of a large file's bytes; None for a small file.
    """

    n_bytes: int
    git_sha1: str
    sha256: str | None

    def holds(self, content: UploadContent) -> bool:
        """Whether the file has the bytes of `content`."""
        if self.n_bytes != content.n_bytes:
            return False
        if self.sha256 is not None:
            return self.sha256 == content.sha256
        source = content.source
        data = source if isinstance(source, bytes) else source.read_bytes()
        return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest() == self.git_sha1


@dataclass(frozen=True)
class Repository:
    """A repository of a model or a data set at one commit."""

    id: str
    commit: str
    private: bool
    files: Mapping[str, RemoteFile]

    @property
    def content(self) -> list[str]:
        """Paths of the files that users put there."""
        return sorted(set(self.files) - _MADE_BY_THE_HUB)


@dataclass(frozen=True)
class UploadResult:
    """The result of an upload, as paths in the repository.

    Attributes:
        kept: files of users that the upload did not touch.
    """

    url: str
    commit: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]


def check_repo_name(repo: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        InputError: the name is not `ORG/NAME` in the characters that the hub allows.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"'{repo}' cannot be a repository's name: {error}") from None
    if repo.count("/") != 1:
        raise InputError(f"'{repo}' is not ORG/NAME, as in your-name/gte-nano-int4")


def check_token() -> None:
    """Refuse to start without an access token; the hub would only refuse at the end.

    Raises:
        InputError: there is no access token.
    """
    if get_token() is None:
        raise InputError(
            "no access token for the hub; run `hf auth login`, or set HF_TOKEN to a token that may "
            "write (https://huggingface.co/settings/tokens)"
        )


def find_repository(
    repo: str, revision: str | None = None, *, kind: RepositoryKind = "model"
) -> Repository | None:
    """The repository at a branch, tag or commit; None if the token can see no such repository.

    Raises:
        InputError: there is no such revision, no access, or no network.
    """
    with _plainly(repo):
        try:
            info: ModelInfo | DatasetInfo = (
                HfApi().model_info(repo, revision=revision, files_metadata=True)
                if kind == "model"
                else HfApi().dataset_info(repo, revision=revision, files_metadata=True)
            )
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
    return Repository(
        id=repo,
        commit=str(info.sha),
        private=bool(info.private),
        files={
            file.rfilename: RemoteFile(
                n_bytes=int(file.size or 0),
                git_sha1=str(file.blob_id),
                sha256=file.lfs.sha256 if file.lfs is not None else None,
            )
            for file in info.siblings or ()
        },
    )


def create_repository(repo: str, *, private: bool) -> Repository:
    """Create an empty repository.

    Raises:
        InputError: the token may not create it, or there is no network.
    """
    with _plainly(repo, "write to"):
        # exist_ok: the token may write to it but not see it, or it was created a moment ago.
        HfApi().create_repo(repo, private=private, exist_ok=True)
    created = find_repository(repo)
    if created is None:
        raise InputError(f"{repo} was created, but the hub does not show it; {_AGAIN}")
    return created


def upload_files(
    repository: Repository,
    files: Mapping[str, UploadContent],
    *,
    stale: Collection[str] = (),
    message: str,
) -> UploadResult:
    """Upload files to a repository in one commit on `main`; only `stale` files are deleted.

    Bytes that the hub already has are not sent again, also after an interrupted upload. No file is
    visible before the commit. The hub refuses the commit if the repository has changed since it
    was read.

    Args:
        repository: as it was read.
        files: content by path in the repository.
        stale: paths to delete if they exist and are not in `files`.
        message: of the commit.

    Raises:
        InputError: there is no permission, no network, or another commit came first.
    """
    new = sorted(path for path in files if not _is_there(repository, path, files[path]))
    others = set(repository.content) - set(files)
    deleted = sorted(others & set(stale))
    commit = repository.commit
    if new or deleted:
        deletions = [CommitOperationDelete(path_in_repo=path) for path in deleted]
        additions = []
        with _plainly(repository.id, "write to"):
            for paths in _steps(new, files):
                step = [CommitOperationAdd(path, files[path].source) for path in paths]
                HfApi().preupload_lfs_files(repository.id, step, free_memory=False)
                additions += step
            commit = (
                HfApi()
                .create_commit(
                    repository.id,
                    [*additions, *deletions],
                    commit_message=message,
                    parent_commit=commit,
                )
                .oid
            )
        _check_arrived(repository.id, commit, files)
    return UploadResult(
        url=f"{HfApi().endpoint}/{repository.id}",
        commit=commit,
        sent=tuple(new),
        deleted=tuple(deleted),
        kept=tuple(sorted(others - set(deleted))),
    )


def download_files(repository: Repository, paths: Iterable[str], into: Path) -> None:
    """Download files of a repository into a folder; each file appears there when it is complete.

    Files that are already there are kept. After a broken connection a download continues; after a
    killed process the file is downloaded from its start. The client's records are in `into`/.cache.

    Raises:
        InputError: there is no access or no network.
    """
    with _plainly(repository.id):
        HfApi().snapshot_download(
            repository.id,
            revision=repository.commit,
            local_dir=into,
            allow_patterns=[glob.escape(path) for path in paths],
        )


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one commit, in the client's own cache."""

    folder: Path
    commit: str


def download_snapshot(repo: str, patterns: Iterable[str], revision: str | None = None) -> Snapshot:
    """Download the files that match into the client's cache, except those that are there.

    Without a network, the files of an earlier call are used.

    Raises:
        InputError: there is no such repository or revision, no access, or neither network nor
            cache.
    """
    with _plainly(repo):
        folder = Path(
            HfApi().snapshot_download(repo, revision=revision, allow_patterns=list(patterns))
        )
    return Snapshot(folder, folder.name)


def cached_hub_file(repository: Repository, path: str, kind: RepositoryKind = "model") -> Path:
    """Bring one file into the client's cache, where it stays, and return its path there.

    Raises:
        InputError: no access, no network.
    """
    with _plainly(repository.id):
        return Path(
            HfApi().hf_hub_download(repository.id, path, repo_type=kind, revision=repository.commit)
        )


@dataclass(frozen=True)
class RemoteTensors:
    """Tensors of safetensors files on the hub: their shapes, and the bytes of all."""

    shapes: Mapping[str, tuple[int, ...]]
    n_bytes: int


def read_remote_headers(repo: str, paths: Iterable[str], commit: str) -> RemoteTensors:
    """The tensors in safetensors files of a repository, by one or two range requests a file.

    Raises:
        InputError: a file is missing or is no safetensors file, or there is no access or network.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    n_bytes = 0
    with _plainly(repo):
        for path in paths:
            try:
                header = HfApi().parse_safetensors_file_metadata(repo, path, revision=commit)
            except RemoteEntryNotFoundError:
                raise InputError(
                    f"{repo} lacks {path}; gteopt reads weights from safetensors files only"
                ) from None
            for name, tensor in header.tensors.items():
                shapes[name] = tuple(tensor.shape)
                first, end = tensor.data_offsets
                n_bytes += end - first
    return RemoteTensors(shapes, n_bytes)


def _steps(paths: Iterable[str], files: Mapping[str, UploadContent]) -> Iterator[list[str]]:
    """The paths, largest file first, in groups that are uploaded together."""
    step: list[str] = []
    for path in sorted(paths, key=lambda path: (-files[path].n_bytes, path)):
        step.append(path)
        if sum(files[path].n_bytes for path in step) >= _STEP_BYTES:
            yield step
            step = []
    if step:
        yield step


def _is_there(repository: Repository, path: str, content: UploadContent) -> bool:
    file = repository.files.get(path)
    return file is not None and file.holds(content)


def _check_arrived(repo: str, commit: str, files: Mapping[str, UploadContent]) -> None:
    after = find_repository(repo, commit)
    wrong = [
        path
        for path, content in files.items()
        if after is None or not _is_there(after, path, content)
    ]
    if wrong:
        raise InputError(
            f"{repo} does not hold the files that were sent ({', '.join(sorted(wrong))}); {_AGAIN}"
        )


@contextmanager
def _plainly(repo: str, verb: str = "read") -> Iterator[None]:
    """Turn the client's errors into a plain message; gteopt's own bugs pass through.

    The cause is dropped, because a traceback would show the server's answer with the token.
    """
    try:
        yield
    except GteoptError:
        raise
    except Exception as error:
        message = _explanation(repo, verb, error)
        if message is None:
            raise
        kind = HubUnreachableError if _is_unreachable(error) else InputError
        raise kind(_without_token(message)) from None


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub gave no answer at all."""
    chain = list(_causes(error))
    if any(isinstance(cause, HfHubHTTPError) for cause in chain):
        return False
    return any(
        isinstance(cause, OfflineModeIsEnabled)
        or type(cause).__module__.partition(".")[0] in ("httpx", "httpx2")
        for cause in chain
    )


def _explanation(repo: str, verb: str, error: Exception) -> str | None:
    """What happened and what to do; None if the error does not come from the hub."""
    chain = list(_causes(error))
    again = _READ_AGAIN if verb == "read" else _AGAIN
    for cause in chain:
        if isinstance(cause, HfHubHTTPError):
            return _of_status(repo, verb, cause)
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids the network; unset it"
        if type(cause).__module__.partition(".")[0] in ("httpx", "httpx2"):
            host = HfApi().endpoint
            return (
                f"{host} cannot be reached ({_first_line(cause)}); check the network, then {again}"
            )
    if isinstance(error, RuntimeError | ValueError | OSError):
        return f"{repo}: {_first_line(chain[-1])}; {again}"
    return None


def missing_repository(repo: str) -> str:
    """The message for a missing or private repository; the hub does not tell which it is."""
    return (
        f"there is no repository {repo} that you may see; check the name, and for a private one "
        f"log in (`hf auth login`, or HF_TOKEN)"
    )


def _of_status(repo: str, verb: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    answer = (error.server_message or "").strip().splitlines()
    reason = f" (the hub says: {answer[0]})" if answer else ""
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision; give a branch, a tag or a commit"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} lacks a file{reason}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated; ask for access on its page{reason}"
    if isinstance(error, RepositoryNotFoundError) and verb == "read":
        return missing_repository(repo)
    if status == 401:
        return (
            f"the hub does not accept the access token{reason}; make one that may {verb} {repo} "
            f"(https://huggingface.co/settings/tokens), then `hf auth login` or set HF_TOKEN"
        )
    if status in (403, 404):
        return f"the access token may not {verb} {repo}{reason}; use one that may"
    if status in (409, 412):
        return f"another user changed {repo} just now{reason}; look at it, then {_AGAIN}"
    return f"the hub answered {status}{reason}; {_READ_AGAIN if verb == 'read' else _AGAIN}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, outermost first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _without_token(message: str) -> str:
    token = get_token()
    return re.sub(r"hf_\w{8,}", "hf_***", message.replace(token, "hf_***") if token else message)
