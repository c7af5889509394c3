"""Examples on request: a user's own texts whose neighbours changed most.

Hides: the digests that identify texts in a run's sample. Refuses to know: encoders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from gteopt.evaluation.fidelity import most_changed_texts, text_digest
from gteopt.evaluation.runner import SuiteRun
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.user_data import Collection, read_own_data
from gteopt.records.examples import Examples
from gteopt.records.files import write_record


class OwnTexts:
    """The texts of a suite's own data, and the change of their neighbours.

    Args:
        suite: the scored suite; texts of tasks without own data are left out.
        baseline: the baseline's run of the suite, with the instructions of queries.
    """

    def __init__(self, suite: Suite, baseline: SuiteRun) -> None:
        self._baseline = baseline
        self._files = ", ".join(task.data.name for task in suite.tasks if task.data is not None)
        instructions = {score.task: score.instruction for score in baseline.scores}
        self._known: dict[str, str] = {}
        for task in suite.tasks:
            if task.data is None or task.task not in instructions:
                continue
            own = read_own_data(task.data, task.columns)
            with_instruction = f"query\0{instructions[task.task] or ''}"
            if isinstance(own, Collection):
                queries = [row["text"] for row in own.queries]
                # mteb joins title and text this way.
                documents = [f"{row['title']} {row['text']}".strip() for row in own.corpus]
                self._know(documents, "document\0")
            else:
                queries, documents = [*own.first, *own.second], []
            self._know([*queries, *documents], with_instruction)

    def _know(self, texts: Iterable[str], prompt: str) -> None:
        self._known |= {text_digest(text, prompt): text for text in texts}

    def of(self, run: SuiteRun, row: str) -> dict[str, Examples]:
        """The examples of one row of the table; empty for the baseline itself."""
        base = self._baseline
        if run.encoder_sha256 == base.encoder_sha256:
            return {}
        changed = most_changed_texts(
            base.fidelity_sample, run.fidelity_sample, run.vectors, self._known
        )
        return {
            row: Examples(
                variant=row,
                artifact_sha256=run.encoder_sha256,
                baseline=base.encoder,
                baseline_sha256=base.encoder_sha256,
                texts=self._files,
                examples=changed,
            )
        }


def write_own_examples(folder: Path, rows: Iterable[str], examples: Mapping[str, Examples]) -> None:
    """Write the examples of a run, and remove those of an earlier run for the same rows."""
    for row in rows:
        (folder / "examples" / f"{row}.json").unlink(missing_ok=True)
    for row, changed in examples.items():
        write_record(folder / "examples" / f"{row}.json", changed)
