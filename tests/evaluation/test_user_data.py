"""A user's own data become a task. All faults of the data are reported at once."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gteopt
from gteopt.build.fit_vectors import fit_transforms
from gteopt.commands.evaluate import EvaluationSetup, VectorGrid, evaluate_suite, evaluate_texts
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError
from gteopt.evaluation.compare import compare_with_baseline
from gteopt.evaluation.fidelity import make_fidelity_sample, score_fidelity
from gteopt.evaluation.mini_tasks import mini_rows
from gteopt.evaluation.runner import run_suite
from gteopt.evaluation.suites import Suite, add_own_task
from gteopt.evaluation.tasks import load_suite
from gteopt.evaluation.user_data import Collection, Pairs, read_own_data, read_texts
from gteopt.progress import ignore_progress
from gteopt.records.evaluation import FidelityReport
from gteopt.records.examples import Examples
from gteopt.records.files import read_record
from gteopt.records.results_folder import read_results
from gteopt.report.html import html_page
from gteopt.report.terminal import fidelity_table


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def beir(folder: Path) -> Path:
    """The mini retrieval task as a user would bring it."""
    corpus = [{"_id": row["id"], "text": row["text"]} for row in mini_rows("corpus")]
    queries = [{"_id": row["id"], "text": row["text"]} for row in mini_rows("queries")]
    write_lines(folder / "corpus.jsonl", corpus)
    write_lines(folder / "queries.jsonl", [*queries, {"_id": "unjudged", "text": "?"}])
    lines = [f"{r['query_id']}\t{r['corpus_id']}\t{r['score']}" for r in mini_rows("qrels")]
    (folder / "qrels").mkdir()
    heading = "query-id\tcorpus-id\tscore"
    (folder / "qrels" / "test.tsv").write_text("\n".join([heading, *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


def test_own_data_score_as_the_same_data_do_as_a_task(nano: Encoder, tmp_path: Path) -> None:
    pairs = [row for row in mini_rows("sts") if row["language"] == "en"]
    path = tmp_path / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, ["sentence1", "sentence2", "score"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(pairs)
    tasks = [{"task": "MiniRetrieval"}, {"task": "MiniSTS", "subsets": ["en"]}]
    theirs = Suite.model_validate({"schema": "gteopt.suite/1", "name": "both", "tasks": tasks})
    suite = add_own_task(add_own_task(theirs, beir(tmp_path / "library")), path)
    run = run_suite(nano, suite)
    assert not run.failed
    score_of = {row.task: row.score for row in run.scores}
    assert score_of["library"] == pytest.approx(score_of["MiniRetrieval"], abs=1e-9)
    assert score_of["pairs"] == pytest.approx(score_of["MiniSTS"], abs=1e-9)
    of_task = {row.task: row for row in run.scores}
    assert of_task["library"].n_samples == len(mini_rows("queries"))
    assert of_task["library"].dataset_revision.startswith("sha256:")


def test_a_suite_with_own_data_is_known_by_what_they_hold_wherever_they_lie(
    nano: Encoder, tmp_path: Path
) -> None:
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i} for i in range(12)]
    write_lines(tmp_path / "pairs.jsonl", rows)
    write_lines(tmp_path / "moved" / "pairs.jsonl", rows)
    write_lines(tmp_path / "longer" / "pairs.jsonl", [*rows, rows[0] | {"score": 9}])
    original, moved, longer = (
        run_suite(nano, add_own_task(None, tmp_path / name), store=tmp_path / "store")
        for name in ("pairs.jsonl", "moved/pairs.jsonl", "longer/pairs.jsonl")
    )
    assert original.suite_sha256 == moved.suite_sha256 != longer.suite_sha256
    assert (
        compare_with_baseline(original, moved, variant_name="moved").suite_sha256
        == original.suite_sha256
    )
    with pytest.raises(InputError, match="with other tasks or data"):
        compare_with_baseline(original, longer, variant_name="longer")


def test_own_queries_carry_the_users_instruction(nano: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    texts = ["a cat", "a dog", "a boat", "a ship"]
    write_lines(path, [{"text1": t, "text2": "a ship", "label": i} for i, t in enumerate(texts)])
    run = run_suite(nano, add_own_task(None, path, instruction="Find vessels."))
    assert [result.instruction for result in run.scores] == ["Find vessels."]


def test_cranfield_is_read_whole(shared: Path) -> None:
    collection = read_own_data(shared / "beir" / "cranfield")
    assert isinstance(collection, Collection)
    assert (len(collection.corpus), len(collection.queries)) == (1400, 225)
    assert list(collection.qrels) == ["test"]


def test_every_fault_of_a_collection_is_named_with_its_line(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    write_lines(folder / "corpus.jsonl", [{"_id": "d1", "text": "one"}, {"_id": "d1", "text": ""}])
    with (folder / "corpus.jsonl").open("a") as handle:
        handle.write("{not json\n[]\n")
    write_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "?"}, {"_id": "q2"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1 d1 1\nq1\td9\t1\nq9\td1\t1\nq1\td1\tyes\n"
    )
    # The first line is no heading: its first cell is a query, though its third is no number.
    (folder / "qrels" / "train.tsv").write_text("q1\td1\tone\nq1\td1\t1\nq1\td1\t2\n")
    with pytest.raises(InputError) as caught:
        read_own_data(folder)
    message = str(caught.value)
    assert "has 10 problem(s)" in message
    for expected in (
        "corpus.jsonl:2: _id 'd1' occurs twice",
        "corpus.jsonl:3: not JSON",
        "corpus.jsonl:4: must be a JSON object",
        "queries.jsonl:2: must have an _id and a text",
        "test.tsv:3: must be query id, document id and a whole grade up to 1,000",
        "test.tsv:4: document 'd9' is not in corpus.jsonl",
        "test.tsv:5: query 'q9' is not in queries.jsonl",
        "test.tsv:6: must be query id",
        "train.tsv:1: must be query id",
        "train.tsv:3: document 'd1' has another grade for query 'q1' in an earlier line",
    ):
        assert expected in message


def test_one_fault_of_a_file_is_told_once(tmp_path: Path) -> None:
    """An unreadable file judges nothing as relevant, but that is no second fault."""
    write_lines(tmp_path / "corpus.jsonl", [{"_id": "d1", "text": "one"}])
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "?"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_bytes(b"q1\td1\t1\n\xff\n")
    with pytest.raises(InputError, match=r"1 problem\(s\)(.|\n)*is not UTF-8 text"):
        read_own_data(tmp_path)
    (tmp_path / "qrels" / "test.tsv").write_text("q1\td1\t0\n")
    with pytest.raises(InputError, match=r"1 problem\(s\)(.|\n)*judges no document as relevant"):
        read_own_data(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"_id": "d1", "text": "caf\xe9"}', "corpus.jsonl:2: is not UTF-8 text"),
        (b'{"_id": "d1", "text": "\\ud83d"}', "corpus.jsonl:2: 'text' holds half a surrogate pair"),
        (b"[" * 100_000, "corpus.jsonl:2: is nested too deeply to be read"),
        (b'{"_id": ' + b"9" * 5000 + b"}", "corpus.jsonl:2: holds a number with too many digits"),
        (b'{"_id": "d1", "text": "a", "title": ["b"]}', "corpus.jsonl:2: title must be a text"),
    ],
)
def test_a_line_that_no_library_can_read_is_named(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "?"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("q1\td0\t1\n")
    (tmp_path / "corpus.jsonl").write_bytes(b'{"_id": "d0", "text": "one"}\n' + content + b"\n")
    with pytest.raises(InputError) as caught:
        read_own_data(tmp_path)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_numbers_as_ids_and_titles_are_texts_and_a_line_separator_ends_no_line(
    tmp_path: Path,
) -> None:
    rows = [{"_id": 1, "title": 1984, "text": "one\u2028two"}, {"_id": "2", "text": "three"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "corpus.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "?"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("q1\t1\t1\n")
    collection = read_own_data(tmp_path)
    assert isinstance(collection, Collection)
    assert collection.corpus[0] == {"id": "1", "title": "1984", "text": "one\u2028two"}


@pytest.mark.parametrize("grade", [str(2**62), "1e300", "1001", "0.5", "inf", "9" * 400])
def test_grades_that_the_metric_library_cannot_count_are_refused(
    tmp_path: Path, grade: str
) -> None:
    write_lines(tmp_path / "corpus.jsonl", [{"_id": "d1", "text": "one"}])
    write_lines(tmp_path / "queries.jsonl", [{"_id": "q1", "text": "?"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text(f"q1\td1\t{grade}\n")
    with pytest.raises(InputError, match=r"test\.tsv:1: .*a whole grade up to 1,000"):
        read_own_data(tmp_path)
    table = tmp_path / "pairs.jsonl"
    table.write_text(f'{{"query": "q", "positive": "p", "score": "{grade}"}}\n')
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: .*a whole grade up to 1,000"):
        read_own_data(table)


def test_a_long_cell_of_a_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    long = "x" * 140_000
    path.write_text(f"sentence1,sentence2,score\n{long},b,1\nc,d,2\ne,f,3\n")
    pairs = read_own_data(path)
    assert isinstance(pairs, Pairs)
    assert pairs.first[0] == long


def test_missing_files_of_a_collection_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_own_data(tmp_path)
    for expected in ("corpus.jsonl", "queries.jsonl", "qrels/*.tsv"):
        assert f"no file {tmp_path}/{expected}" in str(caught.value)
    with pytest.raises(InputError, match="does not exist"):
        read_own_data(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("sentence1,sentence2,score\na,b,1\nc,d,x\n", "pairs.csv:3: score is 'x', must be"),
        (
            "one,two,score\na,b,1\n",
            "pairs.csv: the column names are not recognised; found one, two",
        ),
        ("sentence1,sentence2,score\na,b,1\nc,d,1\ne,f,1\n", "every score is 1"),
        ("sentence1,sentence2,score\na,b,1\n", "1 pairs; a rank correlation needs at least 3"),
        ("sentence1,sentence2,score\na,b,nan\n", "must be a number"),
    ],
)
def test_faults_of_pairs_are_named(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        read_own_data(path)
    assert expected in str(caught.value)


def test_faulty_own_data_stop_a_run_beside_other_missing_data(
    nano: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\n")
    with pytest.raises(InputError) as caught:
        run_suite(nano, add_own_task(load_suite("stsb"), path), hub_dir=tmp_path)
    own_faults, lacking = str(caught.value).split("suite stsb-own", 1)
    assert "1 pairs" in own_faults
    assert lacking.startswith(" lacks data")
    assert "mteb/banking77" in lacking
    with pytest.raises(InputError) as caught:
        run_suite(nano, add_own_task(None, path))
    assert str(caught.value).startswith(f"{path} has 1 problem(s)")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_pairs_are_read_whatever_separates_their_columns(tmp_path: Path, separator: str) -> None:
    rows = [("sentence1", "sentence2", "score"), *(("a, b; c", f"d {i}", f"{i}") for i in range(3))]
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as handle:
        csv.writer(handle, delimiter=separator).writerows(rows)
    pairs = read_own_data(path)
    assert isinstance(pairs, Pairs)
    assert pairs.first == ("a, b; c",) * 3
    assert (pairs.second, pairs.scores) == (("d 0", "d 1", "d 2"), (0.0, 1.0, 2.0))


def test_own_data_may_not_take_the_name_of_a_task(nano: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "STSBenchmark.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\nc,d,2\ne,f,3\n")
    assert isinstance(read_own_data(path), Pairs)
    with pytest.raises(InputError, match="is mteb's; give your own data another name"):
        run_suite(nano, add_own_task(None, path))


@pytest.fixture
def own_texts(tmp_path: Path) -> tuple[Path, list[str]]:
    """A file of texts with an empty line and a repetition, and its different texts."""
    path = tmp_path / "texts.txt"
    texts = [row["text"].replace("\n", " ").strip() for row in mini_rows("corpus")][:60]
    path.write_text("\n".join([*texts, "", texts[0]]) + "\n", encoding="utf-8")
    return path, texts


def test_own_texts_give_fidelity_without_labels(own_texts: tuple[Path, list[str]]) -> None:
    path, texts = own_texts
    assert read_texts(path) == texts
    sources = {"baseline": "nano", "same": "nano"}
    report = evaluate_texts(
        sources, path, None, how=EvaluationSetup(device="cpu"), progress=ignore_progress
    )["same"]
    assert report.fidelity.n_texts == 60
    assert report.fidelity.neighbour_overlap == 1
    np.testing.assert_allclose(
        [report.fidelity.mean_cosine, report.fidelity.spearman], 1, atol=1e-6
    )
    assert report.texts == "texts.txt"


def test_own_texts_are_encoded_once_for_every_length_code_and_run(
    nano: Encoder, own_texts: tuple[Path, list[str]], tmp_path: Path
) -> None:
    path, texts = own_texts
    sources = {"base": "nano", "same": "nano"}
    grid = VectorGrid((256, 32), ("float32", "binary"))

    def compared() -> dict[str, FidelityReport]:
        setup = EvaluationSetup(device="cpu", grid=grid)
        return evaluate_texts(sources, path, tmp_path, how=setup, progress=ignore_progress)

    first_reports = compared()
    took = {
        name: (report.n_asked_texts, report.n_encoded_texts)
        for name, report in first_reports.items()
    }
    rows = [f"{name}-{n}-{code}" for name in sources for n in grid.dims for code in grid.codes]
    # "same" has the weights of "base", so that even its first row finds everything.
    assert took == {row: (60, 60 if row == rows[0] else 0) for row in rows}
    assert "texts encoded: 60; encodings saved: 420" in str(fidelity_table(first_reports).caption)
    # An oracle: the vectors of one call, without cache and rounding.
    vectors = nano.embed(texts)
    sample = make_fidelity_sample(texts, vectors)
    for row, transform in zip(rows, fit_transforms(nano, grid.dims, grid.codes), strict=False):
        expected = score_fidelity(sample, sample, transform)
        measured = first_reports[row].fidelity
        assert measured.neighbour_overlap == pytest.approx(expected.neighbour_overlap, abs=0.005)
        assert measured.spearman == pytest.approx(expected.spearman, abs=0.005)
        assert first_reports[row].bytes_per_vector == transform.bytes_per_vector
        assert first_reports[row] == read_record(
            tmp_path / "fidelity" / f"{row}.json", FidelityReport
        )
    # A second run encodes nothing and reports the same. One more text is encoded alone.
    second_reports = compared()
    assert not any(report.n_encoded_texts for report in second_reports.values())
    assert {n: e.fidelity for n, e in second_reports.items()} == {
        n: e.fidelity for n, e in first_reports.items()
    }
    path.write_text(path.read_text(encoding="utf-8") + "One more.\n", encoding="utf-8")
    assert sum(report.n_encoded_texts for report in compared().values()) == 1


def test_examples_are_written_only_where_they_are_asked_for(
    own_texts: tuple[Path, list[str]], tmp_path: Path
) -> None:
    path, texts = own_texts
    out = tmp_path / "out"
    plain = EvaluationSetup(device="cpu", grid=VectorGrid((32,), ("binary",)))
    sources = {"base": "nano", "same": "nano"}
    file = out / "examples" / "same-32-binary.json"

    keeping = replace(plain, examples=True)
    evaluate_texts(sources, path, out, how=plain, progress=ignore_progress)
    assert not (out / "examples").exists()
    evaluate_texts(sources, path, out, how=keeping, progress=ignore_progress)
    stored = read_record(file, Examples)
    assert len(stored.examples) == 10
    assert {example.text for example in stored.examples} <= set(texts)
    assert stored == read_results(out).examples["same-32-binary"]
    report = html_page(read_results(out), title="own")
    assert html.escape(stored.examples[0].text[:200]) in report
    # A run without examples leaves no texts of the run before.
    evaluate_texts(sources, path, out, how=plain, progress=ignore_progress)
    assert not file.exists()
    assert html.escape(stored.examples[0].text[:200]) not in html_page(
        read_results(out), title="own"
    )
    with pytest.raises(InputError, match="give --out"):
        evaluate_texts(sources, path, None, how=keeping, progress=ignore_progress)


def test_examples_of_an_own_collection_are_its_queries_with_its_documents(tmp_path: Path) -> None:
    folder = beir(tmp_path / "mine")
    setup = EvaluationSetup(device="cpu", grid=VectorGrid((32,), ("binary",)), examples=True)
    # The texts of another task of the suite are no examples.
    sts = next(task for task in load_suite("mini").tasks if task.task == "MiniSTS")
    mini = load_suite("mini").model_copy(update={"tasks": (sts,)})
    suite = add_own_task(mini, folder, instruction="Find what answers the question")
    sources = {"base": "nano", "same": "nano"}
    evaluate_suite(sources, suite, tmp_path / "out", how=setup, progress=ignore_progress)
    examples_of = read_results(tmp_path / "out").examples
    assert set(examples_of) == {"base-32-binary", "same-32-binary"}
    queries = {row["text"] for row in mini_rows("queries")}
    documents = {row["text"] for row in mini_rows("corpus")}
    examples = examples_of["same-32-binary"].examples
    assert len(examples) == 10
    assert {example.text for example in examples} <= queries
    for example in examples:
        assert len(example.before) == len(example.after) == 10
        assert {*example.before, *example.after} <= documents
    assert examples_of["same-32-binary"].texts == "mine"


def test_too_few_or_broken_texts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\nnonsense\n')
    with pytest.raises(InputError) as caught:
        read_texts(path)
    assert "texts.jsonl:2: field text must be a text" in str(caught.value)
    assert "texts.jsonl:3: not JSON" in str(caught.value)
    repeated = tmp_path / "one.txt"
    repeated.write_text("a\na\n")
    with pytest.raises(InputError, match="1 different texts"):
        read_texts(repeated)
