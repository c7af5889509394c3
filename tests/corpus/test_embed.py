"""An embedding job stores the encoder's vector of each row, and lists the rows that it lacks."""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gteopt
from gteopt.config.recipe import Dims, VectorCode, Vectors
from gteopt.corpus.ids import count_duplicate_ids
from gteopt.corpus.jobs import JobRequest, lock_job, prepare_job
from gteopt.corpus.options import EmbedOptions, TextTemplate, parse_long_texts
from gteopt.corpus.plan import read_embedding_record
from gteopt.corpus.rows import RowRange
from gteopt.corpus.shard_encoder import AHEAD, ShardEncoder
from gteopt.corpus.shard_files import (
    DecodeRecord,
    ShardContent,
    ShardRecord,
    read_done_footers,
    read_footer,
    read_shard_vectors,
    shard_to_parquet,
)
from gteopt.corpus.storage import StorageFolder
from gteopt.corpus.verify import verify_shards
from gteopt.encoder.description import EncoderDescription
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError, IntegrityError, UnsupportedError
from gteopt.vectors.fit import fit_vector_transform
from tests.support.embedding import (
    TEXTS,
    dead,
    embed_with,
    folder_bytes,
    stored,
    vectors,
    write_jsonl,
)


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl")


def test_rows_come_in_the_order_of_the_input_with_the_encoders_own_vectors(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    report = embed_with(nano, corpus, tmp_path / "out", id="id", keep="n")
    table = stored(tmp_path / "out")
    assert table["id"].to_pylist() == [f"d{i}" for i in range(len(TEXTS))]
    assert table["row"].to_pylist() == list(range(len(TEXTS)))
    assert table["n"].to_pylist() == [str(i) for i in range(len(TEXTS))]
    shards = [TEXTS[start : start + 16] for start in range(0, len(TEXTS), 16)]
    expected = np.concatenate([nano.encode(shard) for shard in shards])
    np.testing.assert_array_equal(vectors(table).astype(np.float32), expected)
    assert (report.n_rows, report.n_embedded, report.n_bad) == (40, 40, 0)


def test_a_finished_job_is_left_as_it_is(nano: Encoder, corpus: Path, tmp_path: Path) -> None:
    embed_with(nano, corpus, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    report = embed_with(nano, corpus, tmp_path / "out")
    assert (report.shards_now, report.shards_before) == (0, 3)
    assert folder_bytes(tmp_path / "out") == before


def test_a_lost_or_cut_shard_is_embedded_again_to_the_same_bytes(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    embed_with(nano, corpus, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    first, second, _ = sorted((tmp_path / "out" / "data").iterdir())
    first.unlink()
    os.truncate(second, second.stat().st_size - 1)
    assert embed_with(nano, corpus, tmp_path / "out").shards_now == 2
    assert folder_bytes(tmp_path / "out") == before


def test_rows_that_cannot_be_embedded_are_dead_letters_with_reasons(
    nano: Encoder, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", ["good", "", 7, None, "  ", "half \ud800", "last"])
    with path.open("ab") as handle:
        handle.write(b"{not json}\n\n" + b'{"text": "\xff\xfe"}\n')
    report = embed_with(nano, path, tmp_path / "out", id="id")
    reasons = [(letter["row"], letter["id"], letter["reason"]) for letter in dead(tmp_path / "out")]
    assert reasons == [
        (1, "d1", "empty"),
        (2, "d2", "not_text"),
        (3, "d3", "not_text"),
        (4, "d4", "empty"),
        (5, "d5", "unreadable"),
        (7, "c.jsonl:7", "unreadable"),
        (8, "c.jsonl:8", "unreadable"),
    ]
    assert stored(tmp_path / "out")["row"].to_pylist() == [0, 6]
    assert report.n_rows == report.n_embedded + report.n_bad == 9


def test_a_text_whose_vector_is_not_finite_is_a_dead_letter_and_its_batch_is_not(
    tmp_path: Path,
) -> None:
    encoder = gteopt.load("nano", device="cpu")
    table = encoder.module.get_input_embeddings()  # type: ignore[operator]
    poisoned = encoder.tokenization.tokenize(["zebra"])[0][0]
    table.weight.data[poisoned] = float("nan")
    path = write_jsonl(tmp_path / "c.jsonl", ["one wing", "zebra", "two wings"])
    report = embed_with(encoder, path, tmp_path / "out")
    assert report.bad == {"not_finite": 1}
    assert stored(tmp_path / "out")["row"].to_pylist() == [0, 2]


def test_retry_failed_embeds_again_what_the_model_could_not(tmp_path: Path, nano: Encoder) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", ["one wing", "zebra", *TEXTS])
    sick = gteopt.load("nano", device="cpu")
    table = sick.module.get_input_embeddings()  # type: ignore[operator]
    table.weight.data[sick.tokenization.tokenize(["zebra"])[0][0]] = float("nan")
    assert embed_with(sick, path, tmp_path / "out").n_bad == 1
    report = embed_with(nano, path, tmp_path / "out", retry_failed=True)
    assert (report.n_bad, report.shards_now) == (0, 1)
    embed_with(nano, path, tmp_path / "never_sick")
    retried, never_failed = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "never_sick")
    assert retried == never_failed


@pytest.mark.parametrize("mode", ["error", "truncate"])
def test_long_texts_are_dead_letters_or_truncated_and_counted(
    nano: Encoder, tmp_path: Path, mode: str
) -> None:
    long = "a wing of a bird " * nano.tokenization.max_tokens
    path = write_jsonl(tmp_path / "c.jsonl", ["short", long])
    report = embed_with(nano, path, tmp_path / "out", long=mode)
    if mode == "error":
        assert report.bad == {"too_long": 1}
    else:
        assert (report.n_bad, report.n_cut) == (0, 1)


def test_a_chunk_is_a_part_of_its_document_and_has_that_parts_vector(
    nano: Encoder, tmp_path: Path
) -> None:
    texts = ["short", " ".join(f"word{i} flies" for i in range(60))]
    path = write_jsonl(tmp_path / "c.jsonl", texts)
    embed_with(nano, path, tmp_path / "out", id="id", long="chunk:32:8")
    table = stored(tmp_path / "out")
    rows = table.drop_columns(["vector"]).to_pylist()
    assert rows[0] | {"file": ""} == {
        "id": "d0", "file": "", "row": 0, "chunk": 0, "start": 0, "end": 5,
    }  # fmt: skip
    assert len(rows) > 5
    assert [row["chunk"] for row in rows[1:]] == list(range(len(rows) - 1))
    assert {row["id"] for row in rows[1:]} == {"d1"}
    assert (rows[1]["start"], rows[-1]["end"]) == (0, len(texts[1]))
    for before, after in pairwise(rows[1:]):
        assert after["start"] < before["end"]
    parts = [texts[row["row"]][row["start"] : row["end"]] for row in rows]
    assert max(nano.tokenization.lengths(parts)) <= 32 + 4
    np.testing.assert_allclose(vectors(table), nano.encode(parts), atol=2e-2)


def test_pooled_chunks_are_the_mean_of_the_chunks_vectors(nano: Encoder, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", ["short", "wing " * 100])
    embed_with(nano, path, tmp_path / "chunks", long="chunk:32")
    embed_with(nano, path, tmp_path / "pooled", long="chunk:32", pool="mean")
    chunks, pooled = stored(tmp_path / "chunks"), stored(tmp_path / "pooled")
    rows = np.array(chunks["row"].to_pylist())
    mean = np.stack([vectors(chunks)[rows == row].mean(axis=0) for row in (0, 1)])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert "chunk" not in pooled.column_names
    np.testing.assert_allclose(vectors(pooled), mean, atol=1e-5)


def test_codes_are_stored_as_the_artifact_fits_them_and_decode_from_the_files_own_metadata(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    encoder = gteopt.load("nano", device="cpu")
    encoder.vectors = fit_vector_transform(
        encoder.embed(TEXTS), Dims(n=32, method="slice"), Vectors(code="int8", rescore=4)
    )
    embed_with(encoder, corpus, tmp_path / "out")
    table = stored(tmp_path / "out")
    expected = np.concatenate(
        [encoder.vectors.quantize(encoder.encode(TEXTS[s : s + 16])) for s in (0, 16, 32)]
    )
    np.testing.assert_array_equal(vectors(table), expected)
    path = sorted((tmp_path / "out" / "data").iterdir())[0]
    decoding = json.loads(pq.read_metadata(path).metadata[b"gteopt.decode"])
    low, high = (
        np.frombuffer(base64.b64decode(decoding["tensors"][end]["base64"]), "<f4")
        for end in ("low", "high")
    )
    decoded = low + (vectors(table) + 128) * (high.astype(float) - low) / 255
    np.testing.assert_allclose(decoded, encoder.vectors.dequantize(expected), rtol=1e-6)
    # A number takes about one byte, although Parquet has no type of one byte.
    column = pq.read_metadata(path).row_group(0)
    sizes = {
        column.column(i).path_in_schema: column.column(i).total_compressed_size
        for i in range(column.num_columns)
    }
    assert sizes["vector.list.element"] < 16 * 32 * 1.3 + 1500


@pytest.mark.parametrize("code", ["int4", "binary", "rabitq"])
def test_other_codes_decode_from_embedding_json(code: VectorCode, tmp_path: Path) -> None:
    encoder = gteopt.load("nano", device="cpu")
    encoder.vectors = fit_vector_transform(
        encoder.embed(TEXTS), Dims(n=32, method="pca"), Vectors(code=code)
    )
    corpus = write_jsonl(tmp_path / "c.jsonl", TEXTS[:16])
    embed_with(encoder, corpus, tmp_path / "out")
    record = read_embedding_record(StorageFolder(tmp_path / "out"))
    assert record is not None
    codes = read_shard_vectors(stored(tmp_path / "out"), record.decode)
    expected = encoder.vectors.quantize(encoder.encode(TEXTS[:16]))
    np.testing.assert_array_equal(codes, expected)
    np.testing.assert_array_equal(
        record.decode.transform().dequantize(codes), encoder.vectors.dequantize(expected)
    )


def test_a_codebook_is_kept_in_embedding_json_and_not_in_every_shard(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(240, 16)).astype(np.float32)
    transform = fit_vector_transform(rows, None, Vectors(code="pq", bytes=4))
    codes = transform.quantize(transform.project(rows))
    decode = DecodeRecord.model_validate_json(DecodeRecord.of(transform, "pq").model_dump_json())
    np.testing.assert_array_equal(decode.transform().dequantize(codes), transform.dequantize(codes))
    content = ShardContent("c", np.arange(240), [""] * 240, None, codes, pa.table({}))
    record = ShardRecord.model_construct(bad={})
    (tmp_path / "a.parquet").write_bytes(shard_to_parquet(content, record, decode, "list"))
    assert (tmp_path / "a.parquet").stat().st_size < 256 * 16 * 4


def test_float16_is_the_rounded_float32(nano: Encoder, corpus: Path, tmp_path: Path) -> None:
    embed_with(nano, corpus, tmp_path / "f32")
    embed_with(nano, corpus, tmp_path / "f16", code="float16", vector_type="fixed_size_list")
    f32, f16 = stored(tmp_path / "f32"), stored(tmp_path / "f16")
    assert str(f16["vector"].type) == "fixed_size_list<element: halffloat>[256]"
    np.testing.assert_array_equal(vectors(f16).astype(np.float16), vectors(f32).astype(np.float16))


def test_another_jobs_folder_is_refused_with_every_difference(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    embed_with(nano, corpus, tmp_path / "out")
    write_jsonl(tmp_path / "new.jsonl")
    with pytest.raises(InputError) as caught:
        embed_with(
            nano,
            [str(corpus), str(tmp_path / "new.jsonl")],
            tmp_path / "out",
            shard_rows=8,
            role="query",
        )
    message = str(caught.value)
    assert "role is 'query', and was 'document'" in message
    assert "shard_rows is '8', and was '16'" in message
    assert "1 files are new (new.jsonl); --grow adds them" in message


def test_grow_adds_new_files_and_leaves_the_shards_of_the_others(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    embed_with(nano, corpus, tmp_path / "out")
    before = folder_bytes(tmp_path / "out" / "data")
    new = write_jsonl(tmp_path / "aa_new.jsonl", TEXTS[:5])
    report = embed_with(nano, [str(corpus), str(new)], tmp_path / "out", grow=True)
    after = folder_bytes(tmp_path / "out" / "data")
    assert before.items() <= after.items()
    assert (report.shards_now, report.n_rows) == (1, 45)
    assert stored(tmp_path / "out")["file"].to_pylist()[-5:] == ["aa_new.jsonl"] * 5


def test_a_folder_with_other_files_is_refused(nano: Encoder, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="holds other files"):
        embed_with(nano, corpus, tmp_path / "out")


def test_a_wrong_column_leaves_no_folder_behind(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no column body; it has id, text, n"):
        embed_with(nano, corpus, tmp_path / "out", text="body")
    assert not (tmp_path / "out").exists()
    embed_with(nano, corpus, tmp_path / "out")


def test_a_file_that_changes_during_the_job_stops_it(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    with lock_job(tmp_path / "out"):
        prepare_job(JobRequest((str(corpus),), "nano", tmp_path / "out", EmbedOptions()), nano)
    embed_with(nano, corpus, tmp_path / "out")
    sorted((tmp_path / "out" / "data").iterdir())[0].unlink()
    write_jsonl(corpus, TEXTS[:-1])
    with pytest.raises(InputError, match=r"corpus.jsonl has changed"):
        embed_with(nano, corpus, tmp_path / "out")


def test_the_content_of_the_first_of_several_writers_stays(tmp_path: Path) -> None:
    folder = StorageFolder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        wrote = list(pool.map(lambda i: folder.create("data/a", b"%d" % i), range(8)))
    assert sum(wrote) == 1
    assert folder.read("data/a") == b"%d" % wrote.index(True)
    assert not list((tmp_path / StorageFolder.TEMPORARY).iterdir())


def test_a_shard_that_another_worker_finished_meanwhile_stays(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    """On a bucket nobody holds a lock: two jobs may embed the same rows at once."""
    out = tmp_path / "out"
    embed_with(nano, corpus, out)
    before = folder_bytes(out)
    times = {path.name: path.stat().st_mtime_ns for path in (out / "data").iterdir()}
    job = prepare_job(JobRequest((str(corpus),), "nano", out, EmbedOptions(shard_rows=16)), nano)
    with ShardEncoder(job.task, nano) as worker:
        late = [worker.submit(shard).result() for shard in job.plan.shards.values()]
    assert [done.name for done in late] == sorted(times)
    assert {path.name: path.stat().st_mtime_ns for path in (out / "data").iterdir()} == times
    assert folder_bytes(out) == before


def test_a_job_in_this_process_computes_in_the_calling_thread_and_reads_few_shards_ahead(
    nano: Encoder, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = JobRequest((str(corpus),), "nano", tmp_path / "out", EmbedOptions(shard_rows=4))
    job = prepare_job(request, nano)
    read: list[RowRange] = []
    threads: set[int] = set()
    tokenize, start = ShardEncoder._tokenize, Encoder.start

    def counted(worker: ShardEncoder, shard: RowRange) -> Any:
        read.append(shard)
        return tokenize(worker, shard)

    def noted(encoder: Encoder, *args: Any, **options: Any) -> Any:
        threads.add(threading.get_ident())
        return start(encoder, *args, **options)

    monkeypatch.setattr(ShardEncoder, "_tokenize", counted)
    monkeypatch.setattr(Encoder, "start", noted)
    names: list[str] = []
    with ShardEncoder(job.task, nano) as worker:
        for done in worker.embed(job.plan.shards.values()):
            assert len(read) - len(names) <= AHEAD
            names.append(done.name)
    assert names == list(job.plan.shards)
    assert len(names) > 2 * AHEAD
    assert threads == {threading.get_ident()}


def test_a_machine_that_rounds_products_otherwise_does_not_go_on_with_a_job(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for 16-bit weights. In float32, machines differ only in the order of sums."""
    half = gteopt.load("nano", device="cpu", dtype="bfloat16")
    full = gteopt.load("nano", device="cpu", dtype="float32")
    embed_with(half, corpus, tmp_path / "short", dtype="bfloat16")
    embed_with(full, corpus, tmp_path / "whole", dtype="float32")
    monkeypatch.setattr(EncoderDescription, "arithmetic", "as another processor rounds")
    with pytest.raises(InputError, match="arithmetic is 'as another processor rounds', and was"):
        embed_with(half, corpus, tmp_path / "short", dtype="bfloat16")
    assert embed_with(full, corpus, tmp_path / "whole", dtype="float32").shards_now == 0
    read_only = prepare_job(
        JobRequest((str(corpus),), "nano", tmp_path / "short", EmbedOptions(shard_rows=16)),
        half,
        reads_only=True,
    )
    assert len(read_done_footers(read_only.folder, read_only.plan.expected())) == 3
    with pytest.raises(UnsupportedError, match="rounds products in another way"):
        replace(read_only.task, source="nano", arithmetic="int8 x 9 bits").load("cpu")


def test_events_and_report_say_what_each_worker_did(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    heard: list[Mapping[str, Any]] = []
    report = gteopt.embed(
        str(corpus), "nano", tmp_path / "out", device="cpu", devices="cpu,cpu", shard_rows=4,
        events=lambda event, facts: heard.append({"event": event, **json.loads(json.dumps(facts))}),
    )  # fmt: skip
    assert {worker.name for worker in report.workers} <= {"0 on cpu", "1 on cpu"}
    assert sum(worker.n_shards for worker in report.workers) == report.shards_now == 10
    assert sum(worker.n_texts for worker in report.workers) == 40
    shards = [event["worker"] for event in heard if event["event"] == "shard"]
    assert [worker.n_shards for worker in report.workers] == [
        max(s["n_shards"] for s in shards if s["name"] == worker.name) for worker in report.workers
    ]


def test_two_jobs_never_write_into_one_folder(nano: Encoder, corpus: Path, tmp_path: Path) -> None:
    with (
        lock_job(tmp_path / "out"),
        pytest.raises(InputError, match="another process is embedding"),
    ):
        embed_with(nano, corpus, tmp_path / "out")


def test_ids_that_are_there_twice_are_counted_and_refused_by_request(
    nano: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"id": i % 3, "text": f"t {i}"}) + "\n" for i in range(5)))
    with pytest.raises(InputError, match=r"repeats 2 ids of earlier rows \('0', '1'\)"):
        embed_with(nano, path, tmp_path / "out", id="id", unique_ids=True)
    assert embed_with(nano, path, tmp_path / "out", id="id").n_duplicate_ids == 2


def test_duplicates_are_counted_over_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gteopt.corpus.ids.HASHES_AT_ONCE", 10)
    batches = [[str(i % 77) for i in range(start, start + 10)] for start in range(0, 100, 10)]
    assert count_duplicate_ids(lambda: iter(batches), 100) == 23


def test_verify_accepts_a_sound_folder_and_names_what_is_wrong(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    embed_with(nano, corpus, out)
    request = JobRequest((str(corpus),), "nano", out, EmbedOptions(shard_rows=16))
    job = prepare_job(request, nano)
    checked = verify_shards(job, nano)
    assert (checked.n_rows, checked.n_vectors, checked.n_bad) == (40, 40, 0)
    assert checked.min_cosine is not None
    assert checked.min_cosine > 0.99
    path = sorted((out / "data").iterdir())[1]
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match=path.name):
        verify_shards(job, nano)


def test_verify_finds_vectors_of_another_text(nano: Encoder, tmp_path: Path) -> None:
    """Bytes and counts are right, but the corpus has changed without the job's knowledge."""
    path = write_jsonl(tmp_path / "c.jsonl", [f"alpha {i}" for i in range(20)])
    out = tmp_path / "out"
    known = path.stat()
    embed_with(nano, path, out)
    write_jsonl(path, [f"omega {i}" for i in range(20)])
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))
    request = JobRequest((str(path),), "nano", out, EmbedOptions(shard_rows=16))
    job = prepare_job(request, nano)
    with pytest.raises(
        IntegrityError, match="was embedded again: its cosine with the stored vector is"
    ):
        verify_shards(job, nano)


def test_footers_say_what_a_shard_holds(nano: Encoder, corpus: Path, tmp_path: Path) -> None:
    embed_with(nano, corpus, tmp_path / "out")
    folder = StorageFolder(tmp_path / "out")
    record = read_embedding_record(folder)
    assert record is not None
    assert record.complete
    for n, path in enumerate(sorted((tmp_path / "out" / "data").iterdir())):
        footer = read_footer(folder, path.name)
        assert footer is not None
        assert (footer.first, footer.fingerprint) == (16 * n, record.fingerprint)


def test_the_folder_does_not_depend_on_where_the_corpus_lies(
    nano: Encoder, corpus: Path, tmp_path: Path
) -> None:
    embed_with(nano, corpus, tmp_path / "one")
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy2(corpus, tmp_path / "moved"))
    embed_with(nano, moved, tmp_path / "two")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


@pytest.mark.parametrize("value", ["cut", "chunk:0", "chunk:10:10", "chunk:1:2:3"])
def test_a_malformed_long_option_is_refused(value: str) -> None:
    with pytest.raises(InputError, match="--long"):
        parse_long_texts(value)


def test_a_template_takes_numbers_and_leaves_out_what_is_missing() -> None:
    template = TextTemplate("{title} ({year}): {body}")
    assert template.fill({"title": "A", "year": 1999, "body": None})[0] == "A (1999):"
    assert template.fill({}) == (None, "none of the columns title, year, body")
    assert template.fill({"title": ["a"]}) == (None, "column title is list")
    with pytest.raises(InputError, match="--text"):
        TextTemplate("{title")
