"""`gteopt compare`: compare two artifacts or two results folders.

Hides: which of the two kinds a source is. Refuses to know: printing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from gteopt.commands.evaluate import EvaluationSetup
from gteopt.commands.judges import Judges, evaluate_on_judges
from gteopt.commands.names import name_pair
from gteopt.config.engines import Engine
from gteopt.encoder.engines import engines_of_artifact
from gteopt.errors import GteoptError, InputError
from gteopt.evaluation.compare import compare_item_scores
from gteopt.model.artifact import is_artifact, read_manifest
from gteopt.model.checkpoint import describe_artifact
from gteopt.progress import Progress, ignore_progress
from gteopt.records.evaluation import EvalReport, FidelityReport, ItemComparison
from gteopt.records.manifest import Manifest
from gteopt.records.results_folder import Results, read_results


@dataclass(frozen=True)
class Comparison:
    """Two artifacts or two results folders side by side; fields that do not apply are empty.

    Attributes:
        names: names of the two, never the same.
        manifests: manifests of two artifacts.
        engines: engines that open each artifact.
        evals: scores of the second artifact with the first as baseline; differences have paired
            intervals.
        fidelity: closeness of the second artifact to the first on texts.
        results: results of two folders.
        items: comparisons of variants with the same name in both folders, with the first folder as
            baseline; differences have paired intervals from the stored item scores.
        notes: variants of both folders that could not be compared this way, with the reason.
    """

    names: tuple[str, str]
    manifests: tuple[Manifest, ...] = ()
    engines: tuple[tuple[Engine, ...], ...] = ()
    evals: dict[str, EvalReport] = field(default_factory=dict)
    fidelity: dict[str, FidelityReport] = field(default_factory=dict)
    results: tuple[Results, ...] = ()
    items: dict[str, ItemComparison] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare(
    first: str | Path,
    second: str | Path,
    judges: Judges | None = None,
    *,
    how: EvaluationSetup | None = None,
    progress: Progress = ignore_progress,
) -> Comparison:
    """Compare two artifacts or two results folders.

    Args:
        first: an artifact folder or a results folder.
        second: another one of the same kind.
        judges: data on which the second artifact is scored against the first. Without them, only
            manifests and settings are read, and no weights.
        how: how texts are encoded.
        progress: receives the progress of encoding.

    Raises:
        InputError: neither two artifacts nor two results folders; data that cannot be read.
        IntegrityError: a manifest is damaged; with `judges`, an artifact was altered.

    Example:
        >>> gteopt.compare("artifacts/nano-int4", "artifacts/nano-int8")
    """
    sources = [Path(first), Path(second)]
    names = name_pair(*sources)
    if all(is_artifact(source) for source in sources):
        manifests = tuple(read_manifest(source) for source in sources)
        engines = tuple(engines_of_artifact(describe_artifact(source)) for source in sources)
        compared = Comparison(names, manifests, engines)
        if judges is None:
            return compared
        by_name = {name: str(source) for name, source in zip(names, sources, strict=True)}
        evals, fidelity = evaluate_on_judges(
            judges, by_name, None, how=how or EvaluationSetup(), progress=progress
        )
        return replace(compared, evals=evals, fidelity=fidelity)
    if any(is_artifact(source) for source in sources):
        raise InputError(
            f"{first} and {second}: only one is an artifact; give two artifacts or two results "
            f"folders"
        )
    items, notes = _from_items(sources[0] / "items", sources[1] / "items")
    results = tuple(read_results(source) for source in sources)
    return Comparison(names, results=results, items=items, notes=tuple(notes))


def _from_items(first: Path, second: Path) -> tuple[dict[str, ItemComparison], list[str]]:
    """Comparisons of the variants whose item scores both folders hold, and notes of failures."""
    comparisons: dict[str, ItemComparison] = {}
    notes = []
    for path in sorted(second.glob("*.parquet")):
        if not (first / path.name).is_file():
            continue
        try:
            comparisons[path.stem] = compare_item_scores(first / path.name, path)
        except GteoptError as error:
            notes.append(f"{path.stem}: no interval, because {error}")
    return comparisons, notes
