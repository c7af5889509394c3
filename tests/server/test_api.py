"""Over a real connection, real clients get the vectors of `Encoder.encode`."""

from __future__ import annotations

import asyncio
import base64

import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from gteopt.encoder import Encoder
from tests.server.running_server import Running

TEXTS = [
    "how tall is mont blanc",
    "Mont Blanc is 4,806 metres high.",
    "a",
    "Überlänge, 中文 and 🙂 are text too.",
    "word " * 200,
]


def encoder(server: Running, model: str = "nano") -> Encoder:
    return server.service.models[model].encoder


def decoded(text: str, dtype: str = "<f4") -> NDArray[np.float32]:
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("model", ["nano", "minilm"])
def test_the_openai_client_gets_the_vectors_of_encode(
    server: Running, client: openai.OpenAI, model: str
) -> None:
    answer = client.embeddings.create(model=model, input=TEXTS)  # base64 underneath
    vectors = np.array([row.embedding for row in answer.data])
    np.testing.assert_allclose(vectors, encoder(server, model).encode(TEXTS), atol=1e-5)
    assert [row.index for row in answer.data] == list(range(len(TEXTS)))
    assert answer.model == model
    lengths = encoder(server, model).tokenization.lengths(TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(lengths)


def test_floats_and_base64_are_the_same_little_endian_numbers(server: Running) -> None:
    as_list, as_base64 = (
        server.embed(input="same", encoding_format=encoding).json()["data"][0]["embedding"]
        for encoding in ("float", "base64")
    )
    np.testing.assert_array_equal(np.array(as_list, np.float32), decoded(as_base64))


def test_the_async_client_gets_many_answers_at_once_each_its_own(server: Running) -> None:
    texts = [f"text number {i} " + "and more " * (i % 17) for i in range(60)]

    async def ask() -> NDArray[np.float32]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(client.embeddings.create(model="nano", input=text) for text in texts)
            )
        return np.array([answer.data[0].embedding for answer in answers])

    np.testing.assert_allclose(asyncio.run(ask()), encoder(server).encode(texts), atol=1e-5)


def test_a_vector_does_not_depend_on_what_it_is_batched_with(server: Running) -> None:
    alone = server.embed(input="a query").json()["data"][0]["embedding"]
    beside = server.embed(input=["word " * n for n in range(1, 200, 9)] + ["a query"]).json()
    np.testing.assert_allclose(beside["data"][-1]["embedding"], alone, atol=1e-5)


@pytest.mark.parametrize("dims", [256, 128, 64, 32])
def test_dimensions_are_cut_and_renormalised(server: Running, dims: int) -> None:
    answer = server.embed(input=TEXTS, dimensions=dims).json()
    vectors = np.array([row["embedding"] for row in answer["data"]])
    cut = encoder(server).encode(TEXTS)[:, :dims].astype(np.float64)
    np.testing.assert_allclose(vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-5)
    assert answer["dimensions"] == dims


def test_signs_are_packed_as_ubinary_and_shifted_as_binary(server: Running) -> None:
    expected = np.packbits(encoder(server).encode(TEXTS) > 0, axis=1)
    packed = server.embed(input=TEXTS, output_dtype="ubinary").json()
    np.testing.assert_array_equal([row["embedding"] for row in packed["data"]], expected)
    signed = server.embed(input=TEXTS, embedding_dtype="binary").json()
    signs = np.array([row["embedding"] for row in signed["data"]])
    np.testing.assert_array_equal(signs + 128, expected)
    short = server.embed(input="x", output_dtype="ubinary", encoding_format="base64").json()
    assert len(base64.b64decode(short["data"][0]["embedding"])) == 256 // 8


def test_queries_get_their_prompt_and_the_answer_says_so(server: Running) -> None:
    nano = encoder(server)
    as_query = server.embed(input="mont blanc", input_type="query").json()
    expected = nano.encode(["mont blanc"], role="query")[0]
    np.testing.assert_allclose(as_query["data"][0]["embedding"], expected, atol=1e-5)
    assert as_query["input_type"] == "query"
    instructed = server.embed(input="mont blanc", instruction="Find mountains").json()
    expected = nano.encode(["mont blanc"], role="query", instruction="Find mountains")[0]
    np.testing.assert_allclose(instructed["data"][0]["embedding"], expected, atol=1e-5)
    named = server.embed(input="mont blanc", prompt_name="query").json()
    np.testing.assert_array_equal(named["data"][0]["embedding"], as_query["data"][0]["embedding"])


def test_a_text_that_is_too_long_is_cut_only_where_that_is_asked_for(server: Running) -> None:
    long = " ".join(f"word{i}" for i in range(1500))
    refused = server.embed(model="minilm", input=["short", long])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input[1]"
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    limit = encoder(server, "minilm").tokenization.max_tokens
    end = server.embed(model="minilm", input=["short", long], truncate="END").json()
    np.testing.assert_allclose(
        end["data"][1]["embedding"], encoder(server, "minilm").encode([long])[0], atol=1e-5
    )
    assert end["usage"]["truncated_inputs"] == 1
    start = server.embed(model="minilm", input=long, truncate="start").json()
    assert start["usage"]["truncated_inputs"] == 1
    assert limit - 8 <= start["usage"]["total_tokens"] <= limit
    last_words = " ".join(f"word{i}" for i in range(1500 - limit // 4, 1500))
    cosine = np.dot(
        start["data"][0]["embedding"], encoder(server, "minilm").encode([last_words])[0]
    )
    assert cosine > 0.95


def test_own_token_ids_give_the_vector_of_their_text(server: Running) -> None:
    for model in ("nano", "minilm"):
        ids = server.client.post("/tokenize", json={"model": model, "input": TEXTS}).json()
        assert ids["tokens"] == [
            list(token_ids) for token_ids in encoder(server, model).tokenization.tokenize(TEXTS)
        ]
        answer = server.embed(model=model, input=ids["tokens"], tokenizer="model").json()
        vectors = np.array([row["embedding"] for row in answer["data"]])
        np.testing.assert_allclose(vectors, encoder(server, model).encode(TEXTS), atol=1e-5)
    bare = encoder(server, "minilm").tokenization.tokenizer("mont blanc", add_special_tokens=False)[
        "input_ids"
    ]
    answer = server.embed(model="minilm", input=bare, tokenizer="model").json()
    expected = encoder(server, "minilm").encode(["mont blanc"])[0]
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected, atol=1e-5)


def test_partial_answers_name_what_failed(server: Running) -> None:
    answer = server.embed(
        model="minilm", input=["one", "word " * 2000, "two"], on_error="null"
    ).json()
    assert [row["embedding"] is None for row in answer["data"]] == [False, True, False]
    assert [(error["index"], error["code"]) for error in answer["errors"]] == [
        (1, "context_length_exceeded")
    ]


def test_models_can_be_listed_and_looked_up(server: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["nano", "minilm"]
    assert client.models.retrieve("minilm").owned_by == "gteopt"
    with pytest.raises(openai.NotFoundError, match="did you mean minilm"):
        client.models.retrieve("minilmm")


def test_similarity_is_the_cosine_of_query_and_document(server: Running) -> None:
    answer = server.client.post(
        "/similarity",
        json={"model": "nano", "queries": "tall mountains", "documents": TEXTS[:2]},
    ).json()
    nano = encoder(server)
    expected = nano.encode(["tall mountains"], role="query") @ nano.encode(TEXTS[:2]).T
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-5)


def test_info_says_what_is_served(server: Running) -> None:
    models = {model["id"]: model for model in server.client.get("/info").json()["models"]}
    assert models["nano"]["dimensions"] == [256, 128, 64, 32]
    assert models["minilm"]["dims"] == 384
    assert models["minilm"]["max_tokens"] == 256
    assert models["nano"]["sha256"] == encoder(server).sha256


def test_a_server_at_work_is_alive_and_ready(server: Running) -> None:
    assert server.client.get("/livez").json() == {"alive": True}
    assert server.client.get("/readyz").json() == {"ready": True}


def test_metrics_count_tokens_and_requests(server: Running) -> None:
    def sums(text: str, name: str) -> float:
        lines = (line for line in text.splitlines() if line.startswith(name))
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = server.client.get("/metrics").text
    answer = server.embed(input=["one", "two"]).json()
    after = server.client.get("/metrics").text
    for name, rise in (
        ("gteopt_tokens_total", answer["usage"]["total_tokens"]),
        ('gteopt_requests_total{route="/v1/embeddings",status="200"}', 1),
        ("gteopt_batch_texts_sum", 2),
    ):
        assert sums(after, name) - sums(before, name) == rise


def test_answers_carry_the_request_id(server: Running) -> None:
    answer = server.client.get("/livez", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert len(server.client.get("/livez").headers["x-request-id"]) == 32


def test_large_answers_are_whole(server: Running) -> None:
    texts = [f"text {i}" for i in range(2048)]
    answer = server.embed(input=texts, encoding_format="base64").json()
    vectors = np.array([decoded(row["embedding"]) for row in answer["data"]])
    assert vectors.shape == (2048, 256)
    sample = [0, 1, 1000, 2047]
    expected = encoder(server).encode([texts[i] for i in sample])
    np.testing.assert_allclose(vectors[sample], expected, atol=1e-5)


def test_the_page_holds_everything_it_needs(server: Running) -> None:
    page = httpx.get(f"{server.url}/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "src=" not in page.text
