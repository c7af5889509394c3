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
from gteopt.corpus.shards import SHARD_TEXTS, Encodings, LocalEncoding
from gteopt.corpus.vector_cache import FORWARD_SCHEMA, VectorCache, vector_identity
from gteopt.encoder.encoder import Encoder
from gteopt.errors import UnsupportedError
from gteopt.evaluation.compare import compare
from gteopt.evaluation.fidelity import read_sample, write_sample
from gteopt.evaluation.runner import EncodeOptions, run_suite, run_views
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.views import view_of
from gteopt.vectors.fit import fit

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
    first = cold.embed(texts, "query", "Find it.")
    warm = VectorCache(nano, tmp_path)
    again = warm.embed(texts[::-1], "query", "Find it.")[::-1]
    np.testing.assert_array_equal(first, again)
    assert (cold.counts, warm.counts) == (Encodings(40, 40), Encodings(40, 0))
    plain = nano.embed(texts, role="query", instruction="Find it.")
    # Half a unit in the last place of float16, relative to the value.
    assert np.abs(first - plain).max() <= 2**-11 * np.abs(plain).max()
    # The same text behind another prompt is another vector.
    other = warm.embed(texts, "document", None)
    assert warm.counts.n_encoded == 40
    assert np.abs(other - first).max() > 0.01


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
        assert warm.counts == Encodings(12 * n, 0, 2 * n)


def test_scores_are_the_same_bits_with_and_without_a_store(nano: Encoder, tmp_path: Path) -> None:
    suite = suite_of(*TASKS[:2])
    without = run_suite(nano, suite)
    cold = run_suite(nano, suite, store=tmp_path)
    for path in (tmp_path / "tasks").glob("*/*"):
        path.unlink()  # the vectors stay
    warm = run_suite(nano, suite, store=tmp_path)
    assert cold.encodings == cold.encodings_now == without.encodings
    n_texts = cold.encodings.n_asked
    assert (cold.encodings, warm.encodings) == (Encodings(n_texts, n_texts), Encodings(n_texts, 0))
    assert without.scores == cold.scores == warm.scores
    for side, each in cold.fidelity_sample.items():
        np.testing.assert_array_equal(each.vectors, warm.fidelity_sample[side].vectors)
        np.testing.assert_array_equal(each.vectors, without.fidelity_sample[side].vectors)


def test_the_sample_of_cached_vectors_is_stored_in_16_bits_without_loss(
    nano: Encoder, tmp_path: Path
) -> None:
    run = run_suite(nano, suite_of(TASKS[0]), store=tmp_path)
    (path,) = tmp_path.glob("tasks/*/texts.safetensors")
    for side, each in read_sample(path).items():
        np.testing.assert_array_equal(each.vectors, run.fidelity_sample[side].vectors)
    assert path.stat().st_size < 1.2 * sum(
        each.vectors.size * 2 + 32 * len(each.digests) for each in run.fidelity_sample.values()
    )
    exact = dict(run.fidelity_sample.items())
    side = next(iter(exact))
    third = exact[side].vectors / np.float32(3)  # needs more than 16 bits
    write_sample(path, {side: type(exact[side])(exact[side].digests, third)})
    np.testing.assert_array_equal(read_sample(path)[side].vectors, third)


def test_artifacts_that_differ_only_in_their_vectors_share_one_cache(
    artifact: Path, nano: Encoder, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    gteopt.truncate(artifact, short, dims=64, vectors="binary", device="cpu")
    whole, shortened = (gteopt.load(each, device="cpu") for each in (artifact, short))
    store = tmp_path / "store"
    suite = suite_of(TASKS[0])
    assert run_suite(whole, suite, store=store).encodings.n_encoded > 0
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
    shard, *others = shards(tmp_path / "vectors")
    n_texts = len(load_file(shard)["keys"])
    assert 0 < n_texts < sound.encodings.n_encoded
    content = shard.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    shard.write_bytes({"flip": bytes(flipped), "cut": content[:-9], "empty": b""}[damage])
    told: list[str] = []
    run = run_suite(nano, suite, store=tmp_path, progress=lambda what, *_: told.append(what))
    assert run.encodings.n_encoded == n_texts
    assert shards(tmp_path / "vectors") == [shard, *others]  # whole again
    assert run.scores == sound.scores
    (note,) = run.notes
    assert str(shard) in note
    assert "damaged" in note
    assert note in told
    assert run_suite(nano, suite_of(*TASKS[:2]), store=tmp_path).notes == ()


def test_the_oldest_shards_make_room_and_what_is_returned_stays_right(
    nano: Encoder, tmp_path: Path
) -> None:
    sizes = []
    for salt in "abc":  # three requests of one shard each
        VectorCache(nano, tmp_path).embed(texts_of(12, salt), "document", None)
        sizes = [path.stat().st_size for path in shards(tmp_path)]
        time.sleep(0.02)  # other times of writing
    assert len(sizes) == 3
    room_for_three = sum(sizes) + 100
    cache = VectorCache(nano, tmp_path, limit_bytes=room_for_three)
    oldest = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}
    cache.embed(texts_of(12, "a"), "document", None)
    assert cache.counts.n_encoded == 0
    # What was read is no longer the oldest, what was only looked through still is.
    (read,) = (p for p in shards(tmp_path) if p.stat().st_mtime_ns != oldest[p])
    least = sorted(oldest, key=lambda path: path.stat().st_mtime_ns)
    VectorCache(nano, tmp_path, limit_bytes=room_for_three).embed(
        texts_of(12, "e"), "document", None
    )
    assert read in shards(tmp_path)
    assert least[0] not in shards(tmp_path)
    expected = nano.embed(texts_of(12, "d"))
    small = VectorCache(nano, tmp_path, limit_bytes=1)  # room for nothing but the newest
    found = small.embed(texts_of(12, "d"), "document", None)
    np.testing.assert_allclose(found, expected, atol=2**-11)
    assert len(shards(tmp_path)) == 1
    # Gone from under a cache that has indexed it, and from its memory: encoded again.
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
    said: list[str] = []
    cache = VectorCache(nano, tmp_path, say=said.append)
    cache.embed(texts_of(12, "a"), "document", None)
    assert (cache.counts.n_encoded, said) == (0, [])
    for _ in range(2):
        for salt in "bc":
            found = cache.embed(texts_of(12, salt), "document", None)
            np.testing.assert_allclose(found, nano.embed(texts_of(12, salt)), atol=2**-11)
    assert cache.counts.n_encoded == 24
    assert shards(tmp_path) == [shard]
    (note,) = said
    assert f"{shard.parent} cannot be written ({os.strerror(code)})" in note

    # A damaged shard stays where it is, and its texts are encoded.
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    said.clear()
    cache = VectorCache(nano, tmp_path, say=said.append)
    for _ in range(2):
        cache.embed(texts_of(12, "a"), "document", None)
        cache.embed(texts_of(3, "a"), "document", None)
    assert cache.counts.n_encoded == 12
    assert [f"cannot be removed ({os.strerror(code)})" in note for note in said] == [True, False]


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
    """What was read least lately would be just what a second reading comes to next."""
    monkeypatch.setattr("gteopt.corpus.shards.SHARD_TEXTS", 8)
    monkeypatch.setattr("gteopt.corpus.vector_cache._HELD_BYTES", 0)
    corpus = [[f"{part} text {i}" for i in range(8)] for part in range(10)]
    VectorCache(nano, tmp_path).embed(texts_of(8), "document", None)  # of an earlier task
    (other,) = shards(tmp_path)
    room = 6 * other.stat().st_size + 100

    def read() -> int:
        cache = VectorCache(nano, tmp_path, limit_bytes=room)
        for texts in corpus:
            cache.embed(texts, "document", None)
        assert sum(path.stat().st_size for path in shards(tmp_path)) <= room
        return cache.counts.n_encoded

    assert read() == 80
    assert other not in shards(tmp_path)
    # Six shards fit, one of which is always the newest.
    assert [read(), read()] == [80 - 5 * 8] * 2
    # Another task's texts are not worth less than a finished one's.
    cache = VectorCache(nano, tmp_path, limit_bytes=room)
    cache.embed(corpus[0], "document", None)
    cache.begin_task()
    for _ in range(2):
        for salt in "abcd":
            cache.embed(texts_of(8, salt), "document", None)
    assert cache.counts == Encodings(9 * 8, 4 * 8)


def test_a_search_beyond_the_cache_encodes_its_corpus_once_for_all_views(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gteopt.corpus.shards.SHARD_TEXTS", 16)
    monkeypatch.setattr("gteopt.corpus.vector_cache._HELD_BYTES", 0)
    monkeypatch.setattr("gteopt.evaluation.mteb_model._CHUNK_TEXTS", 40)
    fitted = nano.embed(texts_of(64))
    views = [
        view_of(nano, fit(fitted, Dims(n=dims), Vectors(code=code)), f"{dims}-{code}")
        for dims in (256, 32)
        for code in CODES
    ]
    suite = suite_of({"task": "MiniRetrieval"})
    narrow, ample = (
        run_views(nano, suite, views, options=EncodeOptions(cache_bytes=n_bytes))
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
    # Each view alone, as its artifact would be scored.
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
    """Another process and this one, which begins when the other is ready."""
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
        found = reader.embed(texts, "document", None)
        np.testing.assert_allclose(found, nano.embed(texts), atol=2**-8)
    assert reader.counts.n_encoded == 0
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


class Narrow(Encoder):
    """The same encoder, on a device with room for `room` texts: a larger batch asks the allocator
    for more than there is, and what it then raises is real.
    """

    def __init__(self, encoder: Encoder, room: int) -> None:
        self.__dict__.update(encoder.__dict__)
        self.room = room
        self.sizes: list[int] = []

    def forward(self, tokens: Sequence[Sequence[int]], **how: Any) -> Any:
        self.sizes.append(len(tokens))
        if len(tokens) > self.room:
            torch.empty(1 << 60, dtype=torch.uint8)
        return super().forward(tokens, **how)


def test_a_batch_that_does_not_fit_is_halved_and_said_once(nano: Encoder, tmp_path: Path) -> None:
    suite = suite_of(*TASKS[:2])
    narrow = Narrow(nano, 10)
    run = run_suite(narrow, suite, options=EncodeOptions(batch_size=32))
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


def asked_again(nano: Encoder, store: Path, *tasks: dict[str, Any]) -> tuple[int, int]:
    """Texts that the tasks scored now ask for, and how many of them are encoded."""
    run = run_suite(nano, suite_of(*tasks), store=store)
    assert not run.failed
    return run.encodings_now.n_asked, run.encodings_now.n_encoded


def test_a_change_invalidates_exactly_what_it_touches(
    nano: Encoder, artifact: Path, tmp_path: Path
) -> None:
    sts, bitext, translation = TASKS
    asked, encoded = asked_again(nano, tmp_path, sts, bitext)
    assert asked == encoded > 0
    assert asked_again(nano, tmp_path, sts, bitext) == (0, 0)
    # What is reported is what the scores took, whichever run it was.
    again = run_suite(nano, suite_of(sts, bitext), store=tmp_path)
    assert again.encodings == Encodings(asked, encoded)
    # The suite: another order, a task less, a task more, which alone is run.
    assert asked_again(nano, tmp_path, bitext, sts) == (0, 0)
    assert asked_again(nano, tmp_path, bitext) == (0, 0)
    asked, encoded = asked_again(nano, tmp_path, sts, translation)
    assert asked == encoded > 0
    # Subsets of one task: its new subset is encoded, its old one read from the cache.
    both = {**sts, "subsets": ["en", "fr"]}
    asked, encoded = asked_again(nano, tmp_path, both, bitext)
    assert 0 < encoded < asked
    # The instruction of one task: that task, all of its texts.
    other = {**sts, "instruction": "Compare."}
    asked, encoded = asked_again(nano, tmp_path, other, bitext)
    assert asked == encoded > 0
    # Another artifact: everything.
    variant = gteopt.load(artifact, device="cpu")
    run = run_suite(variant, suite_of(sts, bitext), store=tmp_path)
    assert run.encodings_now.n_encoded == run.encodings_now.n_asked > 0
    # And the first state is still there.
    assert asked_again(nano, tmp_path, sts, bitext) == (0, 0)


def test_every_field_of_a_finished_task_s_key_is_of_its_place(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone gives another place, and only what it says of the task does."""
    from gteopt.evaluation import task_store as finished
    from gteopt.evaluation.tasks import resolve

    (task,) = resolve(suite_of(TASKS[0]), None)

    def place(changed: Any = task, *, dtype: Any = "float16") -> Path:
        return finished.TaskFolder.of(nano, changed, tmp_path, dtype).folder

    own = place()
    assert place(replace(task, folder=tmp_path)) == own  # where the same data lie is no matter
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
    others = {name: place(each) for name, each in changed.items()}
    others["stored"] = place(dtype="float32")
    for library in ("mteb", "scikit-learn"):
        with monkeypatch.context() as other:
            other.setattr(
                VERSION_IN_KEYS, lambda name, at=library: version(name) + at * (name == at)
            )
            others[library] = place()
    assert len({own, *others.values()}) == 1 + len(others)
    fields = set(finished.TaskFolder.of(nano, task, tmp_path, "float16").key)
    encodings = set(vector_identity(nano))
    assert fields - encodings == (set(others) - encodings) | {"task"}


def test_another_scikit_learn_scores_again_and_encodes_nothing(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sts = TASKS[0]
    asked, _ = asked_again(nano, tmp_path, sts)
    with monkeypatch.context() as other:
        other.setattr(VERSION_IN_KEYS, lambda name: version(name) + "+" * (name == "scikit-learn"))
        assert asked_again(nano, tmp_path, sts) == (asked, 0)
        assert asked_again(nano, tmp_path, sts) == (0, 0)
    assert asked_again(nano, tmp_path, sts) == (0, 0)


def test_a_part_of_an_aggregate_is_scored_apart_from_the_task_by_itself(
    nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their scores bear other names; their vectors are the same."""
    from gteopt.evaluation import tasks

    resolve = tasks.resolve
    sts = TASKS[0]
    asked, _ = asked_again(nano, tmp_path, sts)
    with monkeypatch.context() as other:

        def as_part(*arguments: Any) -> list[Any]:
            return [replace(each, aggregate="MiniAll") for each in resolve(*arguments)]

        other.setattr(tasks, "resolve", as_part)
        run = run_suite(nano, suite_of(sts), store=tmp_path)
        assert (run.encodings_now.n_asked, run.encodings_now.n_encoded) == (asked, 0)
        assert {(each.task, each.subset) for each in run.scores} == {("MiniAll", "MiniSTS")}
        assert asked_again(nano, tmp_path, sts) == (0, 0)
    assert asked_again(nano, tmp_path, sts) == (0, 0)


def test_entries_of_an_older_format_are_scored_again(nano: Encoder, tmp_path: Path) -> None:
    """Pairs without their texts would pass for independent ones."""
    sts = TASKS[0]
    asked, _ = asked_again(nano, tmp_path, sts)
    (record,) = (tmp_path / "tasks").glob("*/*.json")
    record.write_text(record.read_text().replace("gteopt.task/5", "gteopt.task/4"))
    assert asked_again(nano, tmp_path, sts) == (asked, 0)
    assert asked_again(nano, tmp_path, sts) == (0, 0)


def test_what_is_read_from_a_moved_store_is_said_to_be_from_where_it_was_made(
    nano: Encoder, tmp_path: Path
) -> None:
    suite = suite_of(*TASKS[:2])
    here = run_suite(nano, suite, store=tmp_path)
    records = sorted(tmp_path.glob("tasks/*/*.json"))
    assert len(records) == 2

    def move(path: Path) -> None:
        content = json.loads(path.read_text())
        content["machine"]["gpu"] = "NVIDIA H100 80GB HBM3"
        content["versions"]["numpy"] = "1.9"
        path.write_text(json.dumps(content))

    move(records[0])  # of MiniBitextMining
    mixed = run_suite(nano, suite, store=tmp_path)
    assert (mixed.machine, mixed.versions) == (here.machine, here.versions)
    (note,) = mixed.notes
    assert note.startswith("MiniBitextMining: scored in an earlier run, with gpu NVIDIA H100")
    assert note.endswith("numpy 1.9")
    move(records[1])
    moved = run_suite(nano, suite, store=tmp_path)
    assert moved.machine.gpu == "NVIDIA H100 80GB HBM3"
    assert moved.versions["numpy"] == "1.9"
    assert moved.notes == ()
    # A baseline from elsewhere is said in the variant's report.
    (note,) = compare(moved, here, variant_name="here").notes
    assert note.startswith("the baseline was scored with gpu NVIDIA H100")
    assert compare(here, here, variant_name="here").notes == ()


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
"""By FORWARD_SCHEMA: four texts' vectors as queries and as documents, in float32, in three
directions."""


@pytest.mark.parametrize("model", ["nano", "rtn-int4"])
def test_whoever_changes_the_forward_pass_raises_its_schema(model: str, tmp_path: Path) -> None:
    """Sums in another order differ by less than 0.0001 here, mean pooling by 0.6 and more."""
    texts = ["A short one.", "Zażółć gęślą jaźń", "今天的天气很好，我们去公园散步吧。 " * 30]
    texts.insert(1, "Photosynthesis turns light into chemical energy that a plant stores as sugar.")
    if model != "nano":
        gteopt.quantize("nano", model, tmp_path / model)
    encoder = gteopt.load("nano" if model == "nano" else tmp_path / model, dtype="float32")
    queries = encoder.embed(texts, role="query", instruction="Find the answer")
    both = np.concatenate([queries, encoder.embed(texts, role="document")])
    found = both @ np.random.default_rng(0).standard_normal((both.shape[1], 3))
    assert np.abs(found - FORWARD[FORWARD_SCHEMA][model]).max() < 0.001, (
        "the forward pass gives other vectors than those that users have cached; if that is meant, "
        "raise FORWARD_SCHEMA in gteopt/corpus/vector_cache.py and add these under it to FORWARD: "
        f"{np.round(found, 4).tolist()}"
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
    assert asked_again(nano, store, task, TASKS[0])[1] > 0
    rows[3]["sentence2"] = "another text"
    write()
    assert asked_again(nano, store, task, TASKS[0]) == (60, 1)


def test_a_killed_run_goes_on_at_the_last_shard(
    nano: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGKILL in the middle of an encode, of the command itself."""
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
    # The same command again, in this process, which has imported everything.
    monkeypatch.setattr(sys, "argv", ["gteopt", *command])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    (report,) = json.loads(capsys.readouterr().out)
    assert report["n_asked_texts"] == 2 * n_pairs
    assert report["n_encoded_texts"] == 2 * n_pairs - n_kept
    whole = run_suite(nano, suite_of({"task": "pairs", "data": str(pairs)}))
    assert report["score"] == whole.score
