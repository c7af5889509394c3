"""Measure what calibration texts are worth, on kinds of text from other sources.

Builds a recipe with different calibration texts and prints the error of each kind of text. One JSON
holds all rows. A run replaces the rows that it measures:

    .venv/bin/python benchmarks/calibration_curve.py --hub-dir ../shared/hub \
        --beir ../shared/beir/cranfield --n-texts 64 128 256 512 \
        --out benchmarks/results/calibration_curve.json

The error is 1 - mean cosine to the float32 original.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from model_folders import model_folder
from results_files import conditions, write_results
from text_kinds import ONE_SOURCE, encode_kinds, judged_texts, kind_errors, mean_and_worst

import gteopt
from gteopt.config.recipe import Calibration, load_recipe
from gteopt.speed.clock import Stopwatch


@dataclass(frozen=True)
class Row:
    """One recipe with one set of calibration texts on one model.

    Attributes:
        errors: kind -> 1 - mean cosine.
        cpu_s: CPU time of the build.
    """

    model: str
    recipe: str
    calibration: str
    n_tokens: int
    errors: dict[str, float]
    mean: float
    worst: float
    cpu_s: float


def main() -> None:
    """Measure the combinations that the options name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--hub-dir", type=Path, required=True)
    parser.add_argument("--beir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["all-MiniLM-L6-v2", "gte-nano"])
    parser.add_argument("--recipes", nargs="+", default=["gptq-int4"])
    parser.add_argument("--n-texts", nargs="*", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument(
        "--files", nargs="*", type=Path, default=[], help="files of calibration texts"
    )
    parser.add_argument("--stsb", action="store_true", help="calibrate on STS-B too")
    parser.add_argument("--label", default="", help="put before the names of rows")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    texts = judged_texts(options.hub_dir, options.beir)
    specs = {
        f"{options.label}builtin, {n} texts": Calibration(n_texts=n, max_tokens=options.max_tokens)
        for n in options.n_texts
    }
    for file in options.files:
        specs[f"{options.label}{file.name}"] = Calibration(texts=str(file))
    if options.stsb:
        specs[f"{options.label}STS-B, 256 sentences"] = ONE_SOURCE
    rows: list[Row] = []
    if options.out and options.out.is_file():
        rows = [Row(**row) for row in json.loads(options.out.read_text())["rows"]]
    print(f"{'':50}{'tokens':>8}{'CPU s':>7}{'mean':>9}{'worst':>9}  " + "  ".join(texts))
    for model in options.models:
        source = model_folder(model)
        reference = encode_kinds(gteopt.load(source, dtype="float32"), texts)
        for name in options.recipes:
            for label, spec in specs.items():
                folder = Path(tempfile.mkdtemp())
                recipe = load_recipe(name).model_copy(update={"calibration": spec})
                watch = Stopwatch()
                manifest = gteopt.quantize(
                    source, recipe, folder / "out", hub_dir=options.hub_dir, dtype="float32"
                )
                cpu_s = watch.cpu_s
                kinds = kind_errors(reference, encode_kinds(gteopt.load(folder / "out"), texts))
                shutil.rmtree(folder)
                assert manifest.calibration is not None
                mean, worst, _ = mean_and_worst(kinds)
                errors = {kind: error.error for kind, error in kinds.items()}
                n_tokens = manifest.calibration.n_tokens
                row = Row(model, name, label, n_tokens, errors, mean, worst, cpu_s)
                print(show(row), flush=True)
                key = (model, name, label)
                rows = [r for r in rows if (r.model, r.recipe, r.calibration) != key] + [row]
                if options.out:
                    write(options.out, rows)


def show(row: Row) -> str:
    """One line of the table."""
    name = f"{row.model} {row.recipe} {row.calibration}"
    errors = " ".join(f"{error:8.5f}" for error in row.errors.values())
    return f"{name:50}{row.n_tokens:8,}{row.cpu_s:7.1f}{row.mean:9.5f}{row.worst:9.5f}  {errors}"


def write(path: Path, rows: list[Row]) -> None:
    """Write all rows so far, with the machine and versions."""
    record = {
        "schema": "gteopt.calibration-curve/1",
        "rows": [asdict(row) for row in rows],
        **conditions(),
    }
    write_results(path, record, indent=2)


if __name__ == "__main__":
    main()
