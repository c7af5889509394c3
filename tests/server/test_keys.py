"""Keys: who may ask, how much, and the errors of a wrong file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from gteopt.errors import InputError
from gteopt.server.keys import Allowance, ApiKeys, read_api_keys
from tests.server.running_server import Running, running

SECRET, ADMIN, POOR = "sk-secret-secret-1", "sk-admin-admin-admin", "sk-poor-poor-poor-1"


@pytest.fixture
def keys(tmp_path: Path) -> ApiKeys:
    path = tmp_path / "keys.txt"
    digest = hashlib.sha256(ADMIN.encode()).hexdigest()
    path.write_text(
        f"# who may ask\n{SECRET}\noffice sha256:{digest} weight=4 admin=1\n"
        f"poor {POOR} requests_per_minute=2\n"
    )
    return read_api_keys(path)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    path.write_text(f"a {SECRET}\nb {ADMIN} admin=1\nc {POOR} requests_per_minute=2\n")
    with running({"nano": "nano"}, keys=read_api_keys(path)) as server:
        yield server


def test_a_key_is_found_by_its_secret_alone(keys: ApiKeys) -> None:
    key = keys.find(ADMIN)
    assert key is not None
    assert (key.name, key.weight, key.admin) == ("office", 4.0, 1.0)
    assert keys.find(SECRET[:-1]) is None
    assert keys.find(hashlib.sha256(ADMIN.encode()).hexdigest()) is None


def test_all_wrong_lines_of_a_key_file_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("short\na b c\nname sk-long-enough-secret wait=1\n\nx sha256:12\n")
    with pytest.raises(InputError) as raised:
        read_api_keys(path)
    for line in ("line 1: a key has at least 16", "line 2", "did you mean weight", "line 5"):
        assert line in str(raised.value)


def test_a_missing_or_empty_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_api_keys(tmp_path / "none")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(InputError, match="no key"):
        read_api_keys(tmp_path / "empty")


def test_an_allowance_refills_with_time() -> None:
    now = 0.0
    allowance = Allowance(60, lambda: now)
    assert allowance.take(60) is None
    assert allowance.take(1) == pytest.approx(1.0)
    now = 1.0
    assert allowance.take(1) is None
    now = 1000.0
    assert allowance.take(90) is None  # a full allowance gives more than a minute's
    assert allowance.take(1) == pytest.approx(31.0)


def test_only_known_keys_are_answered(guarded: Running) -> None:
    def ask(secret: str) -> None:
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=secret, max_retries=0)
        client.embeddings.create(model="nano", input="a")

    ask(SECRET)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        ask("sk-somebody-else-11")
    assert guarded.embed(input="a").status_code == 401
    for path in ("/livez", "/readyz", "/metrics", "/openapi.json", "/"):
        assert guarded.client.get(path).status_code == 200
    assert guarded.client.get("/v1/models").status_code == 401


def test_a_key_beyond_its_limit_is_told_when_to_come_back(guarded: Running) -> None:
    headers = {"authorization": f"Bearer {POOR}"}
    body = {"model": "nano", "input": "a"}
    answers = [guarded.client.post("/v1/embeddings", json=body, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 31
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"


def test_only_an_admin_key_may_reload(guarded: Running) -> None:
    def reload(secret: str) -> int:
        headers = {"authorization": f"Bearer {secret}"}
        return guarded.client.post("/admin/reload", json={}, headers=headers).status_code

    assert reload(SECRET) == 403
    assert reload(ADMIN) == 200
