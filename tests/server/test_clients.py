"""Clients besides the OpenAI SDK, and generated requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from langchain_openai import OpenAIEmbeddings
from pydantic import SecretStr
from schemathesis.specs.openapi.checks import positive_data_acceptance

from gteopt.server.settings import ServerSettings
from tests.server.running_server import Running, running

TEXTS = ["how tall is mont blanc", "Mont Blanc is 4,806 metres high."]


def test_langchain_gets_our_vectors_when_it_sends_text(server: Running) -> None:
    client = OpenAIEmbeddings(
        model="nano",
        base_url=f"{server.url}/v1",
        api_key=SecretStr("none"),
        check_embedding_ctx_length=False,
    )
    expected = server.service.models["nano"].encoder.encode(TEXTS)
    np.testing.assert_allclose(client.embed_documents(TEXTS), expected, atol=1e-5)


def test_llama_index_gets_our_vectors(server: Running) -> None:
    """It sends queries in the same way as documents, so queries carry no instruction."""
    llama_index = pytest.importorskip(
        "llama_index.embeddings.openai",
        reason="run by hand: pip install llama-index-embeddings-openai",
    )
    client = llama_index.OpenAIEmbedding(
        model_name="nano", api_base=f"{server.url}/v1", api_key="none"
    )
    expected = server.service.models["nano"].encoder.encode(TEXTS)
    np.testing.assert_allclose(client.get_text_embedding_batch(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(client.get_query_embedding(TEXTS[0]), expected[0], atol=1e-5)


class Alphabet:
    """A small tokenizer with the interface of OpenAI's."""

    name = "alphabet"

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token_id) for token_id in ids)


def test_foreign_token_ids_are_refused_with_the_line_that_mends_the_client(
    server: Running,
) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model="nano", input=[[15339, 1917]])


def test_foreign_token_ids_are_decoded_where_the_server_knows_their_tokenizer() -> None:
    with running({"nano": "nano"}, ServerSettings(decoder=Alphabet())) as server:
        answer = server.embed(
            input=[[ord(character) for character in text] for text in TEXTS]
        ).json()
        expected = server.service.models["nano"].encoder.encode(TEXTS)
        vectors = np.array([row["embedding"] for row in answer["data"]])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        wrong = server.embed(input=[[2**31 - 1]])
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "input[0]"


def test_text_embeddings_inference_s_own_route_answers_one_artifact(server: Running) -> None:
    several = server.client.post("/embed", json={"inputs": TEXTS})
    assert "names no model" in several.json()["error"]["message"]


def test_no_generated_request_breaks_the_server_or_its_own_description(server: Running) -> None:
    """Every operation of /openapi.json with generated bodies, right ones and wrong ones."""
    document = server.client.get("/openapi.json").json()
    del document["paths"]["/admin/reload"]  # loads a model each time
    schema = schemathesis.openapi.from_dict(document)
    for result in schema.get_all_operations():
        operation = result.ok()  # type: ignore[union-attr]

        @settings(
            max_examples=15,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            derandomize=True,
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            response = case.call(base_url=server.url)
            assert response.status_code < 500, response.text
            # The schema does not say which models and lengths exist.
            case.validate_response(response, excluded_checks=[positive_data_acceptance])

        check()
    assert server.embed(input="after all of it").status_code == 200
