"""Publish an artifact on the model hub, and pull a published one.

Hides: how a published folder differs from an artifact. Refuses to know: torch, HTTP (`hub` does),
what the card says, how anything was measured.

A published folder differs from its artifact in two files. README.md has more sections. The
manifest has that README.md's hash, and in `published_from` the hash of the measured artifact.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock, Timeout
from huggingface_hub.constants import HF_HOME

from gteopt.build.card import CARD
from gteopt.errors import InputError, IntegrityError, join_problems
from gteopt.model import hub
from gteopt.model.artifact import (
    MANIFEST,
    artifact_sha256,
    check_free_folder,
    empty_folder,
    hash_file,
    is_artifact,
    lock_stage,
    read_manifest,
    remove_artifact,
    rename_stage,
    seal_artifact,
    stage_folder,
    verify,
)
from gteopt.model.checkpoint import open_checkpoint
from gteopt.publishing.licenses import LicenseTerms, read_license_terms
from gteopt.publishing.published_card import MeasuredResults, published_card
from gteopt.records.files import record_to_json
from gteopt.records.manifest import FileRecord, Manifest
from gteopt.records.publication import Publication, PublishedFile
from gteopt.records.results_folder import read_results


@dataclass(frozen=True)
class PublicationFolder:
    """A folder that is ready to be published, but not yet written or sent.

    Attributes:
        artifact: the artifact's folder, from which unchanged files are taken.
        files: content of all files, by path.
    """

    artifact: Path
    repo: str
    manifest: Manifest
    terms: LicenseTerms
    measured: MeasuredResults
    files: Mapping[str, hub.UploadContent]


def prepare_publication(
    artifact: Path,
    repo: str,
    *,
    results: Path | None = None,
    license: str | None = None,
    datasets: Mapping[str, str] | None = None,
) -> PublicationFolder:
    """Assemble the folder that `publish` sends. It writes no file and uses no network.

    Args:
        artifact: folder of the artifact; every file is verified.
        repo: `ORG/NAME`.
        results: folder with eval/*.json and, where speed was measured, bench.json.
        license: license of the base; needed when its card states none or one unknown to gteopt.
        datasets: hub data set of each task; `model-index` leaves out tasks that are not listed.

    Raises:
        InputError: no artifact, a bad name, or results of another artifact.
        IntegrityError: a file of the artifact is not what its manifest says.
        UnsupportedError: the base's license forbids to share changed versions.
    """
    hub.check_repo_name(repo)
    read_manifest(artifact)  # refuses a folder that is no artifact, before its license is read
    checkpoint = open_checkpoint(artifact)
    built = checkpoint.manifest
    assert built is not None
    terms = read_license_terms(built.base.id, built.base.license, license)
    source = built.published_from or artifact_sha256(artifact)
    measured = _measured(results, {source, artifact_sha256(artifact)})
    text = published_card(built, checkpoint, repo, terms, measured, datasets or {}).encode()
    record = FileRecord(path=CARD, n_bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    others = [file for file in built.files if file.path != CARD]
    manifest = built.model_copy(
        update={
            "published_from": source,
            "files": tuple(sorted([*others, record], key=lambda file: file.path)),
        }
    )
    described = record_to_json(manifest).encode()
    files = {
        file.path: hub.UploadContent(artifact / file.path, file.n_bytes, file.sha256)
        for file in others
    }
    for path, content in ((CARD, text), (MANIFEST, described)):
        files[path] = hub.UploadContent(content, len(content), hashlib.sha256(content).hexdigest())
    return PublicationFolder(artifact, repo, manifest, terms, measured, dict(sorted(files.items())))


def write_publication(folder: PublicationFolder, out: Path) -> Publication:
    """Write the folder that `publish` would send. Unchanged files are hard links to the artifact's.

    An earlier published folder of the same artifact at `out` is replaced.

    Raises:
        InputError: `out` holds anything else.
    """
    if is_artifact(out) and not out.samefile(folder.artifact):
        earlier_source = read_manifest(out).published_from
        if earlier_source is not None and earlier_source == folder.manifest.published_from:
            remove_artifact(out)
    check_free_folder(out)
    stage = _stage(out, "publish")
    with lock_stage(stage):
        empty_folder(stage)
        for path, content in folder.files.items():
            target = stage / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content.source, bytes):
                target.write_bytes(content.source)
            else:
                _link(content.source, target)
        seal_artifact(stage, out, folder.manifest)
    return _publication(folder, None)


def publish(folder: PublicationFolder, *, private: bool = False) -> Publication:
    """Send a folder in one commit, and create the repository if there is none.

    Files that the repository already has are not sent again. Files of an earlier version of the
    artifact that this version lacks are deleted. All other files of the repository stay.

    Raises:
        InputError: no token, no permission, no network; or the repository holds something other
            than an earlier version of this artifact.
    """
    hub.check_token()
    with _publishing_alone(folder.repo):
        return _publish(folder, private)


def _publish(folder: PublicationFolder, private: bool) -> Publication:
    repository = hub.find_repository(folder.repo) or hub.create_repository(
        folder.repo, private=private
    )
    if private and not repository.private:
        raise InputError(
            f"{folder.repo} exists and is public; make it private on its page on the hub, or leave "
            f"--private out"
        )
    earlier = _earlier_version(repository, folder)
    stale = {file.path for file in earlier.files} if earlier is not None else set()
    recipe, base = folder.manifest.recipe.name, folder.manifest.base.id
    sent = hub.upload_files(repository, folder.files, stale=stale, message=f"{recipe} of {base}")
    return _publication(folder, sent)


@contextmanager
def _publishing_alone(repo: str) -> Iterator[None]:
    """Hold a lock on publishing to a repository, for one user on this machine.

    Without the lock, two processes could each delete files that the other has just sent.

    Raises:
        InputError: another process holds the lock.
    """
    locks = Path(HF_HOME) / "gteopt"
    try:
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{repo.replace('/', '--')}.lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another process is publishing to {repo}; wait until it ends, then publish again"
        ) from error
    except OSError:  # the hub client's folder is read-only, so no process can hold a lock in it
        yield
        return
    try:
        yield
    finally:
        lock.release()


def pull(repo: str, out: Path, *, revision: str | None = None) -> Manifest:
    """Fetch a published artifact, check every file against its hash, and put it at `out`.

    After an interruption, the same call fetches only missing and incomplete files.

    Args:
        repo: `ORG/NAME`.
        out: folder of the artifact; it must not exist yet, or hold the same artifact.
        revision: branch, tag or commit; `main` when left out.

    Raises:
        InputError: no such repository or revision, not an artifact, no network, `out` is taken.
        IntegrityError: a file on the hub does not match its manifest.
    """
    hub.check_repo_name(repo)
    if not is_artifact(out):
        check_free_folder(out)  # before any network request
    repository = hub.find_repository(repo, revision)
    if repository is None:
        raise InputError(hub.missing_repository(repo))
    with TemporaryDirectory() as scratch:
        wanted = _remote_manifest(repository, Path(scratch))
        sha256 = hash_file(Path(scratch, MANIFEST))
    if is_artifact(out) and artifact_sha256(out) == sha256:
        return verify(out)
    check_free_folder(out)
    stage = _stage(out, "pull")
    with lock_stage(stage):
        paths = {MANIFEST, *(file.path for file in wanted.files)}
        _tidy(stage, paths)
        hub.download_files(repository, paths, stage)
        try:
            manifest = verify(stage)
        except IntegrityError as error:
            # Delete the wrong files, so that the next call fetches only them.
            for record in wanted.files:
                path = stage / record.path
                if path.is_file() and hash_file(path) != record.sha256:
                    path.unlink()
            raise IntegrityError(
                f"{repo} at {repository.commit[:12]}: {str(error).partition(': ')[2] or error}; "
                f"the repository was changed after publishing, or the download was damaged; try "
                f"again"
            ) from error
        shutil.rmtree(stage / ".cache", ignore_errors=True)
        rename_stage(stage, out)
    return manifest


def _measured(results: Path | None, hashes: set[str]) -> MeasuredResults:
    """Read the records of the artifact that has one of these hashes.

    Raises:
        InputError: the folder holds records of some kind, but none of this artifact.
    """
    if results is None:
        return MeasuredResults(None, None, "")
    records = read_results(results)
    bench, evals, variants = records.bench, records.evals, records.benched
    own_evals = [report for report in evals.values() if report.artifact_sha256 in hashes]
    own_texts = [r for r in records.fidelity.values() if r.artifact_sha256 in hashes]
    own_names = [name for name, variant in variants.items() if variant.artifact_sha256 in hashes]
    others = {name: report.artifact_sha256 for name, report in evals.items()}
    others |= {name: report.artifact_sha256 for name, report in records.fidelity.items()}
    others |= {name: variant.artifact_sha256 for name, variant in variants.items()}
    problems = []
    if evals and not own_evals:
        problems.append("eval/ scores other artifacts; run `gteopt evaluate` on this one")
    if records.fidelity and not own_texts:
        problems.append("fidelity/ compares other artifacts; run `gteopt evaluate` on this one")
    if variants and not own_names:
        problems.append("bench.json measures other artifacts; run `gteopt bench` on this one")
    if problems:
        wanted = sorted(sha256[:12] for sha256 in hashes)
        problems += [f"it holds {name} ({sha256[:12]})" for name, sha256 in sorted(others.items())]
        subject = f"{results} holds no record of this artifact ({', '.join(wanted)})"
        raise InputError(join_problems(subject, problems))
    return MeasuredResults(
        eval=own_evals[0] if own_evals else None,
        bench=bench if own_names else None,
        name=own_names[0] if own_names else "",
        fidelity=own_texts[0] if own_texts else None,
    )


def _earlier_version(repository: hub.Repository, folder: PublicationFolder) -> Manifest | None:
    """Manifest of the repository's artifact of the same recipe and base; None if it is empty.

    Raises:
        InputError: the repository holds something else.
    """
    if not repository.content:
        return None
    advice = "give another --repo, or delete that repository first"
    if MANIFEST not in repository.files:
        shown = ", ".join(repository.content[:3]) + (", ..." if len(repository.content) > 3 else "")
        raise InputError(f"{repository.id} holds other files and no artifact ({shown}); {advice}")
    with TemporaryDirectory() as scratch:
        earlier = _remote_manifest(repository, Path(scratch))
    new = folder.manifest
    if (new.base.id, new.recipe.name) != (earlier.base.id, earlier.recipe.name):
        raise InputError(
            f"{repository.id} holds another artifact, {earlier.recipe.name} of {earlier.base.id}; "
            f"this is {new.recipe.name} of {new.base.id}; {advice}"
        )
    return earlier


def _remote_manifest(repository: hub.Repository, scratch: Path) -> Manifest:
    if MANIFEST not in repository.files:
        raise InputError(
            f"{repository.id} is not an artifact: it has no {MANIFEST}; use it as a base, or fetch "
            f"it with `hf download {repository.id}`"
        )
    hub.download_files(repository, [MANIFEST], scratch)
    try:
        return read_manifest(scratch)
    except IntegrityError as error:
        raise InputError(
            f"{repository.id}: its {MANIFEST} cannot be read; another version of gteopt wrote it"
        ) from error


def _stage(out: Path, verb: str) -> Path:
    """A working folder next to `out`, which a build of `out` does not use."""
    return stage_folder(out.with_name(f"{out.name}.{verb}"))


def _tidy(stage: Path, paths: set[str]) -> None:
    """Remove incomplete downloads, and files that are not among `paths`."""
    for path in stage.rglob("*"):
        relative = path.relative_to(stage)
        # The hub client notes in `.cache` which files are complete.
        is_note = relative.parts[0] == ".cache" and path.suffix != ".incomplete"
        if path.is_file() and not is_note and relative.as_posix() not in paths:
            path.unlink()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or a file system without hard links
        shutil.copy2(source, target)


def _publication(folder: PublicationFolder, sent: hub.UploadResult | None) -> Publication:
    return Publication(
        schema="gteopt.publication/1",
        repo=folder.repo,
        url=sent.url if sent else None,
        commit=sent.commit if sent else None,
        artifact_sha256=folder.files[MANIFEST].sha256,
        published_from=str(folder.manifest.published_from),
        license=folder.terms.license,
        binds=folder.terms.binds,
        files=tuple(
            PublishedFile(
                path=path,
                n_bytes=content.n_bytes,
                sent=sent is not None and path in sent.sent,
            )
            for path, content in folder.files.items()
        ),
        deleted=sent.deleted if sent else (),
        kept=sent.kept if sent else (),
    )
