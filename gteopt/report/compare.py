"""Compare two artifacts or two results folders, as rows of one table.

Refuses to know: files, torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.filesize import decimal

from gteopt.config.engines import Engine
from gteopt.records.evaluation import ItemComparison
from gteopt.records.manifest import Manifest
from gteopt.records.results_folder import Results
from gteopt.report.rows import COLUMNS, names_in_mean, result_rows


def comparison_rows(
    names: tuple[str, str],
    manifests: Sequence[Manifest],
    results: Sequence[Results],
    engines: Sequence[Sequence[Engine]] = (),
) -> list[dict[str, str]]:
    """One row per fact that both artifacts have, or per figure of either folder.

    Args:
        names: headings of the two columns.
        manifests: manifests of two artifacts; empty for results folders.
        results: contents of two results folders.
        engines: engines that open each artifact.
    """
    if manifests:
        facts = [
            _artifact_facts(manifest, openers)
            for manifest, openers in zip(manifests, engines, strict=True)
        ]
        return [{"": fact, names[0]: facts[0][fact], names[1]: facts[1][fact]} for fact in facts[0]]
    compared: list[dict[str, str]] = []
    lines = [{row.name: row for row in result_rows(folder)} for folder in results]
    for variant in dict.fromkeys(name for by_name in lines for name in by_name):
        for column in COLUMNS:
            cells = [
                column.text(by_name[variant]) if variant in by_name else "-" for by_name in lines
            ]
            if any(cell not in ("-", "\u2013") for cell in cells):
                heading = f"{variant}: {column.title} {column.unit}".strip()
                compared.append({"": heading, names[0]: cells[0], names[1]: cells[1]})
    return compared


def item_rows(items: Mapping[str, ItemComparison], names: tuple[str, str]) -> list[dict[str, str]]:
    """One row per variant: both scores, and their difference in points with its 95 % interval."""
    compared = []
    for name, comparison in items.items():
        difference = comparison.difference
        row = {
            "variant": name,
            f"score of {names[0]}": f"{100 * comparison.baseline_score:.2f}",
            f"score of {names[1]}": f"{100 * comparison.score:.2f}",
            "tasks": str(len(names_in_mean(comparison.tasks))),
            "difference, 95 % interval": "no interval",
            "verdict": "-",
        }
        if difference is not None:
            ends = f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}"
            row["difference, 95 % interval"] = f"{100 * difference.value:+.2f} ({ends})"
            row["verdict"] = difference.verdict
        compared.append(row)
    return compared


def _artifact_facts(manifest: Manifest, engines: Sequence[Engine]) -> dict[str, str]:
    base, vectors = manifest.base, manifest.vectors
    bits = [layer.bits_per_weight for layer in manifest.layers]
    return {
        "base": f"{base.id} ({base.sha256[:12]})",
        "recipe": manifest.recipe.name,
        "weights": decimal(manifest.weight_bytes, precision=2),
        "share of the base": f"{manifest.weight_bytes / base.weight_bytes:.0%}",
        "bits a weight": f"{sum(bits) / len(bits):.2f}" if bits else "16",
        "vectors": f"{vectors.dims} x {vectors.code}",
        "bytes a vector": f"{vectors.bytes_per_vector:,}",
        "format": manifest.format or "not quantized",
        "opened by": ", ".join(engines),
    }
