"""Write the README.md of a published artifact: its card, its license and its measured results.

Hides: the card's wording, the hub's `model-index`. Refuses to know: the network, files.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

from gteopt.build.card import render_card
from gteopt.model.checkpoint import NANO, Checkpoint
from gteopt.publishing.licenses import LicenseTerms
from gteopt.records.bench import BenchReport
from gteopt.records.evaluation import EvalReport, Fidelity, FidelityReport, TaskScore
from gteopt.records.manifest import Manifest

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class MeasuredResults:
    """The records of one artifact; None for a record that does not exist.

    Attributes:
        name: the artifact's name in `bench`; empty where it was not measured.
    """

    eval: EvalReport | None
    bench: BenchReport | None
    name: str
    fidelity: FidelityReport | None = None


def published_card(
    manifest: Manifest,
    checkpoint: Checkpoint,
    repo: str,
    terms: LicenseTerms,
    measured: MeasuredResults,
    datasets: Mapping[str, str],
) -> str:
    """The text of README.md: the artifact's card, its license and its measured results.

    Args:
        manifest: the artifact's manifest.
        checkpoint: the opened artifact.
        repo: `ORG/NAME`, for commands and links.
        terms: the license of the artifact.
        measured: the artifact's records.
        datasets: hub data set of each task; `model-index` leaves out tasks that are not listed.
    """
    metadata = _license_metadata(manifest.base.id, terms)
    entries = list(_model_index(measured.eval, datasets)) if measured.eval else []
    if entries:
        name = repo.partition("/")[2]
        metadata["model-index"] = eval_results_to_model_index(name, entries)
    sections = [_license_section(manifest, terms)]
    sections += _quality_sections(measured.eval, repo, manifest)
    sections += _fidelity_section(measured.fidelity, repo, manifest)
    sections += _speed_section(measured.bench, measured.name, manifest)
    if measured.eval is None and measured.bench is None and measured.fidelity is None:
        sections.append(
            "## Measured\n\nNothing was measured: neither how close this is to the original nor "
            "how fast it runs."
        )
    sections.append(
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(manifest, terms, measured))
    )
    return render_card(manifest, checkpoint, place=repo, metadata=metadata, findings=sections)


def _license_metadata(base: str, terms: LicenseTerms) -> dict[str, object]:
    """The hub's license metadata: a license that the hub knows, or `other` with a name."""
    if terms.is_known or (terms.is_stated and terms.license != "other"):
        return {"license": terms.license}
    name = f"{base}-license" if terms.license == "other" else terms.license
    metadata = {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", name.lower())}
    if "/" in base:
        metadata["license_link"] = f"https://huggingface.co/{base}"
    return dict(metadata)


def _license_section(manifest: Manifest, terms: LicenseTerms) -> str:
    binds = f": **{terms.binds}**" if terms.binds else ""
    source = "stated by the base" if terms.is_stated else "stated by the publisher, not by the base"
    changed = "its linear layers are quantized" if manifest.layers else "its weights are unchanged"
    if manifest.vectors.method != "full":
        changed += f", its vectors are cut to {manifest.vectors.dims} dimensions"
    return (
        f"## License\n\n`{terms.license}`, {source}{binds}. This is a changed version of "
        f"`{manifest.base.id}`: {changed}. The authors of the original did not make this version."
    )


def _quality_sections(report: EvalReport | None, repo: str, manifest: Manifest) -> Iterator[str]:
    if report is None:
        return
    kept = report.no_retention or ""
    if report.retention is not None:
        kept = f"{report.retention:.1%}"
    if report.retention_low is not None and report.retention_high is not None:
        kept += f" ({report.retention_low:.1%} to {report.retention_high:.1%})"
    fidelity = report.fidelity
    rows = [
        ("mean score", f"{100 * report.score:.2f}, baseline {100 * report.baseline_score:.2f}"),
        ("score kept", kept),
    ]
    facts = _facts([*rows, *_closeness(fidelity)])
    yield (
        f"## Quality\n\nScores on the suite `{report.suite}` (SHA-256 "
        f"`{report.suite_sha256[:16]}`), compared with "
        f"{_baseline(report.baseline, report.baseline_sha256, manifest)}. Both used the same data "
        f"and the same machine ({_versions(report.versions)}). Neighbours and cosines are measured "
        f"on {fidelity.n_texts:,} texts of the suite: neighbours {fidelity.among}. Cosines compare "
        f"stored vectors with the baseline's; left-out dimensions count as 0.\n\n{facts}"
    )
    lines = "\n".join(_task_row(task) for task in report.tasks)
    text = (
        f"| task | split | subset | metric | score | baseline | difference |\n"
        f"|---|---|---|---|---|---|---|\n{lines}\n\n"
        f"Scores are times 100. Differences have a 95 % interval (paired bootstrap); a difference "
        f"within {100 * report.margin:g} points counts as equivalent."
    )
    if report.partial:
        failed = "\n".join(f"- {task.task}: {task.reason}" for task in report.failed)
        text += f"\n\n**Partial**: means leave out the tasks that could not be scored.\n\n{failed}"
    yield text
    yield _measured_again(report, repo, manifest.base.id)


def _closeness(fidelity: Fidelity) -> list[tuple[str, str]]:
    return [
        ("10 nearest neighbours kept", f"{fidelity.neighbour_overlap:.1%}"),
        ("rank correlation of similarities", f"{fidelity.spearman:.4f}"),
        (
            "cosine to the baseline's vectors",
            f"{fidelity.mean_cosine:.5f}, 1st percentile {fidelity.p1_cosine:.5f}",
        ),
    ]


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    lines = "\n".join(f"| {name} | {text} |" for name, text in rows)
    return f"| | |\n|---|---|\n{lines}"


def _fidelity_section(
    report: FidelityReport | None, repo: str, manifest: Manifest
) -> Iterator[str]:
    """The section on closeness to the baseline, measured on texts without labels."""
    if report is None:
        return
    baseline = _baseline(report.baseline, report.baseline_sha256, manifest)
    yield (
        f"## Closeness\n\nNo labels were used. The figures say how close the vectors are to the "
        f"vectors of {baseline}. They do not say how well either model finds answers. The "
        f"publisher compared {report.fidelity.n_texts:,} texts (`{report.texts}`, SHA-256 "
        f"`{report.texts_sha256[:16]}`): neighbours {report.fidelity.among} "
        f"({_versions(report.versions)}).\n\n{_facts(_closeness(report.fidelity))}"
    )
    base = manifest.base.id
    option = "" if base == NANO or "/" in base else f" --baseline {shlex.quote(base)}"
    yield (
        f"To compare it on your own texts:\n\n```sh\ngteopt pull {repo} --out FOLDER\n"
        f"gteopt evaluate FOLDER --texts texts.txt{option}\n```"
    )


def _measured_again(report: EvalReport, repo: str, base: str) -> str:
    """The commands that measure it again, and the files they need that the repository lacks."""
    if not report.asked:
        return f"It was measured from Python, on the suite named `{report.suite}`."
    asked, needs = list(report.asked), []
    given = dict(zip(asked[::2], asked[1::2], strict=True))
    if "/" not in base and base != NANO and "--baseline" not in given:
        given["--baseline"] = base
        asked += ["--baseline", base]
    if (baseline := given.get("--baseline")) and "/" not in baseline and baseline != NANO:
        digest = report.baseline_sha256[:16]
        needs.append(f"`{baseline}` is the folder of the baseline (SHA-256 `{digest}`)")
    if (suite := given.get("--suite", "")).endswith((".yaml", ".yml")):
        needs.append(f"`{suite}` is the file of the suite named above")
    if data := given.get("--data"):
        on_data = (task for task in report.tasks if task.task in (data, Path(data).stem))
        digests = sorted({task.dataset_revision.removeprefix("sha256:") for task in on_data})
        hashes = ", ".join(f"SHA-256 `{digest[:16]}`" for digest in digests)
        needs.append(f"`{data}` is the publisher's own data ({hashes or 'not scored'})")
    text = (
        f"To measure it again:\n\n```sh\ngteopt pull {repo} --out FOLDER\n"
        f"gteopt evaluate FOLDER {shlex.join(asked)}\n```"
    )
    if needs:
        text += f"\n\nThese files are needed and not in this repository: {'; '.join(needs)}."
    return text


def _task_row(task: TaskScore) -> str:
    if task.difference is None:
        change = f"{100 * (task.score - task.baseline_score):+.2f}, no interval: {task.no_interval}"
    else:
        difference = task.difference
        low, high = 100 * difference.low, 100 * difference.high
        change = f"{100 * difference.value:+.2f} ({low:+.2f} to {high:+.2f}), {difference.verdict}"
    score, baseline = f"{100 * task.score:.2f}", f"{100 * task.baseline_score:.2f}"
    if task.sequential is not None and task.is_stopped:
        change += f", stopped after {task.sequential.n_scored:,} of {task.sequential.n_all:,}"
    cells = (task.task, task.split, task.subset, f"`{task.metric}`", score, baseline, change)
    return f"| {' | '.join(cells)} |"


def _model_index(report: EvalReport, datasets: Mapping[str, str]) -> Iterator[EvalResult]:
    """Entries of the hub's `model-index`, with scores times 100 as on MTEB's own cards.

    Each task has its score, the baseline's score and the difference. Each has its own metric
    type, so that leaderboards find one value of `cosine_spearman`. The interval is in the
    difference's `args`.
    """
    for task in report.tasks:
        if task.is_stopped:  # a score of only some items is not comparable with other scores
            continue
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
            if (difference := task.difference) is not None:
                low, high = _points(difference.low), _points(difference.high)
                yield entry(
                    metric_type=f"{task.metric}_difference",
                    metric_name=f"difference from the baseline, 95 % interval {low:+.2f} to "
                    f"{high:+.2f}, {difference.verdict}",
                    metric_value=_points(difference.value),
                    metric_args={
                        "confidence": 0.95,
                        "low": low,
                        "high": high,
                        "margin": _points(report.margin),
                        "verdict": difference.verdict,
                    },
                )


def _points(score: float) -> float:
    return round(100 * score, 4)


def _speed_section(bench: BenchReport | None, name: str, manifest: Manifest) -> Iterator[str]:
    if bench is None:
        return
    variant, base = bench.variants[name], bench.variants[bench.baseline]
    rows = [
        (
            f"{speed.workload.name} tokens",
            f"{speed.tokens_per_s:,.0f} tokens/s",
            f"{base_speed.tokens_per_s:,.0f} tokens/s",
            f"{speed.baseline_ratio:.2f} x",
        )
        for speed, base_speed in zip(variant.throughput, base.throughput, strict=True)
    ]
    for percentile in ("p50_ms", "p95_ms"):
        ms, base_ms = getattr(variant.latency, percentile), getattr(base.latency, percentile)
        label = f"one query of {variant.latency.tokens} tokens, {percentile.removesuffix('_ms')}"
        rows.append((label, f"{ms:.2f} ms", f"{base_ms:.2f} ms", f"{base_ms / ms:.2f} x"))
    for label, n_bytes, base_bytes in (
        ("weights in memory", variant.weight_bytes, base.weight_bytes),
        ("peak memory", variant.peak_memory_bytes, base.peak_memory_bytes),
        ("a million vectors", variant.index_bytes_per_million, base.index_bytes_per_million),
    ):
        ratio = f"{n_bytes / base_bytes:.2f}"
        rows.append((label, f"{n_bytes / 1e6:,.1f} MB", f"{base_bytes / 1e6:,.1f} MB", ratio))
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    legend = "A row TEXTSxTOKENS is one batch. "
    if any(speed.lengths == "lognormal" for speed in variant.throughput):
        legend += "In TEXTSx~TOKENS, lengths are log-normal and TOKENS is their median. "
    processor = bench.machine.gpu if bench.device != "cpu" else bench.machine.cpu
    kernels = ", ".join(f"{count} x {kernel}" for kernel, count in sorted(variant.kernels.items()))
    yield (
        f"## Speed\n\n| | this | baseline | ratio |\n|---|---|---|---|\n{lines}\n\n{legend}"
        f"Measured in turns with {_baseline(bench.baseline, base.artifact_sha256, manifest)}, on "
        f"{processor or bench.device}, {bench.n_threads} threads, "
        f"{bench.machine.memory_bytes / 1e9:.0f} GB, in gteopt (kernels: {kernels or 'none'}; "
        f"{_versions(bench.versions)})."
    )


def _baseline(name: str, sha256: str, manifest: Manifest) -> str:
    is_base = sha256 == manifest.base.sha256
    kind = "the original, unquantized, at full dimension" if is_base else "not the original itself"
    return f"the baseline `{name}` (`{sha256[:16]}`), {kind}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _limits(manifest: Manifest, terms: LicenseTerms, measured: MeasuredResults) -> Iterator[str]:
    if terms.binds is not None:
        yield f"License: {terms.binds}."
    if measured.eval is None and measured.fidelity is not None:
        yield "Quality was not measured on labels; only closeness to the baseline was measured."
    elif measured.eval is None:
        yield "Quality was not measured."
    elif measured.eval.partial:
        yield "Some tasks of the suite could not be scored."
    else:
        yield f"Quality is known only for the tasks of `{measured.eval.suite}`."
    if measured.bench is None:
        yield "Speed and memory were not measured."
    else:
        yield "Speed holds for that machine and gteopt's kernels; other engines use other kernels."
    if manifest.vectors.code != "float32":
        yield (
            f"Scores and neighbours were measured on {manifest.vectors.code} codes. Only gteopt "
            f"makes these codes from this folder; other engines give float vectors."
        )
    if any(layer.scheme.activation_bits == 8 for layer in manifest.layers):
        yield (
            "Engines that compute with activations in full precision give slightly different "
            "vectors."
        )
