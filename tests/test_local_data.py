"""The content identifies a data folder: replaced, renamed, copied, or read by two at once."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gteopt.build.calibration_texts import draw_calibration_texts
from gteopt.config.recipe import Calibration
from gteopt.errors import InputError
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.tasks import load_task_data, resolve_tasks
from gteopt.local_data import describe_local_data

READ = """
import sys
from pathlib import Path
from datasets import load_dataset
from gteopt.local_data import describe_local_data
data = describe_local_data(Path(sys.argv[1]))
with data.reading():
    rows = load_dataset(str(data.folder), split="test")
print(data.sha256, len(rows), rows[0]["sentence1"])
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_pairs(folder: Path, n: int, *, reverse: bool = False, word: str = "text") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "sentence1": f"{word} {i}",
            "sentence2": f"other {i}",
            "score": float(n - i if reverse else i),
        }
        for i in range(n)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # With a card that names its files, as on the Hub, `datasets` ignores the files' times.
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - {split: test, path: test.jsonl}\n---\n"
    )


def loaded(hub: Path) -> tuple[str, int, float]:
    """Revision, number of pairs and first grade of STSBenchmark as a suite reads it."""
    tasks = [{"task": "STSBenchmark", "splits": ["test"]}]
    suite = Suite.model_validate({"schema": "gteopt.suite/1", "name": "test", "tasks": tasks})
    (task,) = resolve_tasks(suite, hub)
    load_task_data([task])
    rows: Any = task.task.dataset["test"]
    return task.revision, len(rows), rows[0]["score"]


def test_replaced_files_are_read_anew(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "mteb" / "stsbenchmark-sts"
    write_pairs(folder, 200)
    first = loaded(tmp_path / "hub")
    write_pairs(folder, 100, reverse=True)
    second = loaded(tmp_path / "hub")
    assert first[1:] == (200, 0.0)
    assert second[1:] == (100, 100.0)
    assert first[0] != second[0]


def test_two_folders_of_one_name_do_not_collide(tmp_path: Path) -> None:
    for hub, n in (("one", 50), ("two", 60)):
        write_pairs(tmp_path / hub / "mteb" / "stsbenchmark-sts", n)
    assert [loaded(tmp_path / hub)[1] for hub in ("one", "two", "one")] == [50, 60, 50]


def test_a_renamed_folder_has_the_same_hash_and_the_same_data(tmp_path: Path) -> None:
    write_pairs(tmp_path / "before" / "mteb" / "stsbenchmark-sts", 30)
    first = loaded(tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")
    assert loaded(tmp_path / "after") == first


def test_two_processes_at_once_read_each_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / name / "data" for name in ("a", "b", "c")]
    for folder, word in zip(folders, ("red", "green", "blue"), strict=True):
        write_pairs(folder, 500, word=word)
    shutil.rmtree(folders[2])
    shutil.copytree(folders[0], folders[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(folder)], stdout=subprocess.PIPE, text=True
        )
        for folder in folders
    ]
    outputs = [process.communicate(timeout=120)[0].split(maxsplit=2) for process in processes]
    assert [output[1:] for output in outputs] == [
        ["500", "red 0\n"],
        ["500", "green 0\n"],
        ["500", "red 0\n"],
    ]
    assert outputs[0][0] == outputs[2][0] != outputs[1][0]


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write_pairs(tmp_path / "data", 10)
    data = describe_local_data(tmp_path / "data")
    with pytest.raises(InputError, match="changed while they were read"), data.reading():
        write_pairs(tmp_path / "data", 11)


def test_calibration_texts_of_a_replaced_data_set_are_read_anew(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "org" / "texts"
    spec = Calibration(texts="org/texts", split="test", column="sentence1", n_texts=1000)
    write_pairs(folder, 20, word="old")
    before = {text.text for text in draw_calibration_texts(spec, hub_dir=tmp_path / "hub")}
    write_pairs(folder, 20, word="new")
    after = {text.text for text in draw_calibration_texts(spec, hub_dir=tmp_path / "hub")}
    assert before == {f"old {i}" for i in range(20)}
    assert after == {f"new {i}" for i in range(20)}


def test_a_download_whose_file_was_replaced_is_not_of_its_commit(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "mteb" / "stsbenchmark-sts"
    write_pairs(folder, 20)
    notes = folder / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for name in ("test.jsonl", "README.md"):
        etag = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        (notes / f"{name}.metadata").write_text(f"{'a' * 40}\n{etag}\n1700000000.0\n")
    assert loaded(tmp_path / "hub")[0] == "a" * 40
    write_pairs(folder, 21)
    assert loaded(tmp_path / "hub")[0].startswith("sha256:")
    pinned = [{"task": "STSBenchmark", "splits": ["test"], "revision": "a" * 40}]
    suite = Suite.model_validate({"schema": "gteopt.suite/1", "name": "test", "tasks": pinned})
    with pytest.raises(InputError, match=r"test\.jsonl.*changed since the download"):
        resolve_tasks(suite, tmp_path / "hub")
