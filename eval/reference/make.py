"""Extract the published scores of a few models.

    python eval/reference/make.py ../shared/reference

Writes one JSON file per model beside this script, and the table of README.md. A file has the
model's scores on the tasks, splits and subsets of the shipped suites, from a table of many models.
The averages on its model card come from the family table. A score that was run counts before a
score that the card claims.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import sys
from pathlib import Path

from gteopt.config.yaml_files import list_shipped_names
from gteopt.evaluation.suites import read_suite
from gteopt.model.families import PUBLISHED
from gteopt.records.evaluation import Reference, ReferenceAverage, ReferenceScore
from gteopt.records.files import write_atomically

FOLDER = Path(__file__).parent
SOURCE = "embeddings-benchmark/results, state of 2026-08-20"
CARDS = "Alibaba-NLP/gte-Qwen2-7B-instruct's model card, 2024"
N_TASKS = {"MTEB": 56, "C-MTEB": 35, "MTEB-fr": 26, "MTEB-pl": 26}
SUITES = {"MTEB": "mteb-en", "C-MTEB": "c-mteb", "MTEB-fr": "mteb-fr", "MTEB-pl": "mteb-pl"}
MODELS = (
    "Alibaba-NLP/gte-Qwen2-7B-instruct",
    "nvidia/NV-Embed-v1",
    "Alibaba-NLP/gte-Qwen1.5-7B-instruct",
    "intfloat/e5-mistral-7b-instruct",
    "sentence-transformers/all-MiniLM-L6-v2",
)

# Protocol and precision of the scores on a model's card; None if no script says the precision.
AUTHORS: dict[str, tuple[str, str | None]] = {
    "Alibaba-NLP/gte-Qwen2-7B-instruct": ("gte-authors", "float16"),
    "Alibaba-NLP/gte-Qwen1.5-7B-instruct": ("gte-authors", "float16"),
    "intfloat/e5-mistral-7b-instruct": ("e5-authors", "float16"),
}
UNKNOWN_AUTHORS = ("authors", None)

Key = tuple[str, str, str]


def main(source: Path) -> None:
    """Write the file of each model, and the table of README.md."""
    suite_keys = _wanted()
    by_model: dict[str, dict[Key, ReferenceScore]] = {model: {} for model in MODELS}
    with gzip.open(source / "mteb_scores.csv.gz", "rt", encoding="utf-8") as handle:
        rows = sorted(csv.DictReader(handle), key=lambda row: row["revision"] != "external")
    for row in rows:  # a later row replaces an earlier one
        key = row["task"], row["split"], row["subset"]
        if row["model"] in by_model and key in suite_keys and row["main_score"] != "nan":
            by_model[row["model"]][key] = ReferenceScore(
                task=row["task"],
                split=row["split"],
                subset=row["subset"],
                score=float(row["main_score"]),
                revision=row["revision"],
                dataset_revision=_or_none(row["dataset_revision"]),
                protocol=AUTHORS.get(row["model"], UNKNOWN_AUTHORS)[0]
                if row["revision"] == "external"
                else "mteb",
            )
    rows_of_table = []
    for model in MODELS:
        averages = PUBLISHED[model].scores if model in PUBLISHED else {}
        reference = Reference(
            schema="gteopt.reference/1",
            model=model,
            source=SOURCE,
            averages_source=CARDS if averages else None,
            averages=tuple(
                ReferenceAverage(
                    benchmark=name,
                    suite=SUITES[name],
                    n_tasks=N_TASKS[name],
                    score=round(percent / 100, 6),
                )
                for name, percent in averages.items()
            ),
            authors_protocol=AUTHORS.get(model, UNKNOWN_AUTHORS)[0],
            authors_precision=AUTHORS.get(model, UNKNOWN_AUTHORS)[1],
            scores=tuple(by_model[model][key] for key in sorted(by_model[model])),
        )
        path = FOLDER / f"{model.partition('/')[2]}.json"
        write_atomically(path, _a_line_each(reference).encode())
        cells = [_cell(reference, benchmark) for benchmark in SUITES]
        rows_of_table.append(f"| `{model}` | {' | '.join(cells)} |")
    readme = FOLDER / "README.md"
    text = readme.read_text(encoding="utf-8")
    filled = "".join(f"{row}\n" for row in rows_of_table)
    text = re.sub(r"(<!-- averages -->\n\|.*\n\|.*\n)(?:\|.*\n)*", rf"\g<1>{filled}", text)
    readme.write_text(text, encoding="utf-8")


def _cell(reference: Reference, benchmark: str) -> str:
    """A table cell: average of the card, mean of the file's scores, and number of their tasks."""
    card = {average.benchmark: average for average in reference.averages}.get(benchmark)
    suite = read_suite(SUITES[benchmark])
    scores = {(s.task, s.split, s.subset): s.score for s in reference.scores}
    means = []
    for entry in suite.tasks:
        keys = itertools.product(
            [entry.task], entry.splits or ("test",), entry.subsets or ("default",)
        )
        task_scores = [scores[key] for key in keys if key in scores]
        if task_scores:
            means.append(sum(task_scores) / len(task_scores))
    mean = f"{100 * sum(means) / len(means):.2f} ({len(means)} of {len(suite.tasks)})"
    return f"{100 * card.score:.2f} / {mean}" if card else f"- / {mean}"


def _or_none(text: str) -> str | None:
    return text if text not in ("", "None") else None


def _wanted() -> set[Key]:
    """Task, split and subset of all tasks in the shipped suites; aggregates also by their parts."""
    keys: set[Key] = set()
    for name in list_shipped_names("eval/suites"):
        for entry in read_suite(name).tasks:
            names = [entry.task, *(entry.parts or ())]
            for split in entry.splits or ("test",):
                for subset in entry.subsets or ("default",):
                    keys |= {(task, split, subset) for task in names}
    return keys


def _a_line_each(reference: Reference) -> str:
    """JSON with one score or average per line, so that a diff shows what changed."""
    plain = reference.model_dump(mode="json", by_alias=True)
    parts = []
    for name, value in plain.items():
        if isinstance(value, list):
            lines = ",\n".join(f"    {json.dumps(item)}" for item in value)
            parts.append(f'  "{name}": [\n{lines}\n  ]' if value else f'  "{name}": []')
        else:
            parts.append(f'  "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
