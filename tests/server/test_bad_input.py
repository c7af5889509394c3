"""The answer to a wrong request names its fault, and the next request is served."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import openai
import pytest

from gteopt.server.connections import ImpatientProtocol
from gteopt.server.settings import ServerSettings
from tests.server.running_server import Running, running


def error_of(server: Running, body: object, status: int = 400) -> dict[str, str | None]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.client.post("/v1/embeddings", content=content)
    assert answer.status_code == status, answer.text
    error: dict[str, str | None] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"input": ""}, "input[0]", "empty string"),
        ({"input": []}, "input", "empty list"),
        ({"input": ["a", ""]}, "input[1]", "empty string"),
        ({"input": None}, "input", "null"),
        ({"input": 7}, "input", "an integer"),
        ({"input": {"text": "a"}}, "input", "an object"),
        ({"input": ["a", 7]}, "input[1]", "all items must be strings"),
        ({"input": [["a"]]}, "input[0][0]", "token ids"),
        ({"input": [[1], []]}, "input[1]", "no token ids"),
        ({"input": [1, -1]}, "input", "no token id"),
        ({"input": [True]}, "input[0]", "a boolean"),
        ({"input": [1.5]}, "input[0]", "a number"),
        ({"input": ["a"] * 2049}, "input", "2,049 items"),
        ({"input": "a", "dimensions": 100}, "dimensions", "256, 128, 64, 32"),
        ({"input": "a", "dimensions": "64"}, "dimensions", "valid integer"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "a", "user": 7}, "user", "valid string"),
        ({"input": "a", "dimension": 64}, "dimension", "did you mean dimensions"),
        ({"input": "a", "input_type": "search_query"}, "input_type", "'query' or 'document'"),
        ({"input": "a", "prompt_name": "quer"}, "prompt_name", "did you mean query"),
        ({"input": "a", "prompt_name": "query", "input_type": "query"}, "prompt_name", "not both"),
        ({"input": "a", "input_type": "document", "instruction": "x"}, "instruction", "queries"),
        ({"input": "a", "output_dtype": "int8"}, "output_dtype", "stores none"),
        ({"input": "a", "output_dtype": "int4"}, "output_dtype", "'int8'"),
        ({"input": "a", "output_dtype": "float", "embedding_dtype": "binary"}, None, "differ"),
        ({"input": "a", "truncate": "middle"}, "truncate", "'none', 'start' or 'end'"),
        ({"input": [15339, 1917]}, "input", "check_embedding_ctx_length=False"),
        ({"input": [10**6], "tokenizer": "model"}, "input[0]", "tokens"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(
    server: Running, fields: dict[str, object], param: str | None, says: str
) -> None:
    error = error_of(server, {"model": "nano", **fields})
    assert says in str(error["message"])
    assert param is None or error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model": "nano", "input": "\xff"}', b"[1]", b'{"input": "\\ud800"}']
)
def test_a_body_that_is_no_json_object_is_refused(server: Running, body: bytes) -> None:
    error_of(server, body)


def test_a_missing_field_is_said_as_openai_does(server: Running) -> None:
    assert error_of(server, {"input": "a"})["message"] == "you must provide a model parameter"
    assert error_of(server, {"model": "nano"})["param"] == "input"


def test_an_unknown_model_is_not_found_and_the_near_one_suggested(server: Running) -> None:
    error = error_of(server, {"model": "minilmm", "input": "a"}, 404)
    assert error["code"] == "model_not_found"
    assert "did you mean minilm" in str(error["message"])


def test_the_openai_client_raises_its_own_errors_with_our_message(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="100 dimensions") as raised:
        client.embeddings.create(model="nano", input="a", dimensions=100)
    assert raised.value.param == "dimensions"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/embeddings", 405), ("GET", "/v2/x", 404), ("POST", "/info", 405)],
)
def test_unknown_routes_and_methods_get_the_error_object(
    server: Running, method: str, path: str, status: int
) -> None:
    answer = server.client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def narrow() -> Iterator[Running]:
    """A server with limits that a test reaches."""
    settings = ServerSettings(max_body_bytes=10_000, body_timeout_s=0.5, max_request_tokens=400)
    with running({"nano": "nano"}, settings) as server:
        yield server


def test_a_body_beyond_the_limit_is_refused(narrow: Running) -> None:
    assert error_of(narrow, b"x" * 10_001, 413)["code"] == "request_too_large"
    chunks = narrow.client.post("/v1/embeddings", content=iter([b"x" * 6000] * 2))
    assert chunks.status_code == 413


def test_more_tokens_than_a_request_may_have_are_refused(narrow: Running) -> None:
    error = error_of(narrow, {"model": "nano", "input": ["word " * 90] * 5})
    assert error["code"] == "max_tokens_per_request"


def connect(server: Running) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def test_a_half_sent_body_is_given_up_in_time(narrow: Running) -> None:
    with connect(narrow) as connection:
        connection.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
        )
        assert b"408" in connection.recv(1000).partition(b"\r\n")[0]


def test_a_head_that_never_ends_is_hung_up_on(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImpatientProtocol, "head_timeout_s", 0.3)
    with connect(server) as connection:
        began = time.monotonic()
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nx-slow: ")
        assert connection.recv(100) == b""
        assert time.monotonic() - began < 4
    assert server.embed(input="still here").status_code == 200
