"""The wrappers of docs/python.md work in the libraries that they are for."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gteopt

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"
TEXTS = ["Plants turn light into sugar.", "Paris is in France.", ""]


def wrapper(name: str) -> Any:
    """The class of this name, as the page writes it."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (source,) = (block for block in blocks if f"class {name}(" in block)
    names: dict[str, Any] = {"gteopt": gteopt}
    exec(compile(source, PAGE.name, "exec"), names)
    return names[name]


def test_langchain_searches_with_the_vectors_of_the_encoder() -> None:
    store = pytest.importorskip("langchain_core.vectorstores", reason="needs langchain-core")
    embeddings = wrapper("GteoptEmbeddings")("nano", dtype="float32")
    encoder = gteopt.load("nano", dtype="float32")
    np.testing.assert_allclose(
        embeddings.embed_documents(TEXTS), encoder.encode_document(TEXTS), atol=1e-6
    )
    np.testing.assert_allclose(
        embeddings.embed_query(TEXTS[0]), encoder.encode_query(TEXTS[0]), atol=1e-6
    )
    memory = store.InMemoryVectorStore(embeddings)
    memory.add_texts(TEXTS)
    documents = memory.similarity_search("what do plants make of light", k=1)
    assert [document.page_content for document in documents] == TEXTS[:1]
    again = asyncio.run(embeddings.aembed_query(TEXTS[0]))
    assert again == embeddings.embed_query(TEXTS[0])


def test_llama_index_gets_the_vectors_of_the_encoder() -> None:
    pytest.importorskip("llama_index.core", reason="needs llama-index-core")
    embedding = wrapper("GteoptEmbedding")("nano", dtype="float32")
    encoder = gteopt.load("nano", dtype="float32")
    np.testing.assert_allclose(
        embedding.get_text_embedding_batch(TEXTS[:2]), encoder.encode_document(TEXTS[:2]), atol=1e-6
    )
    wanted = encoder.encode_query(TEXTS[0])
    np.testing.assert_allclose(embedding.get_query_embedding(TEXTS[0]), wanted, atol=1e-6)
    vector = asyncio.run(embedding.aget_query_embedding(TEXTS[0]))
    np.testing.assert_allclose(vector, wanted, atol=1e-6)
