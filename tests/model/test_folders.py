"""gteopt does what a Sentence Transformers folder says, or refuses it and says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import gteopt
from gteopt.errors import GteoptError, IntegrityError
from gteopt.model.checkpoint import open_checkpoint
from gteopt.model.foreign import foreign_errors
from tests.support.architectures import TEXTS, make, sentence_transformer


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return make("bert", tmp_path / "bert")


def alone(model: Any, **options: Any) -> np.ndarray:
    """Text by text: nano's tokenizer pads on the left, which moves the positions of a BERT."""
    vectors: np.ndarray = np.concatenate([model.encode([text], **options) for text in TEXTS])
    return vectors


def edit(path: Path, **fields: Any) -> None:
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**before, **fields}))


def sequence(folder: Path, *kinds: str) -> None:
    """Write a modules.json of these classes; Dense gets weights, Pooling its config."""
    rows = []
    width = 64
    for i, kind in enumerate(kinds):
        path = f"{i}_{kind}" if i else ""
        rows.append(
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
        if kind == "Dense":
            weight = torch.randn(32, width, generator=torch.Generator().manual_seed(i)) / 8
            edit(
                folder / path / "config.json",
                in_features=width,
                out_features=32,
                bias=False,
                activation_function="torch.nn.modules.activation.Tanh",
            )
            save_file({"linear.weight": weight}, folder / path / "model.safetensors")
            width = 32
        elif kind == "Pooling":
            edit(folder / path / "config.json", embedding_dimension=width, pooling_mode="mean")
    (folder / "modules.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    "kinds",
    [
        ("Transformer", "Pooling", "Normalize", "Dense"),
        ("Transformer", "Pooling", "Dense", "Normalize", "Dense", "Normalize"),
        ("Transformer", "Pooling"),
    ],
)
def test_modules_run_in_their_order(bert: Path, kinds: tuple[str, ...]) -> None:
    sequence(bert, *kinds)
    vectors = gteopt.load(bert, dtype="float32").embed(TEXTS)
    np.testing.assert_allclose(vectors, alone(sentence_transformer(bert)), atol=1e-5)


@pytest.mark.parametrize(
    "mode", ["max", "mean_sqrt_len_tokens", "weightedmean", "cls", "lasttoken", ["cls", "mean"]]
)
def test_every_pooling_mode_is_that_of_sentence_transformers(bert: Path, mode: Any) -> None:
    edit(bert / "1_Pooling" / "config.json", pooling_mode=mode)
    vectors = gteopt.load(bert, dtype="float32").embed(TEXTS)
    np.testing.assert_allclose(vectors, alone(sentence_transformer(bert)), atol=1e-5)


def test_the_default_prompt_and_the_similarity_are_kept(bert: Path, tmp_path: Path) -> None:
    sequence(bert, "Transformer", "Pooling")
    settings = {
        "prompts": {"topic": "About: "},
        "default_prompt_name": "topic",
        "similarity_fn_name": "dot",
    }
    edit(bert / "config_sentence_transformers.json", **settings)
    wanted = alone(sentence_transformer(bert))
    np.testing.assert_allclose(gteopt.load(bert, dtype="float32").encode(TEXTS), wanted, atol=1e-5)
    gteopt.quantize(bert, "bf16", tmp_path / "out", dtype="float32")
    theirs = sentence_transformer(tmp_path / "out")
    assert (theirs.default_prompt_name, theirs.similarity_fn_name) == ("topic", "dot")
    np.testing.assert_allclose(alone(theirs), wanted, atol=1e-5)


def test_a_prompt_that_pooling_leaves_out_is_left_out(bert: Path) -> None:
    edit(bert / "1_Pooling" / "config.json", include_prompt=False)
    edit(bert / "config_sentence_transformers.json", prompts={"query": "find this text: "})
    vectors = gteopt.load(bert, dtype="float32").encode(TEXTS, role="query")
    wanted = alone(sentence_transformer(bert), prompt_name="query")
    np.testing.assert_allclose(vectors, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config_sentence_transformers.json", {"router": {"a": 1}}, "does not know: router"),
        ("config_sentence_transformers.json", {"similarity_fn_name": "manhattan"}, "manhattan"),
        ("config_sentence_transformers.json", {"default_prompt_name": "x"}, "none of the prompts"),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder"}, "is a CrossEncoder"),
        ("sentence_bert_config.json", {"max_seq_length": "512 tokens"}, "max_seq_length"),
        ("sentence_bert_config.json", {"query_expansion": {"x": 1}}, "query_expansion"),
        ("1_Pooling/config.json", {"pooling_mode": "attention"}, "pooling attention"),
        ("config.json", {"num_hidden_layers": 0}, "no place for"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("config.json", {"model_type": "frobnicate"}, "no architecture 'frobnicate'"),
    ],
)
def test_what_would_give_other_vectors_is_refused(
    bert: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    edit(bert / file, **fields)
    with pytest.raises(GteoptError, match=message):
        gteopt.load(bert)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("Pooling", {"pooling_mode": False}, "pooling_mode"),
        ("Pooling", {"include_prompt": "no"}, "include_prompt"),
        ("Dense", {"out_features": 1 << 40}, "out_features"),
        ("Dense", {"use_residual": "yes"}, "use_residual"),
        ("Dense", {"activation_function": 3}, "activation_function"),
    ],
)
def test_a_field_of_a_module_of_another_type_is_named(
    bert: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    sequence(bert, "Transformer", "Pooling", "Dense")
    file = next(bert.glob(f"*_{kind}")) / "config.json"
    edit(file, **fields)
    with pytest.raises(GteoptError, match=f"config.json is wrong(.|\n)*{message}"):
        open_checkpoint(bert)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "merge it into its base"),
        ("model.Q4.gguf", "llama.cpp's format"),
        ("model.onnx", "as ONNX"),
        ("model.fp16.safetensors", "name of a variant"),
        ("pytorch_model.bin", "pickle"),
    ],
)
def test_a_folder_in_another_format_says_what_to_do(bert: Path, name: str, message: str) -> None:
    (bert / "model.safetensors").unlink()
    (bert / name).write_text("{}")
    with pytest.raises(GteoptError, match=message):
        gteopt.load(bert)


def test_a_module_with_a_pickle_alone_is_refused(bert: Path) -> None:
    sequence(bert, "Transformer", "Pooling", "Dense")
    weights = load_file(bert / "2_Dense" / "model.safetensors")
    (bert / "2_Dense" / "model.safetensors").unlink()
    torch.save(weights, bert / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(GteoptError, match="never read"):
        gteopt.load(bert)


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "1_Pooling/config.json", "sentence_bert_config.json"]
)
def test_the_hash_covers_every_file_that_decides_a_vector(
    bert: Path, file: str, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(bert, tmp_path / "other"))
    (other / file).write_text((other / file).read_text() + " ")
    assert open_checkpoint(other).sha256 != open_checkpoint(bert).sha256


def test_of_two_sets_of_weights_the_one_that_transformers_reads_is_taken(bert: Path) -> None:
    before = open_checkpoint(bert).sha256
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    edit(bert / "model.safetensors.index.json", **index)
    checkpoint = open_checkpoint(bert)
    assert [path.name for path in checkpoint.weight_files] == ["model.safetensors"]
    assert any("two sets of weights" in note for note in checkpoint.notes)
    assert checkpoint.sha256 != before


def test_weights_that_are_no_numbers_are_named(bert: Path, tmp_path: Path) -> None:
    weights = load_file(bert / "model.safetensors")
    name = next(name for name in weights if name.endswith("value.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GteoptError, match=name):
        gteopt.load(bert, dtype="float32").encode(TEXTS)
    with pytest.raises(GteoptError, match=name):
        gteopt.quantize(bert, "rtn-int8", tmp_path / "out", dtype="float32")


def test_an_end_token_that_the_tokenizer_was_told_to_add_is_added(tmp_path: Path) -> None:
    folder = make("mistral", tmp_path / "mistral")
    edit(folder / "1_Pooling" / "config.json", pooling_mode="lasttoken")
    edit(folder / "tokenizer.json", post_processor=None)
    edit(folder / "tokenizer_config.json", add_eos_token=True)
    tokenization = gteopt.load(folder).tokenization
    end = tokenization.tokenizer.eos_token_id
    assert [ids.count(end) for ids in tokenization.tokenize(TEXTS)] == [1, 1, 1]
    assert all(ids[-1] == end for ids in tokenization.tokenize([*TEXTS, "long " * 500]))


def test_a_last_token_model_without_an_end_token_is_told_what_its_vectors_are_of(
    tmp_path: Path,
) -> None:
    folder = make("mistral", tmp_path / "mistral")
    edit(folder / "tokenizer.json", post_processor=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gteopt.load(folder).encode(TEXTS)  # mean pooling needs no end token
    edit(folder / "1_Pooling" / "config.json", pooling_mode="lasttoken")
    with pytest.warns(UserWarning, match="the vector is that of the last word"):
        gteopt.load(folder).encode(TEXTS)


def test_the_folders_pooling_wins_over_the_familys_and_is_said(tmp_path: Path) -> None:
    """stella's layout: gte-Qwen2's remote code, and mean pooling."""
    folder = make("qwen2", tmp_path / "qwen2")
    edit(folder / "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.family is not None
    assert (checkpoint.family.name, checkpoint.pooling, checkpoint.attention) == (
        "gte-qwen",
        "mean",
        "bidirectional",
    )
    assert any("gteopt follows the folder" in note for note in checkpoint.notes)


def test_names_in_a_folder_reach_no_terminal_with_control_characters(bert: Path) -> None:
    """This holds for errors of gteopt and for the load report of transformers."""
    weights = load_file(bert / "model.safetensors")
    weights["encoder.layer.0.\x1b[2J\x1b]0;title\x07.weight"] = torch.zeros(2)
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    script = f"import gteopt; gteopt.load({str(bert)!r})"
    build = ["-m", "gteopt", "quantize", str(bert), "--recipe", "bf16", "--out", f"{bert}-out"]
    for command in (build, ["-c", script]):
        ran = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "info"},
            capture_output=True,
        )
        assert ran.returncode == 1
        shown = ran.stdout + ran.stderr
        assert b"LOAD REPORT" in shown
        assert not {0x1B, 0x07} & set(shown)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (ValueError("a name that says out of memory"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_a_device_without_memory_is_no_damaged_folder(
    tmp_path: Path, error: Exception, passes: bool
) -> None:
    with (
        pytest.raises(type(error) if passes else IntegrityError),
        foreign_errors(tmp_path, "loading"),
    ):
        raise error
