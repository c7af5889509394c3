"""Entries of single queries, pairs and documents give mteb's own scores."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import (
    accuracy_score,
    adjusted_mutual_info_score,
    average_precision_score,
    f1_score,
    v_measure_score,
)

import gteopt
from gteopt.encoder.encoder import Encoder
from gteopt.errors import IntegrityError, UnsupportedError
from gteopt.evaluation.instructions import TaskInstruction
from gteopt.evaluation.per_item_scores import Samples, read_samples, write_samples
from gteopt.evaluation.runner import SuiteRun, run_suite
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_suite
from gteopt.evaluation.views import own_view

RNG = np.random.default_rng(0)
N = 40


def suite_of(*tasks: str | dict[str, Any]) -> Suite:
    entries = [{"task": task} if isinstance(task, str) else task for task in tasks]
    return Suite.model_validate({"schema": "gteopt.suite/1", "name": "test", "tasks": entries})


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


def assert_reproduces(run: SuiteRun) -> None:
    assert not run.failed
    for score in run.scores:
        assert score.no_samples is None
        samples = run.item_scores[score.task, score.split, score.subset]
        assert samples.score() == pytest.approx(score.score, abs=1e-6)
        assert samples.n_units == score.n_samples


def clusterings(statistic: Any) -> Samples:
    rows = np.tile(np.arange(N), 3)
    return Samples(
        statistic,
        "document",
        {
            "document": rows,
            "experiment": np.repeat(np.arange(3), N),
            "gold": RNG.integers(0, 5, N)[rows],
            "cluster": RNG.integers(0, 4, 3 * N),
            "level": np.zeros(3, int),
        },
    )


SAMPLES = {
    "mean": Samples("mean", "query", {"values": RNG.random((3, N))}),
    "spearman": Samples(
        "spearman",
        "pair",
        {"similarities": RNG.random(N).round(1), "gold": RNG.integers(0, 5, N)},
    ),
    **{
        name: Samples(
            name,
            "document",
            {"predictions": RNG.integers(0, 6, (3, N)), "gold": RNG.integers(0, 5, N)},
        )
        for name in ("f1_macro", "f1_weighted")
    },
    "max_ap": Samples(
        "max_ap",
        "pair",
        {"similarities": RNG.random((3, N)).round(1), "gold": RNG.integers(0, 2, N)},
    ),
    "v_measure": clusterings("v_measure"),
    "ami": clusterings("ami"),
}


def oracle(samples: Samples, drawn: npt.NDArray[np.int64]) -> float:
    """The score that scipy or scikit-learn gives to copies of the units `drawn`."""
    arrays = samples.arrays
    if samples.statistic == "mean":
        return float(arrays["values"][:, drawn].mean())
    if samples.statistic == "spearman":
        return float(spearmanr(arrays["similarities"][drawn], arrays["gold"][drawn])[0])
    if samples.statistic.startswith("f1"):
        average = samples.statistic.removeprefix("f1_")
        gold = arrays["gold"][drawn]
        return float(
            np.mean([f1_score(gold, p[drawn], average=average) for p in arrays["predictions"]])
        )
    if samples.statistic == "max_ap":
        gold = arrays["gold"][drawn]
        return float(max(average_precision_score(gold, s[drawn]) for s in arrays["similarities"]))
    score = v_measure_score if samples.statistic == "v_measure" else adjusted_mutual_info_score
    gold, clusters = arrays["gold"].reshape(3, N), arrays["cluster"].reshape(3, N)
    return float(np.mean([score(g[drawn], c[drawn]) for g, c in zip(gold, clusters, strict=True)]))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_weighted_score_is_the_score_of_the_units_copied_as_often(name: str) -> None:
    samples = SAMPLES[name]
    weights = np.random.default_rng(1).multinomial(N, np.full(N, 1 / N), size=20)
    expected = [oracle(samples, np.repeat(np.arange(N), row)) for row in weights]
    np.testing.assert_allclose(samples.scores(weights), expected, atol=1e-9)
    assert samples.score() == pytest.approx(oracle(samples, np.arange(N)), abs=1e-9)


def test_the_best_accuracy_is_found_by_trying_every_threshold() -> None:
    similarities, gold = SAMPLES["max_ap"].arrays["similarities"], RNG.integers(0, 2, N)
    samples = Samples("max_accuracy", "pair", {"similarities": similarities, "gold": gold})
    tried = [
        accuracy_score(gold, row >= threshold)
        for row in similarities
        for threshold in np.unique(row)[1:]
    ]
    assert samples.score() == pytest.approx(max(tried), abs=1e-12)


@pytest.mark.parametrize("statistic", ["spearman", "max_ap", "max_accuracy"])
def test_influences_are_the_derivatives_of_the_score(statistic: Any) -> None:
    rng = np.random.default_rng(3)
    n = 61
    gold = rng.integers(0, 4 if statistic == "spearman" else 2, n)
    good, bad = gold + rng.standard_normal(n), gold + 4 * rng.standard_normal(n)
    similarities = good.round(1) if statistic == "spearman" else np.stack([bad, good.round(1)])
    samples = Samples(statistic, "pair", {"similarities": similarities, "gold": gold})
    step = 1e-5 * np.eye(n)
    expected = (samples.scores(1 + step) - samples.scores(1 - step)) / 2e-5
    np.testing.assert_allclose(samples.influences(), expected, atol=1e-9)
    assert samples.influences().std() > 1e-3


def test_written_entries_come_back_and_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "task.safetensors"
    written = {("test", name): samples for name, samples in SAMPLES.items()}
    rounded = Samples("mean", "query", SAMPLES["mean"].arrays, digits=5)
    write_samples(path, {**written, ("test", "rounded"): rounded})
    stored = read_samples(path)
    assert stored.keys() == {*written, ("test", "rounded")}
    assert stored["test", "rounded"].digits == 5
    for key, samples in written.items():
        assert stored[key].statistic == samples.statistic
        for name, array in samples.arrays.items():
            np.testing.assert_array_equal(stored[key].arrays[name], array)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match="delete it"):
        read_samples(path)


def test_entries_reproduce_every_score_of_the_mini_suite(nano: Encoder) -> None:
    run = run_suite(nano, load_suite("mini"))
    assert_reproduces(run)
    statistics = {samples.statistic for samples in run.item_scores.values()}
    assert statistics == {"mean", "spearman", "ami", "f1_weighted"}


def test_entries_reproduce_scores_on_published_data(nano: Encoder, shared: Path) -> None:
    multilingual = {
        "task": "STSBenchmarkMultilingualSTS",
        "subsets": ["fr"],
        "splits": ["test"],
    }
    assert_reproduces(
        run_suite(nano, suite_of("STSBenchmark", multilingual), hub_dir=shared / "hub")
    )


MOCKS = (
    "BitextMiningTask",
    "MultilingualBitextMiningTask",
    "MultilingualParallelBitextMiningTask",
    "ClassificationTask",
    "MultilingualClassificationTask",
    "ClusteringTask",
    "MultilingualClusteringFastTask",
    "PairClassificationTask",
    "MultilingualPairClassificationTask",
    "RerankingTask",
    "MultilingualRerankingTask",
    "RetrievalTask",
    "InstructionRetrieval",
    "STSTask",
    "MultilingualSTSTask",
    "SummarizationTask",
)


@pytest.mark.parametrize("name", MOCKS)
def test_entries_reproduce_scores_of_every_task_class_of_mteb(
    name: str, nano: Encoder, tmp_path: Path
) -> None:
    """The data are the tiny ones of mteb's own tests."""
    from mteb.mocks import mock_tasks
    from mteb.mocks.mock_tasks.clustering import MockClusteringTask

    from gteopt.corpus.vector_cache import VectorCache
    from gteopt.evaluation.mteb_isolation import isolate_mteb
    from gteopt.evaluation.mteb_model import TaskModel
    from gteopt.evaluation.predictions import (
        read_predictions,
        record_draws_,
        samples_from_predictions,
    )
    from gteopt.evaluation.tasks import n_samples

    with isolate_mteb(offline=True):
        task = getattr(mock_tasks, f"Mock{name}", MockClusteringTask)()
        assert type(task).__name__ == f"Mock{name}"
        task.load_data()
        split = task.metadata.eval_splits[0]
        model = TaskModel(VectorCache(nano, tmp_path), own_view(nano), TaskInstruction())
        draws = record_draws_(task)
        with tempfile.TemporaryDirectory() as folder:
            encode = {"batch_size": 32}
            scores = task.evaluate(
                model, split, encode_kwargs=encode, prediction_folder=Path(folder)
            )
            predictions = read_predictions(task, Path(folder))
        collected = dict(samples_from_predictions(task, split, predictions, draws))
    assert collected.keys() == scores.keys()
    for subset, metrics in scores.items():
        samples = collected[subset]
        assert not isinstance(samples, UnsupportedError), samples
        assert samples.score() == pytest.approx(metrics["main_score"], abs=1e-6)
        if "Clustering" not in name:  # sets of a clustering may share documents
            assert n_samples(task, split, subset) == samples.n_units


@pytest.mark.parametrize("name", ["SummEval", "SummEvalFr"])
def test_entries_reproduce_the_evaluator_that_averages_p_values(
    name: str, nano: Encoder, tmp_path: Path
) -> None:
    import mteb
    from datasets import Dataset, DatasetDict

    from gteopt.corpus.vector_cache import VectorCache
    from gteopt.evaluation.mteb_isolation import isolate_mteb
    from gteopt.evaluation.mteb_model import TaskModel
    from gteopt.evaluation.predictions import read_predictions, samples_from_predictions

    rng = np.random.default_rng(0)
    texts = [f"report {i} on the harbour and the {word}" for i, word in enumerate("abcdefghijkl")]
    columns = {
        "text": texts,
        "human_summaries": [[f"{text}, in short", f"{text}: a digest"] for text in texts],
        "machine_summaries": [[f"{text} {j * 7}" for j in range(6)] for text in texts],
        "relevance": rng.uniform(1, 5, (len(texts), 6)).tolist(),
    }
    with isolate_mteb(offline=True):
        task = mteb.get_task(name)
        task.dataset = DatasetDict({"test": Dataset.from_dict(columns)})
        task.data_loaded = True
        model = TaskModel(VectorCache(nano, tmp_path / "cache"), own_view(nano), TaskInstruction())
        scores = task.evaluate(
            model, "test", encode_kwargs={"batch_size": 32}, prediction_folder=tmp_path
        )
        collected = dict(
            samples_from_predictions(task, "test", read_predictions(task, tmp_path), None)
        )
    samples = collected["default"]
    assert isinstance(samples, Samples)
    assert samples.score() == pytest.approx(scores["default"]["main_score"], abs=1e-9)
