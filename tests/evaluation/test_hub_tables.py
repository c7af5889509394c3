"""`--data` takes the name of a data set, which means one file of one split."""

from __future__ import annotations

from pathlib import Path

import pytest

from gteopt.errors import InputError
from gteopt.evaluation.hub_tables import local_table
from gteopt.evaluation.user_data import Pairs, read_own

ROWS = "sentence1,sentence2,score\n" + "".join(f"a {i},b {i},{i}\n" for i in range(4))


@pytest.fixture
def hub_dir(tmp_path: Path) -> Path:
    """Data sets as `hf download --local-dir` puts them."""
    for file in (
        "org/plain/train.csv",
        "org/plain/test.csv",
        "org/sharded/data/test-00000-of-00002.csv",
        "org/sharded/data/test-00001-of-00002.csv",
        "org/sharded/en/dev.csv",
        "org/single/rows.csv",
        "org/none/README.md",
    ):
        path = tmp_path / "hub" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ROWS)
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("org/plain", "org/plain/test.csv"),
        ("org/plain:train", "org/plain/train.csv"),
        ("org/plain:train.csv", "org/plain/train.csv"),
        ("org/single", "org/single/rows.csv"),
        ("org/sharded:dev", "org/sharded/en/dev.csv"),
        ("org/sharded:en", "org/sharded/en/dev.csv"),
        (
            "org/sharded:data/test-00001-of-00002.csv",
            "org/sharded/data/test-00001-of-00002.csv",
        ),
    ],
)
def test_a_name_means_one_file(hub_dir: Path, name: str, file: str) -> None:
    table = local_table(Path(name), hub_dir=hub_dir)
    assert table == hub_dir / file
    pairs = read_own(table)
    assert isinstance(pairs, Pairs)
    assert pairs.scores == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/sharded", "several files of test .*--data org/sharded:data/test-00000"),
        ("org/plain:dev", "no file of dev .*found test.csv, train.csv"),
        ("org/none", "no file of test or validation or dev or train .*found no such file"),
        ("org/nosuch", "hf download --repo-type dataset org/nosuch"),
    ],
)
def test_an_ambiguous_or_unknown_name_is_refused(hub_dir: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        local_table(Path(name), hub_dir=hub_dir)


def test_files_and_folders_are_taken_as_they_are(
    hub_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hub_dir)
    for name in ("org/plain", "org/plain/test.csv", "org/missing.csv", "missing.csv"):
        assert local_table(Path(name), hub_dir=hub_dir) == Path(name)
