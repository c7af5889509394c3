"""The model hub: what lies in a repository, sending files there, bringing them here.

Hides: huggingface_hub and its many errors, the access token, which files need to travel at all.
Refuses to know: what the files mean.

The token is read by huggingface_hub (`HF_TOKEN`, or what `hf auth login` stored). It is never kept
here, and taken out of every message, should a server repeat it.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
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

_MADE_BY_THE_HUB = frozenset({".gitattributes"})
"""What a repository holds from its creation; nobody's content."""
_STEP_BYTES = 8 << 20
"""After how many bytes what was sent is settled, so that it never travels again. A Xet upload that
is interrupted before it is settled is lost; each settling takes a few requests."""
_AGAIN = "run the same command again: what has arrived is not sent twice"
_READ_AGAIN = "run the same command again: what has arrived is not fetched twice"


@dataclass(frozen=True)
class Content:
    """One file to send: where its bytes are, their number and their SHA-256."""

    source: Path | bytes
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository, as the hub describes it.

    Attributes:
        git_sha1: git's name of its bytes (of a pointer to them, for a large file).
        sha256: of a large file's bytes; None of a small one.
    """

    n_bytes: int
    git_sha1: str
    sha256: str | None

    def holds(self, content: Content) -> bool:
        """Whether these are the same bytes."""
        if self.n_bytes != content.n_bytes:
            return False
        if self.sha256 is not None:
            return self.sha256 == content.sha256
        source = content.source
        data = source if isinstance(source, bytes) else source.read_bytes()
        return hashlib.sha1(b"blob %d\0%b" % (len(data), data)).hexdigest() == self.git_sha1


@dataclass(frozen=True)
class Repository:
    """A model repository at one commit."""

    id: str
    commit: str
    private: bool
    files: Mapping[str, RemoteFile]

    @property
    def content(self) -> list[str]:
        """Paths of what people put there."""
        return sorted(set(self.files) - _MADE_BY_THE_HUB)


@dataclass(frozen=True)
class Sent:
    """What an upload did; paths in the repository.

    Attributes:
        kept: what people had put there that the upload has nothing to do with.
    """

    url: str
    commit: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...]


def check_repo_name(repo: str) -> None:
    """Refuse what no repository can be called.

    Raises:
        InputError: not `ORG/NAME` in the hub's alphabet.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"'{repo}' cannot be a repository's name: {error}") from None
    if repo.count("/") != 1:
        raise InputError(f"'{repo}' is not ORG/NAME, as in your-name/gte-nano-int4")


def check_token() -> None:
    """Refuse to begin what the hub would turn down at the end.

    Raises:
        InputError: there is no access token.
    """
    if get_token() is None:
        raise InputError(
            "no access token for the hub; run `hf auth login`, or set HF_TOKEN to a token that may "
            "write (https://huggingface.co/settings/tokens)"
        )


def find(repo: str, revision: str | None = None) -> Repository | None:
    """The repository at a branch, tag or commit; None where there is none that the token may see.

    Raises:
        InputError: no such revision, no access, no network.
    """
    with _plainly(repo):
        try:
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
    return Repository(
        id=repo,
        commit=str(info.sha),
        private=bool(info.private),
        files={
            each.rfilename: RemoteFile(
                n_bytes=int(each.size or 0),
                git_sha1=str(each.blob_id),
                sha256=each.lfs.sha256 if each.lfs is not None else None,
            )
            for each in info.siblings or ()
        },
    )


def create(repo: str, *, private: bool) -> Repository:
    """Make an empty repository.

    Raises:
        InputError: the token may not, or no network.
    """
    with _plainly(repo, "write to"):
        # exist_ok: one that the token may write but not see, or that came to be a moment ago.
        HfApi().create_repo(repo, private=private, exist_ok=True)
    found = find(repo)
    if found is None:
        raise InputError(f"{repo} was created, but the hub does not show it; {_AGAIN}")
    return found


def send(
    repository: Repository,
    files: Mapping[str, Content],
    *,
    stale: Collection[str] = (),
    message: str,
) -> Sent:
    """Make a repository hold these files, in one commit on `main`; others stay but for `stale`.

    Bytes that are there already do not travel, and neither do those of an interrupted upload.
    Nobody sees any file before the commit. The commit is refused if the repository has changed
    since it was read.

    Raises:
        InputError: no permission, no network, or somebody else's commit came between.
    """
    new = sorted(path for path in files if not _is_there(repository, path, files[path]))
    others = set(repository.content) - set(files)
    gone = sorted(others & set(stale))
    commit = repository.commit
    if new or gone:
        deletions = [CommitOperationDelete(path_in_repo=path) for path in gone]
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
    return Sent(
        url=f"{HfApi().endpoint}/{repository.id}",
        commit=commit,
        sent=tuple(new),
        deleted=tuple(gone),
        kept=tuple(sorted(others - set(gone))),
    )


def fetch(repository: Repository, paths: Iterable[str], into: Path) -> None:
    """Bring files of a repository into a folder; each appears there when it is whole.

    Files that are there already are kept. A file whose connection was cut goes on where it stopped.
    A file that a killed process left starts anew. The client keeps its notes in `into`/.cache.

    Raises:
        InputError: no access, no network.
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
    """Files of a repository in the client's own cache, as they are at one commit."""

    folder: Path
    commit: str


def snapshot(repo: str, patterns: Iterable[str], revision: str | None = None) -> Snapshot:
    """Bring the files that match into the client's cache; what is there already does not travel.

    Without a network, what an earlier call brought is taken.

    Raises:
        InputError: no such repository or revision, no access, or neither network nor cache.
    """
    with _plainly(repo):
        folder = Path(
            HfApi().snapshot_download(repo, revision=revision, allow_patterns=list(patterns))
        )
    return Snapshot(folder, folder.name)


@dataclass(frozen=True)
class RemoteTensors:
    """Tensors of safetensors files that are not here: their shapes, and their bytes together."""

    shapes: Mapping[str, tuple[int, ...]]
    n_bytes: int


def read_headers(repo: str, paths: Iterable[str], commit: str) -> RemoteTensors:
    """What lies in safetensors files of a repository, by a range request or two a file.

    Raises:
        InputError: a file is missing or is no safetensors file; no access, no network.
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


def _steps(paths: Iterable[str], files: Mapping[str, Content]) -> Iterator[list[str]]:
    """The paths, largest file first, in groups that are settled together."""
    step: list[str] = []
    for path in sorted(paths, key=lambda each: (-files[each].n_bytes, each)):
        step.append(path)
        if sum(files[each].n_bytes for each in step) >= _STEP_BYTES:
            yield step
            step = []
    if step:
        yield step


def _is_there(repository: Repository, path: str, content: Content) -> bool:
    found = repository.files.get(path)
    return found is not None and found.holds(content)


def _check_arrived(repo: str, commit: str, files: Mapping[str, Content]) -> None:
    now = find(repo, commit)
    wrong = [
        path for path, content in files.items() if now is None or not _is_there(now, path, content)
    ]
    if wrong:
        raise InputError(
            f"{repo} does not hold what was sent ({', '.join(sorted(wrong))}); {_AGAIN}"
        )


@contextmanager
def _plainly(repo: str, verb: str = "read") -> Iterator[None]:
    """Turn what the client raises into words; a bug of ours passes through.

    The cause is dropped on purpose: a traceback would show what the server said, unedited.
    """
    try:
        yield
    except GteoptError:
        raise
    except Exception as error:
        words = _explanation(repo, verb, error)
        if words is None:
            raise
        kind = HubUnreachableError if _is_unreachable(error) else InputError
        raise kind(_without_token(words)) from None


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
    """What happened and what to do; None where the hub has no part in it."""
    chain = list(_causes(error))
    again = _READ_AGAIN if verb == "read" else _AGAIN
    for each in chain:
        if isinstance(each, HfHubHTTPError):
            return _of_status(repo, verb, each)
    for each in chain:
        if isinstance(each, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE forbids the network; unset it"
        if type(each).__module__.partition(".")[0] in ("httpx", "httpx2"):
            host = HfApi().endpoint
            return (
                f"{host} cannot be reached ({_first_line(each)}); check the network, then {again}"
            )
    if isinstance(error, RuntimeError | ValueError | OSError):
        return f"{repo}: {_first_line(chain[-1])}; {again}"
    return None


def nothing_there(repo: str) -> str:
    """What to say of a repository that is missing, or private: the hub does not tell which."""
    return (
        f"there is no repository {repo} that you may see; check the name, and for a private one "
        f"log in (`hf auth login`, or HF_TOKEN)"
    )


def _of_status(repo: str, verb: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    said = (error.server_message or "").strip().splitlines()
    reason = f" (the hub says: {said[0]})" if said else ""
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision; give a branch, a tag or a commit"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{repo} lacks a file{reason}"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated; ask for access on its page{reason}"
    if isinstance(error, RepositoryNotFoundError) and verb == "read":
        return nothing_there(repo)
    if status == 401:
        return (
            f"the hub does not accept the access token{reason}; make one that may {verb} {repo} "
            f"(https://huggingface.co/settings/tokens), then `hf auth login` or set HF_TOKEN"
        )
    if status in (403, 404):
        return f"the access token may not {verb} {repo}{reason}; use one that may"
    if status in (409, 412):
        return f"somebody else changed {repo} just now{reason}; look at it, then {_AGAIN}"
    return f"the hub answered {status}{reason}; {_READ_AGAIN if verb == 'read' else _AGAIN}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or at.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _without_token(words: str) -> str:
    token = get_token()
    return re.sub(r"hf_\w{8,}", "hf_***", words.replace(token, "hf_***") if token else words)
