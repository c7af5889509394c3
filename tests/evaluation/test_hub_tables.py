"""`--data` takes the name of a data set, which means one file of one split."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gteopt.errors import InputError
from gteopt.evaluation.hub_tables import local_table
from gteopt.evaluation.user_data import Pairs, read_own_data
from tests.support.hub_server import Hub, Repo, running
from tests.support.hub_user import TOKEN, User

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
    pairs = read_own_data(table)
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


FILES = {"train.csv": b"not read", "data/test.csv": ROWS.encode(), "README.md": b"# Pairs"}


@pytest.fixture
def hub() -> Iterator[Hub]:
    for hub in running(TOKEN, owner="me"):
        shards = {"a/test.csv": b"", "b/test.csv": b""}
        for name, files, private in (
            ("org/pairs", FILES, False),
            ("org/hidden", FILES, True),
            ("org/sharded", shards, False),
        ):
            hub.repos[f"datasets/{name}"] = Repo(private, [("c0ffee" + 34 * "0", files)])
        hub.repos["org/model"] = Repo(False, [("c0ffee" + 34 * "0", FILES)])
        yield hub


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


def test_one_file_of_a_data_set_on_the_hub_is_downloaded_once(user: User, tmp_path: Path) -> None:
    looking = ("evaluate", "nano", "--data", "org/pairs", "--dry-run", "--json")
    for _ in range(2):
        ran = user.run(*looking, token=None, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert [task["task"] for task in json.loads(ran.stdout)["tasks"]] == ["test"]
        assert user.hub.served == {"data/test.csv": len(ROWS)}
    hidden = user.run("evaluate", "nano", "--data", "org/hidden", "--dry-run", cwd=tmp_path)
    assert hidden.returncode == 0, hidden.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/nosuch", "there is no such file; on the Hub: there is no repository org/nosuch"),
        ("org/model", "there is no repository org/model that you may see"),
        ("org/hidden", "there is no repository org/hidden that you may see"),
        ("org/sharded", "has several files of test (a/test.csv, b/test.csv); name one"),
        ("org/pairs:dev", "has no file of dev"),
        ("org/-pairs", "there is no such file; on the Hub: org/-pairs: Repo id must"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_a_line(
    user: User, tmp_path: Path, name: str, message: str
) -> None:
    ran = user.run("evaluate", "nano", "--data", name, "--dry-run", token=None, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    said = " ".join(ran.stderr.split())
    assert message in said
    assert "Traceback" not in said
    assert not user.hub.served


def test_a_hub_that_does_not_answer_is_named(user: User, tmp_path: Path) -> None:
    looking = ("evaluate", "nano", "--data", "org/pairs", "--dry-run")
    ran = user.run(*looking, endpoint="http://127.0.0.1:9", cwd=tmp_path)
    assert ran.returncode == 1
    assert "on the Hub: http://127.0.0.1:9 cannot be reached" in " ".join(ran.stderr.split())
