"""Artifacts to and from the model hub: the published folder, its card, its license, and back.

Hides: how measurements become a card that a reader can check, and what a published folder has that
an artifact has not. Refuses to know: torch, HTTP (`hub` does), how anything was measured.

A published folder is the artifact with a richer README.md, and a manifest that carries the hash of
it and, in `published_from`, the hash of the artifact that was built and measured. Nothing else
differs.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from gteopt.build.card import CARD, card
from gteopt.config.plan import Workload
from gteopt.errors import InputError, IntegrityError, join_problems
from gteopt.model import hub
from gteopt.model.artifact import (
    MANIFEST,
    artifact_sha256,
    check_free,
    discard,
    hash_file,
    is_artifact,
    place,
    read_manifest,
    seal,
    stage_folder,
    verify,
)
from gteopt.model.checkpoint import NANO, Checkpoint, open_checkpoint
from gteopt.publishing.licenses import Terms, read_terms
from gteopt.records.bench import BenchReport, ThroughputRecord
from gteopt.records.evaluation import EvalReport, TaskScore
from gteopt.records.files import to_json
from gteopt.records.manifest import FileRecord, Manifest
from gteopt.records.publication import Publication, PublishedFile
from gteopt.records.results_folder import read_measurements

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Measured:
    """What a results folder says of one artifact; None where that was not measured."""

    eval: EvalReport | None
    bench: BenchReport | None
    name: str


@dataclass(frozen=True)
class Folder:
    """A folder that is ready to be published, not yet written or sent.

    Attributes:
        artifact: where the files come from that it shares with the artifact.
        files: by path, everything that it holds.
    """

    artifact: Path
    repo: str
    manifest: Manifest
    terms: Terms
    measured: Measured
    files: Mapping[str, hub.Content]


def prepare(
    artifact: Path,
    repo: str,
    *,
    results: Path | None = None,
    license: str | None = None,
    datasets: Mapping[str, str] | None = None,
) -> Folder:
    """Put together what `publish` would send; nothing is written and the network is not touched.

    Args:
        artifact: verified file by file.
        repo: `ORG/NAME`.
        results: folder with eval/*.json and, where speed was measured, bench.json.
        license: what the base's license is, where the base does not say or gteopt does not know.
        datasets: by task, its data set on the hub; tasks without one stay out of `model-index`.

    Raises:
        InputError: no artifact, a bad name, or results that are not this artifact's.
        IntegrityError: a file of the artifact is not what its manifest says.
        UnsupportedError: the base's license forbids it.
    """
    hub.check_repo_name(repo)
    read_manifest(artifact)  # a base has none, and is refused before its license is looked at
    checkpoint = open_checkpoint(artifact)
    built = checkpoint.manifest
    assert built is not None
    terms = read_terms(built.base.id, built.base.license, license)
    source = built.published_from or artifact_sha256(artifact)
    measured = _measured(results, {source, artifact_sha256(artifact)})
    text = published_card(built, checkpoint, repo, terms, measured, datasets or {}).encode()
    record = FileRecord(path=CARD, n_bytes=len(text), sha256=hashlib.sha256(text).hexdigest())
    others = [each for each in built.files if each.path != CARD]
    manifest = built.model_copy(
        update={
            "published_from": source,
            "files": tuple(sorted([*others, record], key=lambda each: each.path)),
        }
    )
    described = to_json(manifest).encode()
    files = {
        each.path: hub.Content(artifact / each.path, each.n_bytes, each.sha256) for each in others
    }
    for path, content in ((CARD, text), (MANIFEST, described)):
        files[path] = hub.Content(content, len(content), hashlib.sha256(content).hexdigest())
    return Folder(artifact, repo, manifest, terms, measured, dict(sorted(files.items())))


def write_folder(folder: Folder, out: Path) -> Publication:
    """Write exactly what would be sent; files that the artifact has too share its disk space.

    Raises:
        InputError: `out` holds something other than an earlier one of the same artifact.
    """
    if is_artifact(out) and not out.samefile(folder.artifact):
        there = read_manifest(out).published_from
        if there is not None and there == folder.manifest.published_from:
            discard(out)
    check_free(out)
    stage = _stage(out, "publish")
    discard(stage)
    for path, content in folder.files.items():
        target = stage / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content.source, bytes):
            target.write_bytes(content.source)
        else:
            _link(content.source, target)
    seal(stage, out, folder.manifest)
    return _publication(folder, None)


def publish(folder: Folder, *, private: bool = False) -> Publication:
    """Send it: create the repository where there is none, then one commit of what is not there.

    Files that an earlier version of the artifact had and this one has not are deleted; whatever
    else the owner put beside them stays.

    Raises:
        InputError: no token, no permission, no network; or the repository holds something else
            than an earlier version of this artifact.
    """
    hub.check_token()
    repository = hub.find(folder.repo) or hub.create(folder.repo, private=private)
    if private and not repository.private:
        raise InputError(
            f"{folder.repo} exists and is public; make it private on its page, or leave --private "
            f"out"
        )
    earlier = _earlier_version(repository, folder)
    stale = {each.path for each in earlier.files} if earlier is not None else set()
    recipe, base = folder.manifest.recipe.name, folder.manifest.base.id
    sent = hub.send(repository, folder.files, stale=stale, message=f"{recipe} of {base}")
    return _publication(folder, sent)


def pull(repo: str, out: Path, *, revision: str | None = None) -> Manifest:
    """Bring a published artifact: every file against its hash, then one rename.

    Interrupted, the same call goes on behind the files that are whole.

    Args:
        repo: `ORG/NAME`.
        out: folder of the artifact; must not exist yet, or hold this one.
        revision: branch, tag or commit; `main` when left out.

    Raises:
        InputError: no such repository or revision, not an artifact, no network, `out` is taken.
        IntegrityError: what the hub holds is not what its manifest says.
    """
    hub.check_repo_name(repo)
    if not is_artifact(out):
        check_free(out)  # before anything is asked of the network
    repository = hub.find(repo, revision)
    if repository is None:
        raise InputError(hub.nothing_there(repo))
    with TemporaryDirectory() as scratch:
        wanted = _remote_manifest(repository, Path(scratch))
        name = hash_file(Path(scratch, MANIFEST))
    if is_artifact(out) and artifact_sha256(out) == name:
        return verify(out)
    check_free(out)
    stage = _stage(out, "pull")
    paths = {MANIFEST, *(each.path for each in wanted.files)}
    _tidy(stage, paths)
    hub.fetch(repository, paths, stage)
    try:
        manifest = verify(stage)
    except IntegrityError as error:
        # What is wrong must be fetched again; what is right need not.
        for record in wanted.files:
            path = stage / record.path
            if path.is_file() and hash_file(path) != record.sha256:
                path.unlink()
        raise IntegrityError(
            f"{repo} at {repository.commit[:12]}: {str(error).partition(': ')[2] or error}; "
            f"it was changed after it was published, or damaged on its way: try once more"
        ) from error
    shutil.rmtree(stage / ".cache", ignore_errors=True)
    place(stage, out)
    return manifest


def published_card(
    manifest: Manifest,
    checkpoint: Checkpoint,
    repo: str,
    terms: Terms,
    measured: Measured,
    datasets: Mapping[str, str],
) -> str:
    """README.md of a repository: the artifact's card, its license and what was measured."""
    metadata = _license_metadata(manifest.base.id, terms)
    entries = list(_model_index(measured.eval, datasets)) if measured.eval else []
    if entries:
        name = repo.partition("/")[2]
        metadata["model-index"] = eval_results_to_model_index(name, entries)
    sections = [_license_section(manifest, terms)]
    sections += _quality_sections(measured.eval, repo, manifest)
    sections += _speed_section(measured.bench, measured.name, manifest)
    if measured.eval is None and measured.bench is None:
        sections.append(
            "## Measured\n\nNothing was measured: neither how close this is to the original nor "
            "how fast it runs."
        )
    sections.append(
        "## Limits\n\n" + "\n".join(f"- {each}" for each in _limits(manifest, terms, measured))
    )
    return card(manifest, checkpoint, place=repo, metadata=metadata, findings=sections)


def _measured(results: Path | None, hashes: set[str]) -> Measured:
    """The records of the artifact with one of these hashes.

    Raises:
        InputError: the folder holds records, but none of this artifact.
    """
    if results is None:
        return Measured(None, None, "")
    bench, evals = read_measurements(results)
    found_eval = [each for each in evals.values() if each.artifact_sha256 in hashes]
    variants = bench.variants if bench is not None else {}
    found_bench = [name for name, each in variants.items() if each.artifact_sha256 in hashes]
    others = {name: each.artifact_sha256 for name, each in evals.items()}
    others |= {name: each.artifact_sha256 for name, each in variants.items()}
    problems = []
    if evals and not found_eval:
        problems.append("eval/ scores other artifacts; run `gteopt evaluate` on this one")
    if variants and not found_bench:
        problems.append("bench.json measures other artifacts; run `gteopt bench` on this one")
    if problems:
        here = sorted(each[:12] for each in hashes)
        problems += [f"it knows {name} ({sha256[:12]})" for name, sha256 in sorted(others.items())]
        subject = f"{results} has not this artifact ({', '.join(here)})"
        raise InputError(join_problems(subject, problems))
    return Measured(
        eval=found_eval[0] if found_eval else None,
        bench=bench if found_bench else None,
        name=found_bench[0] if found_bench else "",
    )


def _license_metadata(base: str, terms: Terms) -> dict[str, object]:
    """The license as the hub takes it, which is one that it knows or `other` with a name."""
    if terms.is_known or (terms.is_stated and terms.license != "other"):
        return {"license": terms.license}
    name = f"{base}-license" if terms.license == "other" else terms.license
    found = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name.lower())}
    if "/" in base:
        found["license_link"] = f"https://huggingface.co/{base}"
    return dict(found)


def _license_section(manifest: Manifest, terms: Terms) -> str:
    binds = f": **{terms.binds}**" if terms.binds else ""
    stated = "as the base states" if terms.is_stated else "as its publisher states, not the base"
    changed = (
        "its linear layers are quantized" if manifest.layers else "its weights are as they were"
    )
    if manifest.vectors.method != "full":
        changed += f", its vectors are cut to {manifest.vectors.dims} dimensions"
    return (
        f"## License\n\n`{terms.license}`, {stated}{binds}. This is a changed version of "
        f"`{manifest.base.id}`: {changed}. Its authors made the original, not this."
    )


def _quality_sections(report: EvalReport | None, repo: str, manifest: Manifest) -> Iterator[str]:
    if report is None:
        return
    kept = report.no_retention or ""
    if report.retention is not None:
        kept = f"{report.retention:.1%}"
    if report.retention_low is not None and report.retention_high is not None:
        kept += f" ({report.retention_low:.1%} to {report.retention_high:.1%})"
    close = report.fidelity
    rows = [
        ("mean score", f"{100 * report.score:.2f}, baseline {100 * report.baseline_score:.2f}"),
        ("score kept", kept),
        ("10 nearest neighbours kept", f"{close.neighbour_overlap:.1%}"),
        ("rank correlation of similarities", f"{close.spearman:.4f}"),
        (
            "cosine to the baseline's vectors",
            f"{close.mean_cosine:.5f}, 1st percentile {close.p1_cosine:.5f}",
        ),
    ]
    facts = "\n".join(f"| {name} | {text} |" for name, text in rows)
    yield (
        f"## Quality\n\nSuite `{report.suite}` (SHA-256 `{report.suite_sha256[:16]}`), beside "
        f"{_baseline(report.baseline, report.baseline_sha256, manifest)}, with the same data on "
        f"the same machine ({_versions(report.versions)}). Neighbours and cosines are of "
        f"{close.n_texts:,} texts of the suite, neighbours {close.among}; cosines are before "
        f"vectors are shortened or coded.\n\n| | |\n|---|---|\n{facts}"
    )
    lines = "\n".join(_task_row(each) for each in report.tasks)
    text = (
        f"| task | split | subset | metric | score | baseline | difference |\n"
        f"|---|---|---|---|---|---|---|\n{lines}\n\n"
        f"Scores times 100. Differences with their 95 % interval (paired bootstrap); those within "
        f"{100 * report.margin:g} points count as equivalent."
    )
    if report.partial:
        failed = "\n".join(f"- {each.task}: {each.reason}" for each in report.failed)
        text += f"\n\n**Partial**: means are without what could not be scored.\n\n{failed}"
    yield text
    yield _measured_again(report, repo, manifest.base.id)


def _measured_again(report: EvalReport, repo: str, base: str) -> str:
    """The commands that were given, and what they need that is not in the repository."""
    if not report.asked:
        return f"It was measured from Python, on the suite called `{report.suite}`."
    asked, needs = list(report.asked), []
    given = dict(zip(asked[::2], asked[1::2], strict=True))
    if "/" not in base and base != NANO and "--baseline" not in given:
        given["--baseline"] = base
        asked += ["--baseline", base]
    if (baseline := given.get("--baseline")) and "/" not in baseline and baseline != NANO:
        needs.append(f"`{baseline}` is a folder, with the files of `{report.baseline_sha256[:16]}`")
    if (suite := given.get("--suite", "")).endswith((".yaml", ".yml")):
        needs.append(f"`{suite}` is a file, of the suite named above")
    if data := given.get("--data"):
        own = (each for each in report.tasks if each.task in (data, Path(data).stem))
        digests = sorted({each.dataset_revision.removeprefix("sha256:") for each in own})
        hashes = ", ".join(f"SHA-256 `{each[:16]}`" for each in digests)
        needs.append(f"`{data}` is the publisher's own data ({hashes or 'not scored'})")
    text = (
        f"To measure it again:\n\n```sh\ngteopt pull {repo} --out FOLDER\n"
        f"gteopt evaluate FOLDER {shlex.join(asked)}\n```"
    )
    if needs:
        text += f"\n\nNot in this repository, and needed: {'; '.join(needs)}."
    return text


def _task_row(task: TaskScore) -> str:
    if task.difference is None:
        change = f"{100 * (task.score - task.baseline_score):+.2f}, no interval: {task.no_interval}"
    else:
        found = task.difference
        low, high = 100 * found.low, 100 * found.high
        change = f"{100 * found.value:+.2f} ({low:+.2f} to {high:+.2f}), {found.verdict}"
    score, baseline = f"{100 * task.score:.2f}", f"{100 * task.baseline_score:.2f}"
    cells = (task.task, task.split, task.subset, f"`{task.metric}`", score, baseline, change)
    return f"| {' | '.join(cells)} |"


def _model_index(report: EvalReport, datasets: Mapping[str, str]) -> Iterator[EvalResult]:
    """The hub's form of scores, as MTEB's own cards have them: times 100, aggregates by part.

    Beside a task's score stand the baseline's and the difference, as metrics with types of their
    own: what looks for `cosine_spearman` finds one. The interval is in the difference's `args`.
    """
    for task in report.tasks:
        name, subset = task.task, task.subset
        if name not in datasets and subset in datasets:
            name, subset = subset, "default"
        if name in datasets:
            commit = _COMMIT.fullmatch(task.dataset_revision)
            entry = partial(
                EvalResult,
                task_type=task.task_type,
                dataset_type=datasets[name],
                dataset_name=f"MTEB {name}" + ("" if subset == "default" else f" ({subset})"),
                dataset_config=subset,
                dataset_split=task.split,
                dataset_revision=task.dataset_revision if commit else None,
            )
            yield entry(metric_type=task.metric, metric_value=_points(task.score))
            yield entry(
                metric_type=f"{task.metric}_baseline",
                metric_name=f"{task.metric} of the baseline {report.baseline}",
                metric_value=_points(task.baseline_score),
            )
            if (found := task.difference) is not None:
                low, high = _points(found.low), _points(found.high)
                yield entry(
                    metric_type=f"{task.metric}_difference",
                    metric_name=f"difference from the baseline, 95 % interval {low:+.2f} to "
                    f"{high:+.2f}, {found.verdict}",
                    metric_value=_points(found.value),
                    metric_args={
                        "confidence": 0.95,
                        "low": low,
                        "high": high,
                        "margin": _points(report.margin),
                        "verdict": found.verdict,
                    },
                )


def _points(score: float) -> float:
    return round(100 * score, 4)


def _speed_section(bench: BenchReport | None, name: str, manifest: Manifest) -> Iterator[str]:
    if bench is None:
        return
    mine, base = bench.variants[name], bench.variants[bench.baseline]
    rows = [
        (
            f"{each.workload.name} tokens",
            f"{each.tokens_per_s:,.0f} tokens/s",
            f"{whole.tokens_per_s:,.0f} tokens/s",
            f"{each.baseline_ratio:.2f} x",
        )
        for each, whole in zip(mine.throughput, base.throughput, strict=True)
    ]
    for percentile in ("p50_ms", "p95_ms"):
        ours, theirs = getattr(mine.latency, percentile), getattr(base.latency, percentile)
        what = f"one query of {mine.latency.tokens} tokens, {percentile.removesuffix('_ms')}"
        rows.append((what, f"{ours:.2f} ms", f"{theirs:.2f} ms", f"{theirs / ours:.2f} x"))
    for what, ours, theirs in (
        ("weights in memory", mine.weight_bytes, base.weight_bytes),
        ("peak memory", mine.peak_memory_bytes, base.peak_memory_bytes),
        ("a million vectors", mine.index_bytes_per_million, base.index_bytes_per_million),
    ):
        cells = (f"{ours / 1e6:,.1f} MB", f"{theirs / 1e6:,.1f} MB", f"{ours / theirs:.2f}")
        rows.append((what, *cells))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    legend = "TEXTSxTOKENS in one batch. "
    if any(each.lengths == "lognormal" for each in mine.throughput):
        legend = (
            "TEXTSxTOKENS in one batch; TEXTSx~TOKENS are texts of log-normal lengths of that "
            "median. "
        )
    where = bench.machine.gpu if bench.device != "cpu" else bench.machine.cpu
    kernels = ", ".join(f"{count} x {kernel}" for kernel, count in sorted(mine.kernels.items()))
    yield (
        f"## Speed\n\n| | this | baseline | ratio |\n|---|---|---|---|\n{lines}\n\n{legend}"
        f"Measured in turns with {_baseline(bench.baseline, base.artifact_sha256, manifest)}, on "
        f"{where or bench.device}, {bench.n_threads} threads, "
        f"{bench.machine.memory_bytes / 1e9:.0f} GB, in gteopt (kernels: {kernels or 'none'}; "
        f"{_versions(bench.versions)})."
    )


def _workload(each: ThroughputRecord) -> str:
    return Workload(batch_size=each.batch_size, tokens=each.tokens, lengths=each.lengths).name


def _baseline(name: str, sha256: str, manifest: Manifest) -> str:
    is_base = sha256 == manifest.base.sha256
    what = "the original, unquantized, at full dimension" if is_base else "not the original itself"
    return f"the baseline `{name}` (`{sha256[:16]}`), {what}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _limits(manifest: Manifest, terms: Terms, measured: Measured) -> Iterator[str]:
    if terms.binds is not None:
        yield f"License: {terms.binds}."
    if measured.eval is None:
        yield "Quality was not measured."
    elif measured.eval.partial:
        yield "Some tasks of the suite could not be scored."
    else:
        yield f"Quality is known on the tasks of `{measured.eval.suite}` and not beyond them."
    if measured.bench is None:
        yield "Speed and memory were not measured."
    else:
        yield "Speed holds for that machine and gteopt's kernels; other engines bring their own."
    if manifest.vectors.code != "float32":
        yield (
            f"Scores and neighbours are of {manifest.vectors.code} codes, which only gteopt makes "
            f"from this folder; other engines give float vectors."
        )
    if any(each.scheme.activation_bits == 8 for each in manifest.layers):
        yield "Engines that leave activations in full precision give slightly other vectors."


def _earlier_version(repository: hub.Repository, folder: Folder) -> Manifest | None:
    """What the repository holds of this artifact: the same recipe's name and base; None where it is
    empty.

    Raises:
        InputError: the repository holds something else.
    """
    if not repository.content:
        return None
    advice = "give another --repo, or delete that one first"
    if MANIFEST not in repository.files:
        shown = ", ".join(repository.content[:3]) + (", ..." if len(repository.content) > 3 else "")
        raise InputError(f"{repository.id} holds other files and no artifact ({shown}); {advice}")
    with TemporaryDirectory() as scratch:
        there = _remote_manifest(repository, Path(scratch))
    ours, theirs = folder.manifest, there
    if (ours.base.id, ours.recipe.name) != (theirs.base.id, theirs.recipe.name):
        raise InputError(
            f"{repository.id} holds another artifact, {theirs.recipe.name} of {theirs.base.id}; "
            f"this is {ours.recipe.name} of {ours.base.id}; {advice}"
        )
    return theirs


def _remote_manifest(repository: hub.Repository, scratch: Path) -> Manifest:
    if MANIFEST not in repository.files:
        raise InputError(
            f"{repository.id} is not an artifact: it has no {MANIFEST}; use it as a base, or fetch "
            f"it with `hf download {repository.id}`"
        )
    hub.fetch(repository, [MANIFEST], scratch)
    try:
        return read_manifest(scratch)
    except IntegrityError as error:
        raise InputError(
            f"{repository.id}: its {MANIFEST} cannot be read; another version of gteopt wrote it"
        ) from error


def _stage(out: Path, verb: str) -> Path:
    """A folder of our own: a build that was interrupted on its way to `out` keeps its stage."""
    return stage_folder(out.with_name(f"{out.name}.{verb}"))


def _tidy(stage: Path, paths: set[str]) -> None:
    """Remove what an earlier attempt left: pieces nobody goes on with, files of another commit."""
    for path in stage.rglob("*"):
        relative = path.relative_to(stage)
        is_note = relative.parts[0] == ".cache" and path.suffix != ".incomplete"
        if path.is_file() and not is_note and relative.as_posix() not in paths:
            path.unlink()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _publication(folder: Folder, sent: hub.Sent | None) -> Publication:
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
                n_bytes=each.n_bytes,
                sent=sent is not None and path in sent.sent,
            )
            for path, each in folder.files.items()
        ),
        deleted=sent.deleted if sent else (),
        kept=sent.kept if sent else (),
    )
