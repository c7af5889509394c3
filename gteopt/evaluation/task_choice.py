"""Choose the part of a suite that fits a time limit and best forecasts the whole suite's mean.

The published scores of many models show how tasks correlate. Half of the models are used to choose
the tasks. The error of the forecast is measured on the other half. Hides: the file of scores, and
the search. Refuses to know: how long a task takes, mteb, encoders.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field

from gteopt.errors import InputError
from gteopt.evaluation.suites import StandsFor, Suite
from gteopt.frozen import Frozen
from gteopt.paths import read_shipped_json, shipped_dir
from gteopt.records.evaluation import SuiteForecast

RATE = 0.9
_LEAST_SHARE = 0.5  # the share of a suite's tasks that must have published scores
_NOTHING_LEFT = 1e-12

Floats = npt.NDArray[np.float64]


def forecast_suite_mean(stands: StandsFor, scores: Mapping[str, float]) -> SuiteForecast | None:
    """The forecast of the whole suite's mean from the part's scores; None if a score is missing."""
    if not stands.weights.keys() <= scores.keys():
        return None
    return SuiteForecast(
        suite=stands.suite,
        score=stands.intercept + sum(w * scores[name] for name, w in stands.weights.items()),
        error=stands.error,
        rate=stands.rate,
        n_tasks=stands.n_tasks,
        n_models=stands.n_models,
    )


def describe_suite_part(part: Suite) -> str:
    """A sentence on the tasks that are scored and the error of the forecast; "" for no part."""
    stands = part.stands_for
    if stands is None:
        return ""
    return (
        f"{len(stands.weights)} tasks of {stands.suite} are scored; they forecast its mean over "
        f"{stands.n_tasks} tasks within {100 * stands.error:.1f} points for {stands.rate:.0%} of "
        f"{stands.n_models} models that were not used to choose the tasks"
    )


class TaskScores(Frozen):
    """Published scores of models on the tasks of one suite.

    Attributes:
        choosing: by model, 1 if it belongs to the half that is used to choose tasks.
        scores: by model and task, in hundredths of a point.
    """

    tasks: tuple[str, ...]
    models: tuple[str, ...]
    choosing: tuple[int, ...]
    scores: tuple[tuple[int, ...], ...]


class _File(Frozen):
    """The content of the file on disk."""

    schema_: Annotated[str, Field(alias="schema", pattern=r"^gteopt\.task-scores/1$")]
    source: str
    suites: dict[str, TaskScores]


@functools.cache
def read_task_scores() -> Mapping[str, TaskScores]:
    """Published scores by suite.

    Raises:
        IntegrityError: the installation is damaged.
    """
    return read_shipped_json(shipped_dir("eval/suites") / "scores.json", _File).suites


def choose_suite_part(suite: Suite, seconds_by_task: Mapping[str, float], budget_s: float) -> Suite:
    """The tasks of a suite that fit a time limit and best forecast the suite's mean.

    Args:
        suite: a suite with published scores, possibly filtered.
        seconds_by_task: estimated time of each task; tasks that are not in it are not chosen.
        budget_s: the time limit for the chosen tasks together.

    Returns:
        The suite itself if all of it fits. Otherwise the part, with `stands_for` set.

    Raises:
        InputError: too few published scores, or not even one task fits.
    """
    known = read_task_scores()
    if suite.name not in known:
        raise InputError(
            f"--budget needs published scores of a suite's tasks, but {suite.name} has none; "
            f"suites that have some: {', '.join(sorted(known))}"
        )
    names = [task.task for task in suite.tasks]
    if all(name in seconds_by_task for name in names) and sum(seconds_by_task.values()) <= budget_s:
        return suite
    scores = known[suite.name]
    columns = [number for number, name in enumerate(scores.tasks) if name in names]
    if len(columns) < _LEAST_SHARE * len(names):
        raise InputError(
            f"--budget needs published scores, but only {len(columns)} of the {len(names)} tasks "
            f"of {suite.name} have them; score the suite without --budget"
        )
    tasks = [scores.tasks[number] for number in columns]
    values = np.array(scores.scores, np.float64)[:, columns] / 10_000
    choosing = np.array(scores.choosing, bool)
    costs = np.array([seconds_by_task.get(name, math.inf) for name in tasks])
    chosen = choose_tasks(values[choosing], costs, budget_s)
    if not chosen:
        shortest = int(costs.argmin())
        raise InputError(
            f"no task of {suite.name} fits --budget: the shortest, {tasks[shortest]}, takes about "
            f"{costs[shortest]:,.0f} s"
        )
    forecast = fit_forecast(values[choosing], chosen)
    held_out = values[~choosing]
    error = conformal_bound(np.abs(forecast.of(held_out) - held_out.mean(axis=1)), RATE)
    stands = StandsFor(
        suite=suite.name,
        n_tasks=len(tasks),
        weights={tasks[i]: float(w) for i, w in zip(chosen, forecast.weights, strict=True)},
        intercept=forecast.intercept,
        error=error,
        rate=RATE,
        n_models=len(held_out),
        budget_s=budget_s,
    )
    kept = tuple(task for task in suite.tasks if task.task in stands.weights)
    return suite.model_copy(
        update={
            "name": f"{suite.name}-part",
            "tasks": kept,
            "published": None,
            "stands_for": stands,
        }
    )


@dataclass(frozen=True)
class Forecast:
    """A linear forecast of the mean over all tasks from the scores of a few.

    Attributes:
        chosen: columns of the few tasks.
        weights: weight of each chosen column.
    """

    chosen: tuple[int, ...]
    weights: Floats
    intercept: float

    def of(self, values: Floats) -> Floats:
        """Forecasts [M] from scores [M, tasks]; only the chosen columns are used."""
        forecasts: Floats = self.intercept + values[:, list(self.chosen)] @ self.weights
        return forecasts


def fit_forecast(values: Floats, chosen: tuple[int, ...]) -> Forecast:
    """The linear forecast of the mean with the least expected squared error, from scores [M, n].

    With covariances C of the tasks and c = C 1 / n, the weights are C_SS^-1 c_S. C is shrunk
    (Ledoit and Wolf 2004), because there are only a few more models than tasks.
    """
    covariance = _covariance(values)
    few = list(chosen)
    weights = np.linalg.solve(covariance[np.ix_(few, few)], covariance.mean(axis=1)[few])
    mean = values.mean(axis=0)
    return Forecast(chosen, weights, float(mean.mean() - mean[few] @ weights))


def choose_tasks(values: Floats, costs: Floats, budget: float) -> tuple[int, ...]:
    """The columns of scores [M, n] that best forecast the mean of all columns within a budget.

    Tasks are added greedily in two ways: by the explained variance of the mean divided by the cost,
    and by the explained variance alone. The better result is taken, which bounds the loss against
    the best choice (Khuller, Moss and Naor 1999).
    """
    covariance = _covariance(values)
    choices = [_greedy(covariance, costs, budget, by_cost=by_cost) for by_cost in (True, False)]
    return min(choices, key=lambda choice: choice[0])[1]


def _greedy(
    covariance: Floats, costs: Floats, budget: float, *, by_cost: bool
) -> tuple[float, tuple[int, ...]]:
    """The unexplained variance of the mean, and the chosen columns."""
    left = covariance.copy()  # conditional on the tasks that are chosen
    chosen: list[int] = []
    while True:
        spent = float(costs[chosen].sum())
        variances = np.diag(left)
        fits = (spent + costs <= budget) & (variances > _NOTHING_LEFT)
        fits[chosen] = False
        if not fits.any():
            return float(left.mean()), tuple(sorted(chosen))
        gains = np.zeros(len(costs))
        gains[fits] = left.mean(axis=1)[fits] ** 2 / variances[fits]
        if by_cost:
            gains[fits] /= np.maximum(costs[fits], 1e-9)
        best = int(np.where(fits, gains, -1.0).argmax())
        chosen.append(best)
        left = left - np.outer(left[best], left[best]) / left[best, best]


def conformal_bound(errors: Floats, rate: float) -> float:
    """A bound on the error of one more model that holds at this rate for any distribution.

    The split-conformal quantile (Lei et al. 2018); infinite for too few models.
    """
    rank = math.ceil((len(errors) + 1) * rate)
    return math.inf if rank > len(errors) else float(np.sort(errors)[rank - 1])


def _covariance(values: Floats) -> Floats:
    from sklearn.covariance import ledoit_wolf

    covariance: Floats = ledoit_wolf(values)[0]
    return covariance
