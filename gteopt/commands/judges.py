"""The data that variants are judged on: a suite, a user's own data, or texts without labels.

Hides: how a suite is filtered and extended. Refuses to know: encoders, printing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gteopt.commands.estimate_evaluation import limit_evaluation_time
from gteopt.commands.evaluate import EvaluationSetup, evaluate_suite, evaluate_texts
from gteopt.config.amounts import parse_seconds
from gteopt.config.plan import ColumnRole
from gteopt.config.policy import DEFAULT_MARGIN
from gteopt.errors import InputError
from gteopt.evaluation.hub_tables import local_table
from gteopt.evaluation.suites import Suite, add_own_task
from gteopt.evaluation.task_facts import filter_suite
from gteopt.evaluation.tasks import load_suite
from gteopt.evaluation.user_data import read_own_data, read_texts
from gteopt.progress import Progress
from gteopt.records.evaluation import EvalReport, FidelityReport


@dataclass(frozen=True)
class Judges:
    """The data that variants are judged on; without any, texts that ship with gteopt.

    Attributes:
        data: labelled pairs, queries with passages, a BEIR folder, or the name of a data set:
            ORG/NAME, ORG/NAME:SPLIT or ORG/NAME:FILE.
        texts: texts without labels, instead of a suite and data.
        columns: role and name of columns, where names do not tell their roles.
        suite: a shipped suite, or a file.
        languages: languages of the suite to score; empty scores all.
        budget: time for the suite ("30m"); None scores all of its tasks.

    Example:
        >>> gteopt.Judges(data="pairs.csv")
        >>> gteopt.Judges(suite="mteb-en", languages=("en",), budget="30m")
    """

    data: str | Path | None = None
    texts: str | Path | None = None
    columns: tuple[tuple[ColumnRole, str], ...] = ()
    suite: str | None = None
    languages: tuple[str, ...] = ()
    budget: str | None = None

    def located(self, hub_dir: Path | None = None) -> Judges:
        """The same with the file of a data set instead of its name.

        The data are read once, so that their faults are reported before slow steps.

        Args:
            hub_dir: folder in the Hub's layout with the data set; downloaded from the Hub if None.

        Raises:
            InputError: no such data set; the faults of the data; texts with a suite or data; or
                columns without data or texts.
        """
        if self.texts is not None and (self.suite is not None or self.data is not None):
            raise InputError("texts has no labels to score; leave out suite and data")
        if self.columns and self.data is None and self.texts is None:
            raise InputError("columns names the columns of data or texts; give one of them")
        if self.texts is not None:
            read_texts(Path(self.texts), dict(self.columns))
        if self.data is None:
            return self
        data = local_table(Path(self.data), hub_dir=hub_dir)
        read_own_data(data, dict(self.columns))
        return replace(self, data=data)

    def load_suite(
        self,
        sources: Mapping[str, str],
        folder: Path | None,
        *,
        hub_dir: Path | None = None,
        n_models: int | None = None,
    ) -> Suite | None:
        """The suite with own data as one more task; None where texts without labels decide.

        With a budget, only the tasks that fit it are kept. The data have to be located before.

        Args:
            sources: models by name, the baseline first; their speed decides what fits a budget.
            folder: results folder, see `limit_evaluation_time`.
            hub_dir: see `limit_evaluation_time`.
            n_models: see `limit_evaluation_time`.

        Raises:
            InputError: an unknown suite or language, or a budget without a suite.
        """
        has_own = self.data is not None or self.texts is not None
        name = self.suite or (None if has_own else "mini")
        suite = load_suite(name) if name is not None else None
        if suite is not None and self.languages:
            suite = filter_suite(suite, languages=self.languages)
        if self.budget is not None:
            budget_s = parse_seconds("budget", self.budget)
            if suite is None:
                raise InputError("budget needs a suite to choose tasks from")
            suite = limit_evaluation_time(
                sources, suite, budget_s, folder, hub_dir=hub_dir, n_models=n_models
            )
        if self.data is not None:
            suite = add_own_task(suite, Path(self.data), columns=dict(self.columns))
        return suite


def evaluate_on_judges(
    judges: Judges,
    sources: Mapping[str, str],
    folder: Path | None,
    *,
    how: EvaluationSetup,
    margin: float = DEFAULT_MARGIN,
    progress: Progress,
) -> tuple[dict[str, EvalReport], dict[str, FidelityReport]]:
    """Scores of sources on a suite and data, or their fidelity on texts; one of the two is empty.

    Raises:
        InputError: see `Judges.located`, `Judges.load_suite` and `evaluate_suite`.
    """
    judges = judges.located(how.hub_dir)
    if judges.texts is not None:
        texts, columns = Path(judges.texts), dict(judges.columns)
        return {}, evaluate_texts(
            sources, texts, folder, how=how, columns=columns, progress=progress
        )
    suite = judges.load_suite(sources, folder, hub_dir=how.hub_dir)
    assert suite is not None
    return evaluate_suite(sources, suite, folder, how=how, margin=margin, progress=progress), {}
