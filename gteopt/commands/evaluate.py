"""`gteopt evaluate`: score every source on a suite or on texts, and compare with the baseline.

Hides: the files of a results folder, and sources that give the same vectors. Refuses to know: mteb,
printing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from gteopt.build.fit_vectors import fit_transforms
from gteopt.commands.own_examples import OwnTexts, write_own_examples
from gteopt.config.plan import ColumnRole
from gteopt.config.policy import DEFAULT_MARGIN
from gteopt.config.recipe import CODES_BY_DIMS, VectorCode
from gteopt.corpus.workers import ScoreWorkers
from gteopt.encoder.description import AskedBackend, EncoderDescription, describe_encoder
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.loading import load
from gteopt.errors import GteoptError, InputError, IntegrityError, join_problems, suggest_names
from gteopt.evaluation.compare import BaselineDraws, compare_with_baseline
from gteopt.evaluation.data_check import check_data
from gteopt.evaluation.fidelity import most_changed_texts, score_fidelity, text_digest
from gteopt.evaluation.item_scores_file import write_item_scores
from gteopt.evaluation.runner import (
    ENCODE_OPTIONS,
    SuiteEncodeOptions,
    SuiteRun,
    begin_views,
    run_texts,
    run_views,
)
from gteopt.evaluation.statistics import correct_verdicts
from gteopt.evaluation.stopping import StopRule
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.user_data import read_texts
from gteopt.evaluation.views import View, own_view, view_of
from gteopt.model.artifact import is_artifact, read_manifest
from gteopt.model.checkpoint import NANO, Checkpoint, open_checkpoint
from gteopt.progress import Progress
from gteopt.records.evaluation import Correction, EvalReport, FidelityReport
from gteopt.records.examples import Examples
from gteopt.records.files import read_record, write_record


@dataclass(frozen=True)
class VectorGrid:
    """Dimensions and codes in which every variant is scored, encoded once.

    Attributes:
        dims: numbers of dimensions; empty is only the full number.
        codes: how a vector is stored.
    """

    dims: tuple[int, ...] = ()
    codes: tuple[VectorCode, ...] = ("float32",)


def parse_vector_grid(dims: str | None, codes: str | None) -> VectorGrid:
    """A grid from comma-separated lists; the defaults are full dimensions and float32.

    Raises:
        InputError: a number of dimensions that is not a positive integer, or an unknown code.
    """
    problems = []
    lengths = _listed(dims)
    problems += [
        f"--dims: '{n}' is not a number of dimensions; write 256,128,64"
        for n in lengths
        if not n.isdecimal() or int(n) == 0
    ]
    known = CODES_BY_DIMS
    wanted = _listed(codes) or ["float32"]
    problems += [
        f"--vectors: unknown code '{code}': {suggest_names(code, known)}"
        for code in wanted
        if code not in known
    ]
    if problems:
        raise InputError(join_problems("the grid cannot be scored", problems))
    return VectorGrid(
        dims=tuple(int(n) for n in lengths),
        codes=tuple(code for code in known if code in wanted),
    )


def _listed(names: str | None) -> list[str]:
    """The distinct names in a comma-separated list, in their order."""
    parts = [part.strip() for part in (names or "").split(",")]
    return list(dict.fromkeys(part for part in parts if part))


@dataclass(frozen=True)
class EvaluationSetup:
    """How variants are encoded, and which of their vectors are judged.

    Attributes:
        hub_dir: see `load`.
        device: see `load`.
        dtype: dtype of the computation; see `load`.
        backend: backend of the variants, see `load`; the baseline uses torch. With "auto", the
            backend of a report of the same files in the results folder is used again.
        kernels: kernels of the variants, see `load`; the baseline's are deterministic.
        grid: dimensions and codes to judge; None judges the vectors that each variant makes.
        workers: processes that encode instead of this process on `device`. With a grid, this
            process still loads each variant to fit its transforms.
        options: how texts are encoded and cached.
        asked: see `EvalReport`.
        correction: what the verdicts' error rate covers; see `correct_verdicts`.
        examples: whether own texts whose neighbours changed most are stored as plain text.
        stops: whether a variant's task stops once its verdict is certain.
    """

    hub_dir: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: AskedBackend = "torch"
    kernels: str = "deterministic"
    grid: VectorGrid | None = None
    workers: ScoreWorkers | None = None
    options: SuiteEncodeOptions = ENCODE_OPTIONS
    asked: tuple[str, ...] = ()
    correction: Correction = "family"
    examples: bool = False
    stops: bool = False


def evaluate_suite(
    sources: Mapping[str, str],
    suite: Suite,
    folder: Path | None,
    *,
    how: EvaluationSetup,
    margin: float = DEFAULT_MARGIN,
    progress: Progress,
) -> dict[str, EvalReport]:
    """Scores of every source, compared with the first source, the baseline.

    Verdicts use `margin` and are corrected over all tasks of all variants. With a grid, each
    variant, number of dimensions and code has a report, which is named by the three. The baseline
    is then the first source with its own vectors.

    With a results folder, finished tasks are stored in it and not scored again.

    Raises:
        InputError: the results folder is a file, or sources cannot be opened. All of them are
            listed before anything is encoded.
    """
    _check_folder(folder, how)
    check_data(suite, how.hub_dir)
    backends = _check_all(sources, folder, how)
    reports: dict[str, EvalReport] = {}
    baseline = None
    drawn: BaselineDraws = {}
    own_texts, examples = None, dict[str, Examples]()
    ahead: _Opened | None = None
    for name, next_name in zip(sources, [*list(sources)[1:], None], strict=True):
        opened = ahead
        if opened is None or how.grid is not None:  # a grid is fitted on a loaded model
            own_how = _setup_of(name, sources, backends, how)
            opened = _open(name, sources[name], own_how, progress, ahead=ahead)
        ahead, options = None, opened.options
        if how.workers is not None and next_name is not None and not how.stops:
            # Without a grid, only a model's description is opened, which takes no memory.
            without_grid = replace(_setup_of(next_name, sources, backends, how), grid=None)
            ahead = _open(next_name, sources[next_name], without_grid, progress)
            if not _same_vectors(opened, ahead):  # the same vectors come from the cache
                options = replace(options, start_next=_beginning(ahead, suite, folder, how))
        views, own, notes = opened.views, own_view(opened.encoder, name), opened.notes
        if baseline is None and own.sha256 not in {view.sha256 for view in views.values()}:
            views = {name: own, **views}
        runs = run_views(
            opened.encoder,
            suite,
            list(views.values()),
            hub_dir=how.hub_dir,
            store=_store(folder),
            options=options,
            progress=progress,
            stop=_rule(baseline, how, margin, len(sources)),
        )
        del opened  # two models may not fit into memory
        if baseline is None:
            baseline = next(run for run in runs if run.encoder_sha256 == own.sha256)
            own_texts = OwnTexts(suite, baseline) if how.examples else None
        for done, (row, run) in enumerate(zip(views, runs, strict=True)):
            progress(f"{name}: comparing with {baseline.encoder}", done, len(runs))
            noted_run = replace(run, notes=(*run.notes, *notes))
            report = compare_with_baseline(
                baseline, noted_run, variant_name=row, margin=margin, drawn=drawn
            )
            if folder is not None:
                write_item_scores(folder / "items" / f"{row}.parquet", noted_run, row)
            reports[row] = report.model_copy(update={"asked": how.asked})
            examples |= own_texts.of(run, row) if own_texts else {}
    reports = correct_verdicts(reports, how.correction)
    if folder is not None:
        _write(folder / "eval", reports, examples)
    return reports


def _rule(
    baseline: SuiteRun | None, how: EvaluationSetup, margin: float, n_sources: int
) -> StopRule | None:
    """The rule that stops a variant's tasks; None for the baseline, which is scored fully."""
    if baseline is None or not how.stops:
        return None
    grid = how.grid
    n_rows = n_sources - 1 if grid is None else n_sources * len(grid.codes) * max(1, len(grid.dims))
    n_claims = n_rows * len(baseline.item_scores) if how.correction == "family" else 1
    return StopRule(baseline.item_scores, baseline.encoder_sha256, margin, n_claims)


def evaluate_texts(
    sources: Mapping[str, str],
    file: Path,
    folder: Path | None,
    *,
    how: EvaluationSetup,
    columns: Mapping[ColumnRole, str] | None = None,
    progress: Progress,
) -> dict[str, FidelityReport]:
    """Fidelity of every source to the first source, the baseline, on a user's own texts.

    Texts are encoded as documents without an instruction, into the same cache as a suite's texts.
    With a grid, each variant, number of dimensions and code has a report. The baseline is always
    the first source at full dimensions.

    With `how.examples`, the texts whose neighbours changed most are stored as plain text in
    `examples/` of the results folder. Otherwise, examples of an earlier run are removed.

    Raises:
        InputError: examples without a results folder; or see `evaluate_suite`.
    """
    _check_folder(folder, how)
    backends = _check_all(sources, None, how)
    texts = read_texts(file, columns)
    examples: dict[str, Examples] = {}
    known = {text_digest(text): text for text in texts}
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    reports: dict[str, FidelityReport] = {}
    baseline = None
    for name, source in sources.items():
        opened = _open(name, source, _setup_of(name, sources, backends, how), progress)
        views, own, notes = opened.views, own_view(opened.encoder, name), opened.notes
        run = run_texts(
            opened.encoder, texts, store=_store(folder), options=opened.options, progress=progress
        )
        del opened  # two models may not fit into memory
        baseline = baseline or (own, run.fidelity_sample)
        for done, (row, view) in enumerate(views.items()):
            progress(f"{name}: comparing with {baseline[0].name}", done, len(views))
            reports[row] = FidelityReport(
                variant=row,
                artifact_sha256=view.sha256,
                baseline=baseline[0].name,
                baseline_sha256=baseline[0].sha256,
                texts=file.name,
                texts_sha256=digest,
                dims=view.vectors.dims,
                code=view.vectors.code,
                bytes_per_vector=view.vectors.bytes_per_vector,
                n_asked_texts=run.encodings.n_asked,
                n_encoded_texts=0 if done else run.encodings.n_encoded,
                n_cut_texts=run.encodings.n_cut,
                notes=(*run.notes, *notes),
                fidelity=score_fidelity(baseline[1], run.fidelity_sample, view.vectors),
                machine=run.machine,
                versions=run.versions,
            )
            if how.examples and view.sha256 != baseline[0].sha256:
                examples[row] = Examples(
                    variant=row,
                    artifact_sha256=view.sha256,
                    baseline=baseline[0].name,
                    baseline_sha256=baseline[0].sha256,
                    texts=file.name,
                    examples=most_changed_texts(
                        baseline[1], run.fidelity_sample, view.vectors, known
                    ),
                )
    if folder is not None:
        _write(folder / "fidelity", reports, examples)
    return reports


def _write(
    reports_folder: Path,
    reports: Mapping[str, EvalReport] | Mapping[str, FidelityReport],
    examples: Mapping[str, Examples],
) -> None:
    """Write reports to their folder, and examples to the folder beside it."""
    for name, report in reports.items():
        write_record(reports_folder / f"{name}.json", report)
    write_own_examples(reports_folder.parent, reports, examples)


def _setup_of(
    name: str,
    sources: Mapping[str, str],
    backends: Mapping[str, AskedBackend],
    how: EvaluationSetup,
) -> EvaluationSetup:
    """How a source is encoded. The first is the baseline, which torch encodes deterministically."""
    if name == next(iter(sources)):
        return replace(how, backend="torch", kernels="deterministic")
    return replace(how, backend=backends[name])


def _check_all(
    sources: Mapping[str, str], folder: Path | None, how: EvaluationSetup
) -> dict[str, AskedBackend]:
    """Open every source, so that a damaged or misspelt one is refused before a long evaluation.

    Returns:
        The backend of each. With "auto" it is the one that a report of the same files has, so that
        an evaluation goes on as it began.

    Raises:
        InputError: lists all problems, including reports of another backend that would be lost.
    """
    problems: list[str] = []
    if how.workers is not None and how.kernels != "deterministic":
        problems.append(f"kernels {how.kernels}: several processes need deterministic kernels")
    dims: dict[str, int] = {}
    checkpoints: dict[str, Checkpoint] = {}
    backends: dict[str, AskedBackend] = dict.fromkeys(sources, how.backend)
    for name, source in sources.items():
        try:
            checkpoints[name] = open_checkpoint(source, hub_dir=how.hub_dir)
            dims[name] = checkpoints[name].dims
        except GteoptError as error:
            problems.append(f"{name} ({source}): {error}")
    baseline = next(iter(sources))
    problems += [
        f"{name} has {n} dimensions, the baseline {baseline} has {dims[baseline]}; compare a "
        f"variant with its own base"
        for name, n in dims.items()
        if baseline in dims and n != dims[baseline]
    ]
    for path in sorted((folder / "eval").glob("*.json")) if folder else ():
        with suppress(IntegrityError):  # of an older gteopt, or damaged: it is written again
            old = read_record(path, EvalReport)
            backend = old.versions.get("backend", how.backend)
            row = re.sub(rf"-\d+-({'|'.join(CODES_BY_DIMS)})$", "", old.variant)
            for name in {row, old.variant} & set(list(sources)[1:]):
                if how.backend == "auto":
                    if name in checkpoints and old.artifact_sha256 == checkpoints[name].sha256:
                        backends[name] = cast("AskedBackend", backend)
                elif backend != how.backend:
                    problems.append(
                        f"{path} holds scores of {old.variant} with backend {backend}; remove it, "
                        f"or give another --out for backend {how.backend}"
                    )
    if problems:
        raise InputError(join_problems("the evaluation cannot start", problems))
    return backends


@dataclass(frozen=True)
class _Opened:
    """One source, ready to be judged.

    Attributes:
        views: views of its vectors to judge, by row of the result.
        notes: notes of its workers so far.
    """

    encoder: EncoderDescription
    options: SuiteEncodeOptions
    views: dict[str, View]
    notes: list[str]


def _open(
    name: str,
    source: str,
    how: EvaluationSetup,
    progress: Progress,
    *,
    ahead: _Opened | None = None,
) -> _Opened:
    """Open a source; `ahead` is its description, if workers already encode with it."""
    options, notes = how.options, list[str]()
    device = how.device if how.workers is None else how.workers.device
    opener: Callable[..., EncoderDescription] = partial(load, kernels=how.kernels)
    if how.workers is not None and how.grid is None:
        opener = describe_encoder
    encoder = opener(
        source,
        device=device,
        dtype=how.dtype,
        backend=how.backend,
        hub_dir=how.hub_dir,
    )
    if ahead is not None:
        options, notes = ahead.options, ahead.notes
    elif how.workers is not None:
        encode = how.workers.encoding(
            encoder,
            source,
            hub_dir=how.hub_dir,
            batch_size=options.batch_size,
            say=notes.append,
        )
        options = replace(options, encode=encode, encoded_on=str(how.workers))
    encoder.name = name  # the name in every line of progress and every note
    if (reason := encoder.runtime.backend_reason) is not None:
        notes.append(f"{name} was computed by {encoder.backend}, which auto took: {reason}")
    views = {name: own_view(encoder, name)}
    if how.grid is not None:
        assert isinstance(encoder, Encoder)
        views = _grid_views(encoder, name, how.grid, hub_dir=how.hub_dir, progress=progress)
    return _Opened(encoder, options, views, notes)


def _same_vectors(first: _Opened, second: _Opened) -> bool:
    a, b = first.encoder, second.encoder
    same_files = a.checkpoint.weights_sha256 == b.checkpoint.weights_sha256
    return same_files and a.arithmetic == b.arithmetic


def _beginning(
    opened: _Opened, suite: Suite, folder: Path | None, how: EvaluationSetup
) -> Callable[[], None]:
    return partial(
        begin_views,
        opened.encoder,
        suite,
        hub_dir=how.hub_dir,
        store=_store(folder),
        options=opened.options,
    )


def _check_folder(folder: Path | None, how: EvaluationSetup) -> None:
    if folder is not None and folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder for results")
    if how.examples and folder is None:
        raise InputError("--examples writes texts to the results folder; give --out")


def _store(folder: Path | None) -> Path | None:
    return folder / "scores" if folder else None


def _grid_views(
    encoder: Encoder, name: str, grid: VectorGrid, *, hub_dir: Path | None, progress: Progress
) -> dict[str, View]:
    transforms = fit_transforms(encoder, grid.dims, grid.codes, hub_dir=hub_dir, progress=progress)
    rows = {f"{name}-{transform.dims}-{transform.code}": transform for transform in transforms}
    return {row: view_of(encoder, transform, row) for row, transform in rows.items()}


def find_common_base(sources: Sequence[str]) -> str:
    """The base that all artifacts were made from, as a source for `load`.

    Raises:
        InputError: they have several bases, or the base was a folder whose path is not known.
    """
    bases = set()
    for source in sources:
        folder = Path(source)
        bases.add(read_manifest(folder).base.id if is_artifact(folder) else source)
    if len(bases) > 1:
        raise InputError(
            f"the artifacts have different bases ({', '.join(sorted(bases))}); evaluate them "
            f"separately, or give --baseline"
        )
    base = bases.pop()
    if base != NANO and "/" not in base and not Path(base).is_dir():
        raise InputError(f"the base was a folder named {base}; give its path with --baseline")
    return base
