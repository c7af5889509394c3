"""Texts are encoded once; a cold, a warm and an interrupted cache give the same bits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import gteopt
from gteopt.cli.app import main
from gteopt.config.recipe import Dims, VectorCode, Vectors
from gteopt.corpus.shards import SHARD_TEXTS, LocalEncoding, ShardEncodings
from gteopt.corpus.vector_cache import FORWARD_SCHEMA, VectorCache, vector_identity
from gteopt.encoder.encoder import Encoder
from gteopt.errors import UnsupportedError
from gteopt.evaluation.compare import compare_with_baseline
from gteopt.evaluation.fidelity import read_fidelity_sample, write_fidelity_sample
from gteopt.evaluation.runner import SuiteEncodeOptions, run_suite, run_views
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.views import view_of
from gteopt.vectors.fit import fit_vector_transform

TASKS: tuple[dict[str, Any], ...] = (
    {"task": "MiniSTS", "subsets": ["en"]},
    {"task": "MiniBitextMining", "subsets": ["en-fr"]},
    {"task": "MiniBitextMining", "subsets": ["en-pl"], "instruction": "Translate."},
)

VERSION_IN_KEYS = "gteopt.evaluation.task_store.version"
CODES: tuple[VectorCode, ...] = ("float32", "int8", "binary")


def suite_of(*tasks: dict[str, Any]) -> Suite:
    return Suite.model_validate({"schema": "gteopt.suite/1", "name": "test", "tasks": tasks})


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", device="cpu")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "int8"
    gteopt.quantize("nano", "rtn-int8", out)
    return out


def texts_of(n: int, salt: str = "") -> list[str]:
    return [f"{salt}Text number {i} is about {i * i} things." for i in range(n)]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


def test_a_cold_and_a_warm_cache_give_the_same_bits(nano: Encoder, tmp_path: Path) -> None:
    texts = texts_of(40)
    cold = VectorCache(nano, tmp_path)
    from_cold = cold.embed(texts, "query", "Find it.")
    warm = VectorCache(nano, tmp_path)
    from_warm = warm.embed(texts[::-1], "query", "Find it.")[::-1]
    np.testing.assert_array_equal(from_cold, from_warm)
    assert (cold.counts, warm.counts) == (ShardEncodings(40, 40), ShardEncodings(40, 0))
    plain = nano.embed(texts, role="query", instruction="Find it.")
    # Half a unit in the last place of float16, relative to the value.
    assert np.abs(from_cold - plain).max() <= 2**-11 * np.abs(plain).max()
    # The same text behind another prompt is another vector.
    as_document = warm.embed(texts, "document", None)
    assert warm.counts.n_encoded == 40
    assert np.abs(as_document - from_cold).max() > 0.01


def test_texts_that_the_model_cuts_are_counted_also_where_nothing_is_encoded(
    tmp_path: Path,
) -> None:
    encoder = gteopt.load("nano", dtype="float32")
    texts = [*texts_of(10), "bridge " * 40, "river " * 50]
    encoder.tokenization.max_tokens = max(encoder.tokenization.lengths(texts[:10]))
    with pytest.warns(UserWarning, match="were cut there"):
        VectorCache(encoder, tmp_path).embed(texts, "document", None)
    warm = VectorCache(encoder, tmp_path)
    for n in (1, 2):
        warm.embed(texts, "document", None)
        assert warm.counts == ShardEncodings(12 * n, 0, 2 * n)


def test_scores_are_the_same_bits_with_and_without_a_store(nano: Encoder, tmp_path: Path) -> None:
    suite = suite_of(*TASKS[:2])
    without = run_suite(nano, suite)
    cold = run_suite(nano, suite, store=tmp_path)
    for path in (tmp_path / "tasks").glob("*/*"):
        path.unlink()  # the vectors stay
    warm = run_suite(nano, suite, store=tmp_path)
    assert cold.encodings == cold.encodings_now == without.encodings
    n_texts = cold.encodings.n_asked
    assert (cold.encodings, warm.encodings) == (
        ShardEncodings(n_texts, n_texts),
        ShardEncodings(n_texts, 0),
    )
    assert without.scores == cold.scores == warm.scores
    for side, sample in cold.fidelity_sample.items():
        np.testing.assert_array_equal(sample.vectors, warm.fidelity_sample[side].vectors)
        np.testing.assert_array_equal(sample.vectors, without.fidelity_sample[side].vectors)


def test_the_sample_of_cached_vectors_is_stored_in_16_bits_without_loss(
    nano: Encoder, tmp_path: Path
) -> None:
    run = run_suite(nano, suite_of(TASKS[0]), store=tmp_path)
    (path,) = tmp_path.glob("tasks/*/texts.safetensors")
    for side, sample in read_fidelity_sample(path).items():
        np.testing.assert_array_equal(sample.vectors, run.fidelity_sample[side].vectors)
    assert path.stat().st_size < 1.2 * sum(
        sample.vectors.size * 2 + 32 * len(sample.digests)
        for sample in run.fidelity_sample.values()
    )
    exact = dict(run.fidelity_sample.items())
    side = next(iter(exact))
    third = exact[side].vectors / np.float32(3)  # needs more than 16 bits
    write_fidelity_sample(path, {side: type(exact[side])(exact[side].digests, third)})
    np.testing.assert_array_equal(read_fidelity_sample(path)[side].vectors, third)


def test_artifacts_that_differ_only_in_their_vectors_share_one_cache(
    artifact: Path, nano: Encoder, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    gteopt.truncate(artifact, short, dims=64, vectors="binary", device="cpu")
    int8, shortened = (gteopt.load(source, device="cpu") for source in (artifact, short))
    store = tmp_path / "store"
    suite = suite_of(TASKS[0])
    assert run_suite(int8, suite, store=store).encodings.n_encoded > 0
    assert run_suite(shortened, suite, store=store).encodings.n_encoded == 0
    assert run_suite(nano, suite, store=store).encodings.n_encoded > 0  # other weights
    full = gteopt.load(artifact, device="cpu", dtype="float32")
    assert run_suite(full, suite, store=store).encodings.n_encoded > 0  # another dtype


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_told_and_its_texts_are_encoded_again(
    nano: Encoder, tmp_path: Path, damage: str
) -> None:
    suite = suite_of(TASKS[0])
    sound = run_suite(nano, suite, store=tmp_path)
    for path in (tmp_path / "tasks").glob("*/*"):
        path.unlink()
    shard, *other_shards = shards(tmp_path / "vectors")
    n_texts = len(load_file(shard)["keys"])
    assert 0 < n_texts < sound.encodings.n_encoded
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    shard.write_bytes({"flip": bytes(flipped), "cut": content[:-9], "empty": b""}[damage])
    shown: list[str] = []
    run = run_suite(nano, suite, store=tmp_path, progress=lambda what, *_: shown.append(what))
    assert run.encodings.n_encoded == n_texts
    assert shards(tmp_path / "vectors") == [shard, *other_shards]  # whole again
    assert run.scores == sound.scores
    (note,) = run.notes
    assert str(shard) in note
    assert "damaged" in note
    assert note in shown
    assert run_suite(nano, suite_of(*TASKS[:2]), store=tmp_path).notes == ()


def test_the_oldest_shards_make_room_and_what_is_returned_stays_right(
    nano: Encoder, tmp_path: Path
) -> None:
    sizes = []
    for salt in "abc":  # three requests of one shard each
        VectorCache(nano, tmp_path).embed(texts_of(12, salt), "document", None)
        sizes = [path.stat().st_size for path in shards(tmp_path)]
        time.sleep(0.02)  # so that modification times differ
    assert len(sizes) == 3
    room_for_three = sum(sizes) + 100
    cache = VectorCache(nano, tmp_path, limit_bytes=room_for_three)
    mtimes = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    cache.embed(texts_of(12, "a"), "document", None)
    assert cache.counts.n_encoded == 0
    # A shard whose vectors were used is no longer the oldest. A shard without a hit still is.
    (used,) = (p for p in shards(tmp_path) if p.stat().st_mtime_ns != mtimes[p])
    oldest_first = sorted(mtimes, key=lambda path: path.stat().st_mtime_ns)
    VectorCache(nano, tmp_path, limit_bytes=room_for_three).embed(
        texts_of(12, "e"), "document", None
    )
    assert used in shards(tmp_path)
    assert oldest_first[0] not in shards(tmp_path)
    expected = nano.embed(texts_of(12, "d"))
    small = VectorCache(nano, tmp_path, limit_bytes=1)  # room for nothing but the newest
    vectors = small.embed(texts_of(12, "d"), "document", None)
    np.testing.assert_allclose(vectors, expected, atol=2**-11)
    assert len(shards(tmp_path)) == 1
    # The cache has indexed these texts. They are encoded again, as disk and memory lack them.
    cache._held.clear()
    np.testing.assert_allclose(
        cache.embed(texts_of(12, "a"), "document", None), nano.embed(texts_of(12, "a")), atol=2**-11
    )
    assert cache.counts.n_encoded == 12


def test_a_shard_that_another_process_removes_is_not_counted(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for salt in "ab":
        VectorCache(nano, tmp_path).embed(texts_of(12, salt), "document", None)
    removed, left = shards(tmp_path)
    n_bytes, listed = left.stat().st_size, Path.glob

    def remove_after_listing(folder: Path, pattern: str) -> list[Path]:
        paths = list(listed(folder, pattern))
        removed.unlink(missing_ok=True)
        return paths

    monkeypatch.setattr(Path, "glob", remove_after_listing)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    assert VectorCache(nano, tmp_path).room_bytes() == n_bytes


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_cache_without_write_permission_is_read_and_says_once_that_it_stores_nothing(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    VectorCache(nano, tmp_path).embed(texts_of(12, "a"), "document", None)
    (shard,) = shards(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))  # the tests may run as root, who may write anywhere

    for name in ("os.utime", "tempfile.NamedTemporaryFile", "pathlib.Path.unlink"):
        monkeypatch.setattr(name, refuse)
    notes: list[str] = []
    cache = VectorCache(nano, tmp_path, say=notes.append)
    cache.embed(texts_of(12, "a"), "document", None)
    assert (cache.counts.n_encoded, notes) == (0, [])
    for _ in range(2):
        for salt in "bc":
            vectors = cache.embed(texts_of(12, salt), "document", None)
            np.testing.assert_allclose(vectors, nano.embed(texts_of(12, salt)), atol=2**-11)
    assert cache.counts.n_encoded == 24
    assert shards(tmp_path) == [shard]
    (note,) = notes
    assert f"{shard.parent} cannot be written ({os.strerror(code)})" in note

    # A damaged shard stays where it is, and its texts are encoded.
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    notes.clear()
    cache = VectorCache(nano, tmp_path, say=notes.append)
    for _ in range(2):
        cache.embed(texts_of(12, "a"), "document", None)
        cache.embed(texts_of(3, "a"), "document", None)
    assert cache.counts.n_encoded == 12
    assert [f"cannot be removed ({os.strerror(code)})" in note for note in notes] == [True, False]


def test_shards_that_may_not_be_removed_count_as_used_room(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    for salt in "ab":
        cache = VectorCache(nano, tmp_path, limit_bytes=1)
        cache.embed(texts_of(12, salt), "document", None)
    assert len(shards(tmp_path)) == 2
    assert cache._n_bytes == sum(path.stat().st_size for path in shards(tmp_path))


def test_a_corpus_beyond_the_cache_is_kept_from_its_beginning(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropping the least recently used shard would drop the one that a second pass needs next."""
    monkeypatch.setattr("gteopt.corpus.shards.SHARD_TEXTS", 8)
    monkeypatch.setattr("gteopt.corpus.vector_cache._HELD_BYTES", 0)
    corpus = [[f"{part} text {i}" for i in range(8)] for part in range(10)]
    VectorCache(nano, tmp_path).embed(texts_of(8), "document", None)  # of an earlier task
    (old_shard,) = shards(tmp_path)
    room = 6 * old_shard.stat().st_size + 100

    def encode_corpus() -> int:
        cache = VectorCache(nano, tmp_path, limit_bytes=room)
        for texts in corpus:
            cache.embed(texts, "document", None)
        assert sum(path.stat().st_size for path in shards(tmp_path)) <= room
        return cache.counts.n_encoded

    assert encode_corpus() == 80
    assert old_shard not in shards(tmp_path)
    # Six shards fit, one of which is always the newest.
    assert [encode_corpus(), encode_corpus()] == [80 - 5 * 8] * 2
    # Texts of a new task may replace those of a finished task.
    cache = VectorCache(nano, tmp_path, limit_bytes=room)
    cache.embed(corpus[0], "document", None)
    cache.begin_task()
    for _ in range(2):
        for salt in "abcd":
            cache.embed(texts_of(8, salt), "document", None)
    assert cache.counts == ShardEncodings(9 * 8, 4 * 8)


def test_a_search_beyond_the_cache_encodes_its_corpus_once_for_all_views(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gteopt.corpus.shards.SHARD_TEXTS", 16)
    monkeypatch.setattr("gteopt.corpus.vector_cache._HELD_BYTES", 0)
    monkeypatch.setattr("gteopt.evaluation.mteb_model._CHUNK_TEXTS", 40)
    fitted = nano.embed(texts_of(64))
    views = [
        view_of(
            nano, fit_vector_transform(fitted, Dims(n=dims), Vectors(code=code)), f"{dims}-{code}"
        )
        for dims in (256, 32)
        for code in CODES
    ]
    suite = suite_of({"task": "MiniRetrieval"})
    narrow, ample = (
        run_views(nano, suite, views, options=SuiteEncodeOptions(cache_bytes=n_bytes))
        for n_bytes in (1, 10**9)
    )
    n_texts = ample[0].encodings.n_asked
    assert n_texts > 200
    for run, expected in zip(narrow, ample, strict=True):
        assert run.scores == expected.scores
        assert run.encodings.n_asked == n_texts
        (note,) = run.notes
        assert "MiniRetrieval" in note
        assert "--cache-gb" in note
        assert expected.notes == ()
    assert [run.encodings.n_encoded for run in narrow] == [n_texts] + [0] * 5
    # Each view scores the same alone, as its artifact would.
    for view, run in zip(views, narrow, strict=True):
        (alone,) = run_views(nano, suite, [view])
        assert alone.scores == run.scores


def test_shards_are_cut_alike_whatever_was_encoded_before_a_stop(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gteopt.corpus.shards.SHARD_TEXTS", 16)
    texts = texts_of(40)

    class Stop(Exception):
        pass

    def stop(what: str, done: int, total: int) -> None:
        if done > 16:
            raise Stop

    with pytest.raises(Stop):
        VectorCache(nano, tmp_path / "a").embed(texts, "document", None, stop)
    assert len(shards(tmp_path / "a")) == 1
    resumed, fresh = VectorCache(nano, tmp_path / "a"), VectorCache(nano, tmp_path / "b")
    np.testing.assert_array_equal(
        resumed.embed(texts, "document", None), fresh.embed(texts, "document", None)
    )
    assert resumed.counts.n_encoded == fresh.counts.n_encoded - 16
    assert [p.name for p in shards(tmp_path / "a")] == [p.name for p in shards(tmp_path / "b")]


def test_two_processes_fill_one_cache_at_once(nano: Encoder, tmp_path: Path) -> None:
    """This process begins when the other process is ready."""
    code = (
        "import sys, gteopt\n"
        "from pathlib import Path\n"
        "from gteopt.corpus.vector_cache import VectorCache\n"
        "cache = VectorCache(gteopt.load('nano', device='cpu'), Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "for part in range(12):\n"
        "    texts = [f'{part} Text {i} of both.' for i in range(20)]\n"
        "    cache.embed(texts, 'document', None)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    cache = VectorCache(nano, tmp_path, say=lambda note: pytest.fail(note))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for part in range(12):
            texts = [f"{part} Text {i} of both." for i in range(20)]
            cache.embed(texts, "document", None)
        assert child.wait(timeout=300) == 0
    reader = VectorCache(nano, tmp_path, say=lambda note: pytest.fail(note))
    for part in range(12):
        texts = [f"{part} Text {i} of both." for i in range(20)]
        vectors = reader.embed(texts, "document", None)
        np.testing.assert_allclose(vectors, nano.embed(texts), atol=2**-8)
    assert reader.counts.n_encoded == 0
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


class Narrow(Encoder):
    """The same encoder on a device with room for `room` texts.

    A larger batch asks the allocator for too much memory, so the error is a real one.
    """

    def __init__(self, encoder: Encoder, room: int) -> None:
        self.__dict__.update(encoder.__dict__)
        self.room = room
        self.sizes: list[int] = []

    def forward(self, tokens: Sequence[Sequence[int]], **options: Any) -> Any:
        self.sizes.append(len(tokens))
        if len(tokens) > self.room:
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().forward(tokens, **options)


def test_a_batch_that_does_not_fit_is_halved_and_said_once(nano: Encoder, tmp_path: Path) -> None:
    suite = suite_of(*TASKS[:2])
    narrow = Narrow(nano, 10)
    run = run_suite(narrow, suite, options=SuiteEncodeOptions(batch_size=32))
    assert not run.failed
    (note,) = run.notes
    assert "batches of 32 texts do not fit" in note
    assert "continued with batches of 8" in note
    assert narrow.sizes[:3] == [32, 16, 8]
    assert max(narrow.sizes[3:]) == 8
    assert run.score == pytest.approx(run_suite(nano, suite).score, abs=0.01)
    with pytest.raises(UnsupportedError, match="a single text does not fit the memory"):
        VectorCache(Narrow(nano, 0), tmp_path, encode=LocalEncoding(Narrow(nano, 0), 4)).embed(
            ["one text"], "document", None
        )


def count_texts(nano: Encoder, store: Path, *tasks: dict[str, Any]) -> tuple[int, int]:
    """Score the tasks. Gives how many texts this run asks for, and how many of them it encodes."""
    run = run_suite(nano, suite_of(*tasks), store=store)
    assert not run.failed
    return run.encodings_now.n_asked, run.encodings_now.n_encoded


def test_a_change_invalidates_exactly_what_it_touches(
    nano: Encoder, artifact: Path, tmp_path: Path
) -> None:
    sts, bitext, translation = TASKS
    n_asked, n_encoded = count_texts(nano, tmp_path, sts, bitext)
    assert n_asked == n_encoded > 0
    assert count_texts(nano, tmp_path, sts, bitext) == (0, 0)
    # The report counts the texts that the scores took, in whichever run that was.
    again = run_suite(nano, suite_of(sts, bitext), store=tmp_path)
    assert again.encodings == ShardEncodings(n_asked, n_encoded)
    # A changed suite: another order, a task fewer, a task more. Only the new task is run.
    assert count_texts(nano, tmp_path, bitext, sts) == (0, 0)
    assert count_texts(nano, tmp_path, bitext) == (0, 0)
    n_asked, n_encoded = count_texts(nano, tmp_path, sts, translation)
    assert n_asked == n_encoded > 0
    # Changed subsets of a task: the new subset is encoded, the old one is in the cache.
    two_subsets = {**sts, "subsets": ["en", "fr"]}
    n_asked, n_encoded = count_texts(nano, tmp_path, two_subsets, bitext)
    assert 0 < n_encoded < n_asked
    # A changed instruction of a task: all texts of that task are encoded.
    instructed = {**sts, "instruction": "Compare."}
    n_asked, n_encoded = count_texts(nano, tmp_path, instructed, bitext)
    assert n_asked == n_encoded > 0
    # Another artifact: everything is encoded.
    variant = gteopt.load(artifact, device="cpu")
    run = run_suite(variant, suite_of(sts, bitext), store=tmp_path)
    assert run.encodings_now.n_encoded == run.encodings_now.n_asked > 0
    # And the first state is still there.
    assert count_texts(nano, tmp_path, sts, bitext) == (0, 0)


def test_every_field_of_a_finished_tasks_key_changes_its_folder(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of any single field gives another folder. No other change does."""
    from gteopt.evaluation import task_store as finished
    from gteopt.evaluation.tasks import resolve_tasks

    (task,) = resolve_tasks(suite_of(TASKS[0]), None)

    def place(changed: Any = task, *, dtype: Any = "float16") -> Path:
        return finished.TaskFolder.of(nano, changed, tmp_path, dtype).folder

    unchanged = place()
    # The location of the data does not matter.
    assert place(replace(task, folder=tmp_path)) == unchanged
    changed = {
        "splits": replace(task, splits=("validation",)),
        "subsets": replace(task, subsets=("fr",)),
        "instruction": replace(task, instruction="Compare."),
        "symmetric": replace(task, symmetric=True),
        "revision": replace(task, revision="sha256:0"),
        "aggregate": replace(task, aggregate="MiniAll"),
        "max_tokens": replace(task, max_tokens=64),
        "normalize": replace(task, normalize=False),
    }
    folders = {name: place(changed_task) for name, changed_task in changed.items()}
    folders["stored"] = place(dtype="float32")
    for library in ("mteb", "scikit-learn"):
        with monkeypatch.context() as patch:
            patch.setattr(
                VERSION_IN_KEYS, lambda name, at=library: version(name) + at * (name == at)
            )
            folders[library] = place()
    assert len({unchanged, *folders.values()}) == 1 + len(folders)
    fields = set(finished.TaskFolder.of(nano, task, tmp_path, "float16").key)
    encodings = set(vector_identity(nano))
    assert fields - encodings == (set(folders) - encodings) | {"task"}


def test_another_scikit_learn_scores_again_and_encodes_nothing(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sts = TASKS[0]
    n_asked, _ = count_texts(nano, tmp_path, sts)
    with monkeypatch.context() as patch:
        patch.setattr(VERSION_IN_KEYS, lambda name: version(name) + "+" * (name == "scikit-learn"))
        assert count_texts(nano, tmp_path, sts) == (n_asked, 0)
        assert count_texts(nano, tmp_path, sts) == (0, 0)
    assert count_texts(nano, tmp_path, sts) == (0, 0)


def test_a_part_of_an_aggregate_is_scored_apart_from_the_task_by_itself(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scores have other names; their vectors are the same."""
    from gteopt.evaluation import tasks

    resolve = tasks.resolve_tasks
    sts = TASKS[0]
    n_asked, _ = count_texts(nano, tmp_path, sts)
    with monkeypatch.context() as patch:

        def as_part(*arguments: Any) -> list[Any]:
            return [replace(task, aggregate="MiniAll") for task in resolve(*arguments)]

        patch.setattr(tasks, "resolve_tasks", as_part)
        run = run_suite(nano, suite_of(sts), store=tmp_path)
        assert (run.encodings_now.n_asked, run.encodings_now.n_encoded) == (n_asked, 0)
        assert {(score.task, score.subset) for score in run.scores} == {("MiniAll", "MiniSTS")}
        assert count_texts(nano, tmp_path, sts) == (0, 0)
    assert count_texts(nano, tmp_path, sts) == (0, 0)


def test_entries_of_an_older_format_are_scored_again(nano: Encoder, tmp_path: Path) -> None:
    """Pairs that are stored without their texts would look independent."""
    sts = TASKS[0]
    n_asked, _ = count_texts(nano, tmp_path, sts)
    (record,) = (tmp_path / "tasks").glob("*/*.json")
    record.write_text(record.read_text().replace("gteopt.task/5", "gteopt.task/4"))
    assert count_texts(nano, tmp_path, sts) == (n_asked, 0)
    assert count_texts(nano, tmp_path, sts) == (0, 0)


def test_scores_of_a_moved_store_name_the_machine_that_made_them(
    nano: Encoder, tmp_path: Path
) -> None:
    suite = suite_of(*TASKS[:2])
    local = run_suite(nano, suite, store=tmp_path)
    records = sorted(tmp_path.glob("tasks/*/*.json"))
    assert len(records) == 2

    def move(path: Path) -> None:
        content = json.loads(path.read_text())
        content["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
        content["versions"]["numpy"] = "1.9"
        path.write_text(json.dumps(content))

    move(records[0])  # of MiniBitextMining
    mixed = run_suite(nano, suite, store=tmp_path)
    assert (mixed.machine, mixed.versions) == (local.machine, local.versions)
    (note,) = mixed.notes
    assert note.startswith("MiniBitextMining: scored in an earlier run, with gpu NVIDIA H100")
    assert note.endswith("numpy 1.9")
    move(records[1])
    moved = run_suite(nano, suite, store=tmp_path)
    assert moved.machine.gpu == "NVIDIA H100 80GB HBM3"
    assert moved.versions["numpy"] == "1.9"
    assert moved.notes == ()
    # The variant's report says that the baseline was scored on another machine.
    (note,) = compare_with_baseline(moved, local, variant_name="here").notes
    assert note.startswith("the baseline was scored with gpu NVIDIA H100")
    assert compare_with_baseline(local, local, variant_name="here").notes == ()


def test_vectors_of_another_forward_pass_are_encoded_again(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    VectorCache(nano, tmp_path).embed(texts_of(9), "document", None)
    monkeypatch.setattr("gteopt.corpus.vector_cache.FORWARD_SCHEMA", "2")
    mended = VectorCache(nano, tmp_path)
    mended.embed(texts_of(9), "document", None)
    assert mended.counts.n_encoded == 9


FORWARD = {
    "1": {
        "nano": [
            *([-0.5693, 0.5675, -0.8599], [-1.3569, -0.2973, 2.7973], [0.1942, -0.5032, -1.2925]),
            *([1.1796, -0.6157, -1.7357], [-0.8487, -0.305, -0.7093], [-1.3316, -0.472, 2.6879]),
            *([0.1819, -0.9162, -0.9905], [1.1715, -0.6121, -1.7247]),
        ],
        "rtn-int4": [
            *([-0.5128, 0.3645, -0.7226], [-1.521, -0.3837, 2.8822], [0.2075, -0.7011, -1.2484]),
            *([0.9894, -0.7975, -1.9568], [-0.568, -0.3244, -0.8001], [-1.4601, -0.528, 2.7954]),
            *([0.207, -1.1765, -0.9339], [0.9792, -0.795, -1.9456]),
        ],
    },
}
"""By FORWARD_SCHEMA: float32 vectors of four texts as queries and as documents, in three
directions."""


@pytest.mark.parametrize("model", ["nano", "rtn-int4"])
def test_whoever_changes_the_forward_pass_raises_its_schema(model: str, tmp_path: Path) -> None:
    """Another order of sums changes the values by less than 0.0001, mean pooling by 0.6 or more."""
    texts = ["A short one.", "Zażółć gęślą jaźń", "今天的天气很好，我们去公园散步吧。 " * 30]
    texts.insert(1, "Photosynthesis turns light into chemical energy that a plant stores as sugar.")
    if model != "nano":
        gteopt.quantize("nano", model, tmp_path / model)
    encoder = gteopt.load("nano" if model == "nano" else tmp_path / model, dtype="float32")
    queries = encoder.embed(texts, role="query", instruction="Find the answer")
    vectors = np.concatenate([queries, encoder.embed(texts, role="document")])
    projected = vectors @ np.random.default_rng(0).standard_normal((vectors.shape[1], 3))
    assert np.abs(projected - FORWARD[FORWARD_SCHEMA][model]).max() < 0.001, (
        "the forward pass gives other vectors than those that users have cached; if that is meant, "
        "raise FORWARD_SCHEMA in gteopt/corpus/vector_cache.py and add these values to FORWARD: "
        f"{np.round(projected, 4).tolist()}"
    )


def test_other_data_are_scored_again_but_known_texts_are_not_encoded_again(
    nano: Encoder, tmp_path: Path
) -> None:
    path, store = tmp_path / "pairs.jsonl", tmp_path / "store"
    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i % 5} for i in range(30)]

    def write() -> None:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    task = {"task": "pairs", "data": str(path)}
    write()
    assert count_texts(nano, store, task, TASKS[0])[1] > 0
    rows[3]["sentence2"] = "another text"
    write()
    assert count_texts(nano, store, task, TASKS[0]) == (60, 1)


def test_a_killed_run_goes_on_at_the_last_shard(
    nano: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command itself gets SIGKILL while it encodes."""
    pairs = tmp_path / "pairs.jsonl"
    n_pairs = SHARD_TEXTS + 60  # two shards for each side
    rows = (
        {"sentence1": f"one {i}", "sentence2": f"two {i}", "score": i % 6} for i in range(n_pairs)
    )
    pairs.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    out = tmp_path / "out"
    command = ["evaluate", "nano", "--data", str(pairs)]
    command += ["--out", str(out), "--device", "cpu", "--json"]
    child = subprocess.Popen(
        [sys.executable, "-m", "gteopt", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    vectors = out / "scores" / "vectors"
    deadline = time.monotonic() + 300
    while not shards(vectors):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(timeout=60)
    n_kept = sum(len(load_file(path)["keys"]) for path in shards(vectors))
    assert SHARD_TEXTS <= n_kept < 2 * n_pairs
    # The same command runs again in this process, which has imported everything.
    monkeypatch.setattr(sys, "argv", ["gteopt", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    (report,) = json.loads(capsys.readouterr().out)
    assert report["n_asked_texts"] == 2 * n_pairs
    assert report["n_encoded_texts"] == 2 * n_pairs - n_kept
    uninterrupted = run_suite(nano, suite_of({"task": "pairs", "data": str(pairs)}))
    assert report["score"] == uninterrupted.score
