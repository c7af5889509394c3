"""Foreign files are data: for any content, the answer is a vector or an error of gteopt.

These runs are short and seeded. `make fuzz` runs many more examples of each surface.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import gteopt
from gteopt.build.calibration_texts import draw_calibration_texts
from gteopt.config.recipe import Calibration, Recipe, load_recipe
from gteopt.errors import GteoptError, escape_control_characters
from gteopt.evaluation.user_data import read_own_data
from gteopt.model.artifact import verify
from tests.support.architectures import make

N_EXAMPLES = int(os.environ.get("GTEOPT_FUZZ", "30"))
FUZZ = settings(
    max_examples=N_EXAMPLES,
    derandomize="GTEOPT_FUZZ" not in os.environ,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["../x", "/etc/passwd", "\0", "a" * 5000, "[/b]", "\x1b[2J", "{}", "1e300", "re:(.*)*x"]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FILES = (
    "config.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make("bert", tmp_path_factory.mktemp("fuzz") / "bert")
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "find: "}, "similarity_fn_name": "cosine"})
    )
    return folder


@pytest.fixture(scope="module")
def artifact(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fuzz") / "artifact"
    gteopt.quantize(base, "rtn-int8", out, dtype="float32")
    return out


@contextmanager
def bounded() -> Iterator[None]:
    """Fails if a reader takes 10 seconds of a processor, or 2 GB of memory."""
    start_s, peak_kb = time.process_time(), getrusage(RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start_s < 10
    assert getrusage(RUSAGE_SELF).ru_maxrss - peak_kb < 2 << 20


def encode_or_refuse(folder: Path) -> None:
    """Open and encode; anything but vectors or an error of gteopt fails the test."""
    with warnings.catch_warnings(), bounded():
        warnings.simplefilter("ignore")
        message = "vectors"
        try:
            gteopt.load(folder, dtype="float32").encode(["a text", "another one"], role="query")
        except GteoptError as error:
            message = str(error)
    assert 0 < len(message) < 8000


def mutated(content: Any, data: st.DataObject) -> Any:
    """The content with one value, at any depth, replaced, removed or added."""
    if isinstance(content, dict) and content:
        key = data.draw(st.sampled_from(sorted(content)))
        kind = data.draw(st.sampled_from(["inside", "replace", "remove", "add"]))
        if kind == "inside":
            return {**content, key: mutated(content[key], data)}
        if kind == "replace":
            return {**content, key: data.draw(VALUES)}
        if kind == "add":
            return {**content, data.draw(st.text(max_size=12)): data.draw(VALUES)}
        return {name: value for name, value in content.items() if name != key}
    if isinstance(content, list) and content:
        at = data.draw(st.integers(0, len(content) - 1))
        return [*content[:at], mutated(content[at], data), *content[at + 1 :]]
    return data.draw(VALUES)


@FUZZ
@given(data=st.data(), file=st.sampled_from(FILES))
def test_any_json_of_a_model_folder(base: Path, data: st.DataObject, file: str) -> None:
    path = base / file
    original = path.read_bytes()
    try:
        if data.draw(st.booleans()):
            path.write_text(json.dumps(mutated(json.loads(original), data)))
        else:
            at = data.draw(st.integers(0, len(original)))
            path.write_bytes(original[:at] + data.draw(st.binary(max_size=8)) + original[at + 3 :])
        encode_or_refuse(base)
    finally:
        path.write_bytes(original)


@FUZZ
@given(data=st.data())
def test_any_bytes_of_a_weight_file(base: Path, data: st.DataObject) -> None:
    path = base / "model.safetensors"
    original = path.read_bytes()
    try:
        (n_header,) = struct.unpack("<Q", original[:8])
        at = data.draw(st.integers(0, n_header + 8))
        cut = data.draw(st.sampled_from([None, 0, 7, n_header, len(original) - 1]))
        path.write_bytes(
            (original[:at] + data.draw(st.binary(max_size=8)) + original[at + 2 :])[:cut]
        )
        encode_or_refuse(base)
    finally:
        path.write_bytes(original)


PACKED = {
    "gptq": {"bits": 4, "group_size": 32, "symmetric": False},
    "compressed-tensors": {"bits": 4, "group_size": 32, "symmetric": False},
    "bitsandbytes": {"bits": 4, "group_size": 64, "symmetric": True, "number_format": "nf4"},
}


@pytest.fixture(scope="module")
def packed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each format, as another library leaves it: without a manifest."""
    folders = {}
    for form, scheme in PACKED.items():
        weights = {"method": "rtn", "scheme": scheme}
        recipe = {"schema": "gteopt.recipe/1", "name": "packed", "format": form, "weights": weights}
        folders[form] = tmp_path_factory.mktemp("packed") / form
        validated = Recipe.model_validate(recipe)
        assert gteopt.quantize(base, validated, folders[form], dtype="float32").format == form
        (folders[form] / "gteopt.json").unlink()
        encode_or_refuse(folders[form])
    return folders


@FUZZ
@given(data=st.data(), form=st.sampled_from(sorted(PACKED)))
def test_anything_that_another_library_quantized(
    packed: dict[str, Path], data: st.DataObject, form: str
) -> None:
    folder = packed[form]
    config, weights = folder / "config.json", folder / "model.safetensors"
    originals = {path: path.read_bytes() for path in (config, weights)}
    try:
        if data.draw(st.booleans()):
            config_fields = json.loads(originals[config])
            quantization = mutated(config_fields["quantization_config"], data)
            config.write_text(json.dumps({**config_fields, "quantization_config": quantization}))
        else:
            tensors = load_file(weights)
            name = data.draw(st.sampled_from(sorted(tensors)))
            kind = data.draw(st.sampled_from(["remove", "cut", "flatten", "type", "rename"]))
            tensor = tensors.pop(name)
            if kind == "rename":
                tensors[name + data.draw(st.sampled_from(["_", ".scales", ".absmax"]))] = tensor
            elif kind != "remove":
                changed = {"cut": tensor[:1], "flatten": tensor.flatten(), "type": tensor.int()}
                tensors[name] = changed[kind].contiguous()
            save_file(tensors, weights, metadata={"format": "pt"})
        encode_or_refuse(folder)
    finally:
        for path, content in originals.items():
            path.write_bytes(content)


@FUZZ
@given(data=st.data())
def test_any_change_of_an_artifact_is_refused(artifact: Path, data: st.DataObject) -> None:
    files = sorted(path for path in artifact.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from([file for file in files if file.name != "README.md"]))
    original = path.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    changed = (
        original[:at]
        + bytes([original[at] ^ (1 << data.draw(st.integers(0, 7)))])
        + original[at + 1 :]
    )
    try:
        path.write_bytes(changed)
        if path.name == "gteopt.json":  # the hash of this file is the artifact's identity
            encode_or_refuse(artifact)
        else:
            with bounded(), pytest.raises(GteoptError):
                verify(artifact)
    finally:
        path.write_bytes(original)


@FUZZ
@given(content=st.one_of(st.text(max_size=200), VALUES.map(json.dumps)))
def test_any_yaml(content: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("yaml") / "recipe.yaml"
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    with bounded(), pytest.raises(GteoptError):
        load_recipe(str(path))


def test_few_bytes_of_yaml_make_no_large_message(tmp_path: Path) -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"schema: gteopt.recipe/1\na0: &a0 [x, x, x]\n{levels}\nname: *a9\n")
    with pytest.raises(GteoptError, match="aliases") as caught:
        load_recipe(str(path))
    assert len(str(caught.value)) < 1000


@FUZZ
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".jsonl", ".csv", ".txt"]))
def test_any_file_of_texts(
    content: bytes, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("texts") / f"texts{suffix}"
    path.write_bytes(content)
    with bounded(), suppress(GteoptError):
        draw_calibration_texts(Calibration(texts=str(path)))
    with bounded(), suppress(GteoptError):
        read_own_data(path)


@FUZZ
@given(text=st.text())
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    shown = escape_control_characters(text)
    assert not {char for char in shown if ord(char) < 32 or 127 <= ord(char) < 160} - {"\n", "\t"}


@pytest.mark.parametrize("name", ["../outside", "/etc", "a/../../b", "C:\\x", "link", "a" * 5000])
def test_no_path_leads_out_of_a_model_folder(base: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    (folder / "link").symlink_to(tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = name
    (folder / "modules.json").write_text(json.dumps(modules))
    message = r"out of the folder|outside of the model folder|longer than a path"
    with pytest.raises(GteoptError, match=message):
        gteopt.load(folder)
