"""`gteopt choose` and `report`: apply a policy to a results folder, and write its page."""

from __future__ import annotations

from pathlib import Path

from gteopt.commands.names import name_pair
from gteopt.config.policy import Policy, load_policy
from gteopt.config.yaml_files import list_shipped_names
from gteopt.errors import InputError
from gteopt.evaluation.statistics import correct_verdicts
from gteopt.records.evaluation import EvalReport
from gteopt.records.files import read_record, write_atomically, write_record
from gteopt.records.results_folder import Results, RunRecord, read_results
from gteopt.report.choose import choose_variant
from gteopt.report.html import comparison_page, write_report


def choose_by_policy(folder: Path, policy: Policy) -> Results:
    """Apply a policy to a results folder, without new measurements.

    Verdicts are computed again with the policy's margin, over all evaluations in the folder. The
    evaluations and the choice are written, and the page where the folder has one.

    Raises:
        InputError, IntegrityError: see `read_results` and `choose_variant`.
    """
    measured = read_results(folder)
    results = add_choice(measured, policy)
    for path in (folder / "eval").glob("*.json"):
        report = results.evals[read_record(path, EvalReport).variant]
        if report.variant in measured.evals and report != measured.evals[report.variant]:
            write_record(path, report)
    assert results.choice is not None
    write_record(folder / "choice.json", results.choice)
    if (folder / "report.html").is_file():
        write_choice_page(folder, results)
    return results


def add_choice(measured: Results, policy: Policy) -> Results:
    """The results with a policy's choice, and with verdicts for its margin.

    Raises:
        InputError: see `choose_variant`.
    """
    corrections = {report.correction for report in measured.evals.values()}
    evals = correct_verdicts(
        {
            name: report.model_copy(update={"margin": policy.margin})
            for name, report in measured.evals.items()
        },
        "row" if corrections == {"row"} else "family",
    )
    results = measured.model_copy(update={"evals": evals, "choice": None})
    return results.model_copy(update={"choice": choose_variant(policy, results)})


def write_choice_page(folder: Path, results: Results) -> Path:
    """Write report.html with the pick of every shipped policy, and return its path."""
    others: dict[str, Results | str] = {}
    for name in list_shipped_names("recipes/policies"):
        try:
            others[name] = add_choice(results, load_policy(name))
        except InputError as error:
            others[name] = str(error)
    return write_report(folder, results, title_results_page(folder), others=others)


def write_comparison_page(first: Path, second: Path) -> Path:
    """Write a page of two results folders into the first, and return its path.

    Raises:
        InputError, IntegrityError: see `read_results`.
    """
    from gteopt.evaluation.compare import (
        compare_item_scores,
    )  # imports torch, which one folder does not need

    folders = (first, second)
    both = [read_results(folder) for folder in folders]
    names = name_pair(first, second)
    pairs = {}
    for variant in both[0].evals.keys() & both[1].evals.keys():
        files = [folder / "items" / f"{variant}.parquet" for folder in folders]
        suites = {results.evals[variant].suite_sha256 for results in both}
        if len(suites) == 1 and all(file.is_file() for file in files):
            pairs[variant] = compare_item_scores(*files)
    path = first / f"report-beside-{second.resolve().name}.html"
    in_order = {variant: pairs[variant] for variant in both[0].evals if variant in pairs}
    write_atomically(path, comparison_page(names, both, pairs=in_order).encode())
    return path


def title_results_page(folder: Path) -> str:
    """The title of a results folder's page: the plan's name, or the folder's."""
    if (folder / "run.json").is_file():
        ran = read_record(folder / "run.json", RunRecord)
        return f"gteopt: {ran.plan} ({ran.base})"
    return f"gteopt: {folder.resolve().name}"
