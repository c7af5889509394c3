"""Other processes and a Ray cluster encode to the same bits, even when a worker is killed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file

import gteopt
from gteopt.commands.evaluate import EvaluationSetup, VectorGrid, evaluate_suite, parse_vector_grid
from gteopt.corpus import shards
from gteopt.corpus.ray_actors import start_ray_workers
from gteopt.corpus.shards import LocalEncoding, Shard
from gteopt.corpus.workers import ScoreWorkers, WorkerJob, start_local_workers
from gteopt.encoder.description import describe_encoder
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError, IntegrityError, NumericsError, UnsupportedError
from gteopt.evaluation.runner import SuiteEncodeOptions, SuiteRun, run_suite
from gteopt.evaluation.suites import Suite
from gteopt.machine import parse_devices
from gteopt.progress import Progress, ignore_progress

SUITE = Suite.model_validate(
    {
        "schema": "gteopt.suite/1",
        "name": "few",
        "tasks": [{"task": "MiniSTS", "subsets": ["en", "fr"]}],
    }
)


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """Each request has several shards. This process and every worker use one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_TEXTS", 6)
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


@pytest.fixture(scope="module")
def alone(nano: Encoder, tmp_path_factory: pytest.TempPathFactory) -> tuple[SuiteRun, Path]:
    store = tmp_path_factory.mktemp("alone")
    return run_suite(nano, SUITE, store=store), store


def cached(store: Path) -> dict[bytes, bytes]:
    """Bytes of every vector on disk, by the key of its text."""
    vectors: dict[bytes, bytes] = {}
    for path in (store / "vectors").rglob("*.safetensors"):
        shard = load_file(path)
        assert len(shard["keys"]) <= 6
        pairs = zip(shard["keys"], shard["vectors"], strict=True)
        vectors |= {key.tobytes(): vector.tobytes() for key, vector in pairs}
    return vectors


def run_killing(
    workers: ScoreWorkers, store: Path, kill: Callable[[], None]
) -> tuple[SuiteRun, list[str]]:
    """Run the suite and kill one worker after the second shard."""
    killed: list[str] = []
    notes: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if not killed and 6 < done < total - 12 and "MiniSTS" in what:
            killed.append(what)
            kill()

    encoder = describe_encoder("nano", device=workers.device)
    encode = workers.encoding(encoder, "nano", hub_dir=None, say=notes.append)
    options = SuiteEncodeOptions(encode=encode)
    run = run_suite(encoder, SUITE, store=store, options=options, progress=progress)
    assert killed
    return run, notes


def assert_same_bits(run: SuiteRun, store: Path, alone: tuple[SuiteRun, Path]) -> None:
    expected, expected_store = alone
    assert run.failed == ()
    assert run.scores == expected.scores
    assert cached(store) == cached(expected_store)
    for key, samples in expected.item_scores.items():
        for name, array in samples.arrays.items():
            np.testing.assert_array_equal(run.item_scores[key].arrays[name], array)
    for side, sample in expected.fidelity_sample.items():
        np.testing.assert_array_equal(run.fidelity_sample[side].vectors, sample.vectors)


def test_two_processes_of_which_one_is_killed_give_the_bits_of_one(
    alone: tuple[SuiteRun, Path], tmp_path: Path
) -> None:
    with start_local_workers(["cpu", "cpu"]) as workers:

        def kill() -> None:
            busy: Any = next(iter(workers.opened()))
            busy.process.kill()

        run, notes = run_killing(workers, tmp_path, kill)
        assert workers.n_lost == 1
        (note,) = notes
        assert "exit code -9" in note
        assert "encoded again" in note
        opened: list[Any] = workers.opened()
        processes = [worker.process for worker in opened]
    assert_same_bits(run, tmp_path, alone)
    assert len(cached(tmp_path)) == 192
    for process in processes:
        process.join(30)
        assert not process.is_alive()


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9"])
def test_a_ray_cluster_that_is_not_there_is_told_with_what_starts_one(address: str) -> None:
    pytest.importorskip("ray", reason="comes with the ray extra")
    expected = rf"--ray {re.escape(address)}: no Ray cluster(.|\n)*ray start --head"
    with pytest.raises(InputError, match=expected):
        start_ray_workers(address, n_threads=1)


def test_a_ray_cluster_of_which_one_node_is_killed_gives_the_bits_of_one_process(
    alone: tuple[SuiteRun, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    pytest.importorskip("ray", reason="comes with the ray extra")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        with start_ray_workers(cluster.address, n_threads=1) as workers:
            assert len(workers) == 2

            def kill() -> None:
                # Keep the node through which this process talks to the cluster.
                own_node = ray.get_runtime_context().get_node_id()
                other_node = next(node for node in nodes if node.node_id != own_node)
                (raylet,) = other_node.all_processes["raylet"]
                # Kill all processes of the node, as a power failure would. An actor outlives its
                # raylet by up to a second, in which it may finish all remaining shards.
                for process in psutil.Process(raylet.process.pid).children(recursive=True):
                    process.kill()
                cluster.remove_node(other_node, allow_graceful=False)

            run, notes = run_killing(workers, tmp_path, kill)
            assert workers.n_lost >= 1
    finally:
        cluster.shutdown()
    assert any("was lost" in note for note in notes)
    assert_same_bits(run, tmp_path, alone)


class Listening(LocalEncoding):
    """Encodes in this process. Keeps the shards that it was told to expect or asked for."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__(encoder, 32)
        self.expected: list[Shard] = []
        self.asked: list[Shard] = []

    def __call__(self, shards: Sequence[Shard], progress: Progress) -> Any:
        self.asked += shards
        return super().__call__(shards, progress)

    def expect(self, shards: Sequence[Shard]) -> None:
        self.expected += shards

    def forget(self, shards: Sequence[Shard]) -> None:
        assert set(shards) <= set(self.asked)

    def when_all_started(self, start_next: Callable[[], None]) -> None:
        raise AssertionError("nothing comes after this run")


def test_the_texts_of_tasks_are_known_in_advance_and_scores_stay_the_same(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suite has a task of every type. Some texts occur in two tasks."""
    monkeypatch.setattr(shards, "SHARD_TEXTS", 24)
    tasks: list[dict[str, Any]] = [
        {"task": "MiniRetrieval"},
        {"task": "MiniTopicClustering", "subsets": ["en"]},
        {"task": "MiniIntentClassification"},
        {"task": "MiniBitextMining", "subsets": ["en-fr"]},
        {"task": "MiniSTS", "subsets": ["en", "fr"]},
    ]
    suite = SUITE.model_validate({"schema": "gteopt.suite/1", "name": "types", "tasks": tasks})
    listening = Listening(nano)
    run = run_suite(nano, suite, store=tmp_path, options=SuiteEncodeOptions(encode=listening))
    assert not run.failed
    assert listening.expected == listening.asked
    assert len(set(listening.asked)) == len(listening.asked) > 40
    # The same vectors are scored again without looking ahead.
    shutil.rmtree(tmp_path / "tasks")
    again = run_suite(nano, suite, store=tmp_path)
    assert again.encodings.n_encoded == 0
    assert again.scores == run.scores


@pytest.mark.parametrize("grid", [None, parse_vector_grid("128", "float32,int8")])
def test_the_next_variant_is_begun_before_the_last_one_is_scored(
    grid: VectorGrid | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"base": "nano", "eight": str(tmp_path / "eight")}
    gteopt.quantize("nano", "rtn-int8", sources["eight"], device="cpu")
    begun: list[str] = []
    at_comparison: list[int] = []
    submit = ScoreWorkers.submit

    def noting(self: ScoreWorkers, job: WorkerJob, shard: Shard) -> Any:
        begun.append(job.source)
        return submit(self, job, shard)

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("base: comparing"):
            at_comparison.append(begun.count(sources["eight"]))

    monkeypatch.setattr(ScoreWorkers, "submit", noting)
    with start_local_workers(["cpu"]) as workers:
        setup = EvaluationSetup(device="cpu", workers=workers, grid=grid)
        with_workers = evaluate_suite(
            sources, SUITE, tmp_path / "there", how=setup, progress=progress
        )
    # Every shard is begun once. The second model's shards follow those of the first model.
    n_shards = begun.count("nano")
    assert begun == ["nano"] * n_shards + [sources["eight"]] * n_shards
    assert set(at_comparison) == {4}
    setup_alone = EvaluationSetup(device="cpu", grid=grid)
    without_workers = evaluate_suite(
        sources, SUITE, tmp_path / "here", how=setup_alone, progress=ignore_progress
    )
    assert cached(tmp_path / "there" / "scores") == cached(tmp_path / "here" / "scores")
    for name, report in without_workers.items():
        assert with_workers[name].tasks == report.tasks
        assert with_workers[name].n_encoded_texts == report.n_encoded_texts
    assert sum(report.n_encoded_texts for report in without_workers.values()) > 0


def test_what_a_worker_raises_is_raised_here_and_it_lives_on(nano: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    broken = gteopt.load("nano", device="cpu")
    shutil.copytree(broken.checkpoint.folder, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    shard = Shard("document", None, ("a text",))
    with start_local_workers(["cpu"]) as workers:
        encoder = describe_encoder(folder, device="cpu")
        with pytest.raises(NumericsError, match="NaN"):
            list(workers.encoding(encoder, str(folder), hub_dir=None)([shard], ignore_progress))
        # The expected hash is another model's, as on a node with other files.
        elsewhere = workers.encoding(encoder, "nano", hub_dir=None)
        with pytest.raises(IntegrityError, match="holds other files"):
            list(elsewhere([shard], ignore_progress))
        # An error that gteopt does not foresee: torch refuses to compute without a thread.
        unforeseen = workers.encoding(nano, "nano", hub_dir=None)
        unforeseen._job = replace(unforeseen._job, n_threads=0)
        with pytest.raises(UnsupportedError, match=r"RuntimeError: set_num_threads expects"):
            list(unforeseen([shard], ignore_progress))
        ((_, vectors),) = workers.encoding(nano, "nano", hub_dir=None)([shard], ignore_progress)
        assert workers.n_lost == 0
    np.testing.assert_array_equal(vectors, nano.embed(["a text"]))


def test_an_encoder_that_is_only_described_knows_all_but_its_weights(nano: Encoder) -> None:
    description = describe_encoder("nano", device="cpu")
    assert (description.sha256, description.full_dims, description.dtype) == (
        nano.sha256,
        256,
        torch.bfloat16,
    )
    assert description.tokenization.prompt("query", "Find.") == nano.tokenization.prompt(
        "query", "Find."
    )


@pytest.mark.parametrize("devices", ["", "cpu,cuda:0", "cuda,cuda", "cuda:0,cuda:0"])
def test_devices_that_make_no_sense_are_refused(devices: str) -> None:
    with pytest.raises(InputError, match="name each GPU once"):
        parse_devices(devices)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(UnsupportedError, match=r"torch sees 0 GPU\(s\)"):
        parse_devices("cuda:0, cuda:1")
