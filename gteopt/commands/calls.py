"""`gteopt.bench`, `evaluate` and `choose`: the commands of these names as Python calls.

Hides: names of artifacts, defaults. Refuses to know: printing, how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gteopt.commands.bench import BenchReportFile, bench_to_file
from gteopt.commands.choose import choose_by_policy
from gteopt.commands.evaluate import EvaluationSetup, find_common_base
from gteopt.commands.judges import Judges, evaluate_on_judges
from gteopt.commands.names import name_sources
from gteopt.config.plan import BenchSpec
from gteopt.config.policy import DEFAULT_MARGIN, Policy, load_policy
from gteopt.encoder.description import AskedBackend
from gteopt.errors import InputError
from gteopt.progress import Progress, ignore_progress
from gteopt.records.bench import BenchReport
from gteopt.records.choice import Choice
from gteopt.records.evaluation import EvalReport, FidelityReport

Artifacts = str | Path | Sequence[str | Path]


def bench(
    artifacts: Artifacts,
    *,
    baseline: str | Path | None = None,
    spec: BenchSpec | None = None,
    out: str | Path | None = None,
    hub_dir: Path | None = None,
    device: str = "auto",
    backend: AskedBackend = "torch",
    kernels: str = "deterministic",
    progress: Progress = ignore_progress,
) -> BenchReport:
    """Speed and memory of artifacts, each interleaved with the baseline.

    Args:
        artifacts: one or more artifacts or bases.
        baseline: baseline of the ratios; the first artifact when None.
        spec: what to measure; single queries and short batches when None.
        out: results folder, whose bench.json is extended; nothing is written when None.
        hub_dir: see `load`.
        device: see `load`.
        backend: see `load`.
        kernels: kernels of the variants, see `load`; the baseline's are deterministic.
        progress: receives the progress of each variant.

    Raises:
        InputError: two artifacts have the same name; or see `load`.

    Example:
        >>> report = gteopt.bench("artifacts/nano-int4", baseline="nano", out="artifacts/results")
    """
    sources = name_sources([*([] if baseline is None else [str(baseline)]), *_listed(artifacts)])
    return bench_to_file(
        sources,
        spec or BenchSpec(),
        BenchReportFile(None if out is None else Path(out)),
        baseline=next(iter(sources)),
        hub_dir=hub_dir,
        skip_too_long=spec is None,
        device=device,
        backend=backend,
        kernels=kernels,
        progress=progress,
    )


def evaluate(
    artifacts: Artifacts,
    judges: Judges,
    *,
    baseline: str | Path | None = None,
    margin: float = DEFAULT_MARGIN,
    out: str | Path | None = None,
    how: EvaluationSetup | None = None,
    progress: Progress = ignore_progress,
) -> dict[str, EvalReport] | dict[str, FidelityReport]:
    """Scores of artifacts on labels, or their closeness to the baseline on texts, by name.

    Args:
        artifacts: one or more artifacts.
        judges: a suite, labelled data, or texts without labels.
        baseline: the base to compare with; the artifacts' own base when None.
        margin: a difference of scores (0 to 1) that does not matter.
        out: results folder; with one, an interrupted call can be resumed.
        how: how texts are encoded; on this machine when None.
        progress: receives the progress of encoding.

    Raises:
        InputError: nothing to evaluate on, data that cannot be read, or two artifacts of one name.

    Example:
        >>> judges = gteopt.Judges(data="tickets.csv")
        >>> reports = gteopt.evaluate("artifacts/nano-int4", judges, out="artifacts/results")
    """
    if judges.data is None and judges.texts is None and judges.suite is None:
        raise InputError("nothing to evaluate on; give Judges a suite, data or texts")
    if not 0 < margin < 1:
        raise InputError(f"margin {margin:g}: give a difference of scores, between 0 and 1")
    how = how or EvaluationSetup()
    judges = judges.located(how.hub_dir)  # before the artifacts are read
    listed = _listed(artifacts)
    sources = name_sources(
        [str(baseline) if baseline is not None else find_common_base(listed), *listed]
    )
    folder = None if out is None else Path(out)
    evals, fidelity = evaluate_on_judges(
        judges, sources, folder, how=how, margin=margin, progress=progress
    )
    return evals if judges.texts is None else fidelity


def choose(results: str | Path, policy: str | Policy = "balanced") -> Choice:
    """The variant that a policy picks from a results folder, and why, without new measurements.

    Args:
        results: results folder of `bench`, `evaluate` or a plan; the choice is written to it.
        policy: a shipped name, a YAML file, or a policy.

    Raises:
        InputError: an unknown policy, or a folder without measurements.
        IntegrityError: a damaged record.

    Example:
        >>> gteopt.choose("artifacts/results", "smallest-index").picked
    """
    if not isinstance(policy, Policy):
        policy = load_policy(policy)
    judged = choose_by_policy(Path(results), policy)
    assert judged.choice is not None
    return judged.choice


def _listed(artifacts: Artifacts) -> list[str]:
    listed = [artifacts] if isinstance(artifacts, str | Path) else artifacts
    return [str(artifact) for artifact in listed]
