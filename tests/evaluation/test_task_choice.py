"""A part of a suite fits its time. Its stated error holds for models that did not choose it."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from gteopt.commands.estimate_evaluation import limit_evaluation_time
from gteopt.errors import InputError
from gteopt.evaluation.suites import read_suite
from gteopt.evaluation.task_choice import (
    RATE,
    choose_suite_part,
    choose_tasks,
    conformal_bound,
    fit_forecast,
    forecast_suite_mean,
    read_task_scores,
)
from gteopt.evaluation.task_facts import task_amount

SUITES = sorted(read_task_scores())


def seconds(name: str, tokens_per_s: float = 5000) -> dict[str, float]:
    """Seconds that each task of a suite takes at a speed."""
    amounts = {task.task: task_amount(task, 512) for task in read_suite(name).tasks}
    return {task: amount.n_tokens / tokens_per_s for task, amount in amounts.items() if amount}


def scores_of(name: str) -> np.ndarray:
    return np.array(read_task_scores()[name].scores) / 10_000


@pytest.mark.parametrize("name", SUITES)
def test_no_organisation_has_models_that_choose_and_models_that_judge(name: str) -> None:
    known = read_task_scores()[name]
    sides: dict[str, set[int]] = {}
    for model, side in zip(known.models, known.choosing, strict=True):
        sides.setdefault(model.split("/")[0].lower(), set()).add(side)
    assert all(len(its_sides) == 1 for its_sides in sides.values())
    assert set(known.tasks) <= {task.task for task in read_suite(name).tasks}


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("budget_s", [120.0, 1800.0])
def test_a_part_fits_its_time_and_says_what_it_stands_for(name: str, budget_s: float) -> None:
    costs = seconds(name)
    part = choose_suite_part(read_suite(name), costs, budget_s)
    stands = part.stands_for
    assert stands is not None
    assert sum(costs[task.task] for task in part.tasks) <= budget_s
    assert {task.task for task in part.tasks} == stands.weights.keys()
    known = read_task_scores()[name]
    apart = scores_of(name)[np.array(known.choosing) == 0]
    columns = [known.tasks.index(task) for task in stands.weights]
    forecasts = stands.intercept + apart[:, columns] @ np.array(list(stands.weights.values()))
    off = np.abs(forecasts - apart.mean(axis=1))
    assert np.mean(off <= stands.error + 1e-12) >= RATE


@pytest.mark.parametrize("name", SUITES)
def test_the_stated_error_covers_models_that_neither_chose_nor_stated_it(name: str) -> None:
    """Organisations are divided into three sides many times. The third side only checks."""
    values, known, costs = scores_of(name), read_task_scores()[name], seconds(name)
    cost = np.array([costs[task] for task in known.tasks])
    owner = np.array([model.split("/")[0].lower() for model in known.models])
    names, rng = np.unique(owner), np.random.default_rng(0)
    covered, n_checked, widths = 0, 0, []
    for _ in range(60):
        side = dict(zip(names, rng.integers(0, 3, len(names)), strict=True))
        of_model = np.array([side[organisation] for organisation in owner])
        choosing, stating, checking = (values[of_model == number] for number in range(3))
        if len(choosing) < 10 or len(stating) < 10:
            continue
        forecast = fit_forecast(choosing, choose_tasks(choosing, cost, float(cost.sum()) / 20))
        error = conformal_bound(np.abs(forecast.of(stating) - stating.mean(axis=1)), RATE)
        off = np.abs(forecast.of(checking) - checking.mean(axis=1))
        covered, n_checked = covered + int((off <= error).sum()), n_checked + len(off)
        widths.append(error)
    # Models of one organisation are alike, so the share varies more than for independent ones.
    assert covered / n_checked >= RATE - 0.04
    assert np.median(widths) < 0.7 * np.std(values.mean(axis=1))  # says more than nothing


def test_more_time_foretells_better() -> None:
    errors = []
    for budget_s in (60.0, 1800.0, 7200.0, 4 * 7200.0):
        stands = choose_suite_part(read_suite("mteb-en"), seconds("mteb-en"), budget_s).stands_for
        assert stands is not None
        errors.append(stands.error)
    assert errors == sorted(errors, reverse=True)


def test_a_choice_is_nearly_the_best_of_all() -> None:
    """Every subset of ten tasks is tried; the search loses little against the best of them."""
    values = scores_of("c-mteb")[:, :10]
    costs = np.array([3.0, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    covariance = np.cov(values, rowvar=False)

    def unexplained(chosen: tuple[int, ...]) -> float:
        indices = list(chosen)
        to_mean = covariance.mean(axis=1)
        explained = to_mean[indices] @ np.linalg.solve(
            covariance[np.ix_(indices, indices)], to_mean[indices]
        )
        return float(covariance.mean() - explained)

    for budget in (3.0, 8.0, 15.0):
        subsets = [
            subset
            for size in range(1, 11)
            for subset in combinations(range(10), size)
            if costs[list(subset)].sum() <= budget
        ]
        best = min(map(unexplained, subsets))
        chosen = choose_tasks(values, costs, budget)
        assert costs[list(chosen)].sum() <= budget
        assert unexplained(chosen) <= best + 0.1 * covariance.mean()


def test_enough_time_is_the_suite_itself() -> None:
    suite = read_suite("mteb-pl")
    assert choose_suite_part(suite, seconds("mteb-pl"), 1e9) is suite


def test_all_tasks_with_scores_foretell_without_an_error() -> None:
    suite, costs = read_suite("mteb-en"), seconds("mteb-en")
    part = choose_suite_part(suite, costs, sum(costs.values()) - min(costs.values()) / 2)
    assert part.stands_for is not None
    assert part.stands_for.error < 0.005
    assert forecast_suite_mean(part.stands_for, {}) is None


def test_what_cannot_be_chosen_is_said() -> None:
    with pytest.raises(InputError, match=r"rteb has none; suites that have some: c-mteb, mteb-en"):
        choose_suite_part(read_suite("rteb"), {}, 60)
    with pytest.raises(
        InputError, match=r"no task of mteb-en fits --budget: the shortest, BIOSSES"
    ):
        choose_suite_part(read_suite("mteb-en"), seconds("mteb-en"), 0.01)


def test_a_folder_keeps_its_tasks_whatever_the_speed_is_next_time(tmp_path: Path) -> None:
    suite = read_suite("mteb-en")
    kept = limit_evaluation_time({"nano": "nano"}, suite, 600.0, tmp_path)
    again = limit_evaluation_time({"nano": "nano"}, suite, 600.0, tmp_path, n_models=50)
    longer = limit_evaluation_time({"nano": "nano"}, suite, 601.0, tmp_path, n_models=4)
    assert again == kept
    assert longer != kept
    assert Counter(task.task for task in kept.tasks).most_common(1)[0][1] == 1


def test_tasks_without_their_data_in_the_folder_are_not_chosen(tmp_path: Path) -> None:
    from gteopt.evaluation.data_check import missing_data

    suite = read_suite("mteb-en")
    wanted = {"BIOSSES", "STS13", "EmotionClassification"}
    for task, data, _ in missing_data(suite, tmp_path):
        if task in wanted:
            (tmp_path / data).mkdir(parents=True, exist_ok=True)
    part = limit_evaluation_time({"nano": "nano"}, suite, 3600.0, hub_dir=tmp_path)
    assert {task.task for task in part.tasks} <= wanted
    assert part.stands_for is not None
    assert part.stands_for.error > 0.02
