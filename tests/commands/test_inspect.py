"""What `inspect` says of a model on the Hub, and which bytes it downloads for that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gteopt
from gteopt.commands.inspect import inspect
from gteopt.config.recipe import load_recipe
from gteopt.errors import InputError
from gteopt.model.artifact import artifact_sha256, read_manifest
from gteopt.records.inspection import Inspection
from tests.support.hub_server import Hub, Repo, running
from tests.support.hub_user import TOKEN, User, contents
from tests.support.models import MODELS, publish

REPO = "Alibaba-NLP/gte-Qwen2-7B-instruct"
COMMIT = "c0ffee" + 34 * "0"


@pytest.fixture
def hub() -> Iterator[Hub]:
    yield from running(TOKEN, owner="me")


@pytest.fixture
def user(hub: Hub, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


def inspected(user: User, *arguments: object) -> dict[str, Any]:
    ran = user.run("inspect", *arguments, "--json")
    assert ran.returncode == 0, ran.stderr
    description: dict[str, Any] = json.loads(ran.stdout)
    return description


def as_json(inspection: Inspection) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(inspection.model_dump_json(by_alias=True))
    return content


def weight_bytes(served: dict[str, int]) -> int:
    return sum(n for path, n in served.items() if path.endswith(".safetensors"))


def test_a_base_is_described_in_full_before_its_weights_are_fetched(
    user: User, tmp_path: Path
) -> None:
    """The description equals that of the whole folder. Of its two shards only headers are sent."""
    model = replace(MODELS[0], config={**MODELS[0].config, "vocab_size": 20_000})
    folder = tmp_path / REPO
    publish(folder, model)
    files = contents(folder)
    user.hub.repos[REPO] = Repo(private=False, commits=[(COMMIT, files)])
    local = as_json(inspect(REPO, hub_dir=tmp_path))

    remote = inspected(user, REPO)
    n_shards = sum(path.endswith(".safetensors") for path in files)
    assert 0 < weight_bytes(user.hub.served) <= n_shards * 100_001
    assert weight_bytes({path: len(data) for path, data in files.items()}) > 5_000_000
    assert (remote["sha256"], remote["revision"]) == (None, COMMIT)
    assert remote["notes"][-1].startswith(
        "the weights are not on this machine (0.01 GB to download)"
    )
    differs = ("sha256", "revision", "notes")
    for estimate in (*remote["estimates"], *local["estimates"]):
        estimate.pop("build_s")  # from a probe of this machine, timed anew in each process
    assert {k: v for k, v in remote.items() if k not in differs} == {
        k: v for k, v in local.items() if k not in differs
    }
    assert local["notes"] == remote["notes"][:-1]
    ran = user.run("quantize", REPO, "--recipe", "bf16", "--out", tmp_path / "out")
    assert ran.returncode == 0, ran.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.base.revision == COMMIT
    user.hub.forget_traffic()
    again = inspected(user, REPO)  # now the weights are on this machine
    assert again["notes"] == local["notes"]
    assert weight_bytes(user.hub.served) == 0


def test_only_the_headers_of_local_weights_are_read(tmp_path: Path) -> None:
    """A 7B model's 30 GB would take minutes to read."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        pytest.skip("only Linux counts the bytes that a process reads")

    def n_bytes_read() -> int:
        return int(counts.read_text().split()[1])

    rows = 40_000
    publish(tmp_path / "model", replace(MODELS[0], config={**MODELS[0].config, "vocab_size": rows}))
    int8 = load_recipe("rtn-int8")
    inspect("nano", recipe=int8)  # imports modules, which reads files
    before = n_bytes_read()
    description = inspect(tmp_path / "model", recipe=int8)
    n_weight_bytes = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert description.sha256 is None
    assert n_bytes_read() - before < n_weight_bytes / 2


def test_an_artifact_is_described_by_its_manifest_alone(user: User, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    gteopt.quantize("nano", "rtn-int4", out)
    user.hub.repos["me/int4"] = Repo(private=False, commits=[(COMMIT, contents(out))])
    description = inspected(user, "me/int4")
    assert description["manifest"] == as_json(inspect(out))["manifest"]
    assert description["sha256"] == artifact_sha256(out)
    assert "not checked against their hashes" in description["notes"][-1]
    assert (description["estimates"], description["estimated_for"]) == ([], None)
    with pytest.raises(InputError, match="recipe int8 needs a base"):
        inspect(out, recipe=load_recipe("int8"))
    n_files = sum(path.endswith(".safetensors") for path in contents(out))
    assert weight_bytes(user.hub.served) <= n_files * 100_001


def test_what_cannot_be_described_is_named(user: User, tmp_path: Path) -> None:
    publish(tmp_path / "model", MODELS[0])
    files = contents(tmp_path / "model")
    del files["model-00002-of-00002.safetensors"]
    user.hub.repos["me/half"] = Repo(private=False, commits=[(COMMIT, files)])
    for name, messages in (
        ("me/half", ["me/half lacks model-00002-of-00002.safetensors"]),
        (
            "Alibaba-NLP/gte-Qwen2-7B-instuct",
            [
                "there is no repository Alibaba-NLP/gte-Qwen2-7B-instuct that you may see",
                "did you mean Alibaba-NLP/gte-Qwen2-7B-instruct",
            ],
        ),
    ):
        ran = user.run("inspect", name)
        assert ran.returncode == 1
        assert [message for message in messages if message not in ran.stderr] == []
        assert "Traceback" not in ran.stderr


def test_the_build_that_was_asked_for_is_predicted_before_it_starts(
    user: User, tmp_path: Path
) -> None:
    """The recipe is the user's, with every option of `quantize` that changes a size."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "schema: gteopt.recipe/1\nname: mine\n"
        "weights: {method: gptq, scheme: {bits: 3, group_size: 64, symmetric: false}}\n"
        "calibration: {n_texts: 48, max_tokens: 64}\nformat: gteopt\n"
    )
    options = ["--recipe", recipe, "--embed-int8", "--effort", "fast", "--dtype", "float32"]
    options += ["--activation-gb", "0", "--device", "cpu"]
    out = tmp_path / "out"
    description = inspected(user, "nano", *options)
    (predicted,) = description["estimates"]
    assert predicted["recipe"] == "mine"
    assert description["estimated_for"] == {
        "dtype": "float32",
        "device": "cpu",
        "activation_bytes": 0,
    }
    ran = user.run("quantize", "nano", *options, "--out", out)
    assert ran.returncode == 0, ran.stderr
    assert predicted["weight_bytes"] == pytest.approx(read_manifest(out).weight_bytes, rel=0.01)
    on_disk = sum(len(data) for data in contents(out).values())
    assert on_disk == pytest.approx(predicted["disk_bytes"], rel=0.02)
    # Every option has an effect: the prediction without options differs.
    (plain,) = inspected(user, "nano", "--recipe", recipe)["estimates"]
    (wide,) = inspected(user, "nano", "--recipe", recipe, "--dtype", "float32")["estimates"]
    assert wide["weight_bytes"] > plain["weight_bytes"] > predicted["weight_bytes"]
    on_gpu = inspected(user, "nano", *options[:-1], "cuda:3")
    in_memory = inspected(user, "nano", *options[:-4], "--device", "cuda:3")
    assert in_memory["estimated_for"]["device"] == "cuda"  # this machine need not have one
    (spilled,), (held,) = on_gpu["estimates"], in_memory["estimates"]
    assert held["device_bytes"] > spilled["device_bytes"]  # holds the hidden states
    assert predicted["device_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano", "--recipe", "gptq-int5"], "did you mean gptq-int"),
        (["nano", "--embed-int8"], "change a recipe; give --recipe"),
        (["nano", "--recipe", "rtn-int4", "--effort", "best"], "rtn-int4"),
        (["nano", "--device", "gpu"], "unknown device 'gpu'"),
        (["nano", "--dtype", "float16"], "dtype float16 is refused"),
    ],
)
def test_what_cannot_be_predicted_is_one_sentence(
    user: User, arguments: list[str], message: str
) -> None:
    ran = user.run("inspect", *arguments)
    assert (ran.returncode, ran.stderr.count("gteopt: ")) == (1, 1)
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_published_name_is_described_from_its_shape_without_a_network(tmp_path: Path) -> None:
    """The name may include its organisation. The head's parameters are not counted."""
    recipe = load_recipe("gptq-int4")
    for name, hub_dir in (("gte-Qwen2-7B-instruct", None), (REPO, tmp_path)):
        description = inspect(name, hub_dir=hub_dir, recipe=recipe)
        assert description.id == name
        assert description.n_parameters == 7_069_121_024
        assert (description.dims, description.family, description.sha256) == (
            3584,
            "gte-qwen",
            None,
        )
        assert any("shape that ships with gteopt" in note for note in description.notes)
        (estimate,) = description.estimates
        assert estimate.problem is None
        assert estimate.build_s is not None
        # A weight has 4 bits and its part of a scale and a zero point. The table is bfloat16.
        in_blocks = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 18944 * 3584)
        table = 151_646 * 3584
        assert estimate.weight_bytes is not None
        assert abs(estimate.weight_bytes / (in_blocks * 4.15625 / 8 + 2 * table) - 1) < 1e-3


def test_a_calibration_set_too_small_for_a_layer_is_said() -> None:
    recipe = load_recipe("gptq-int4")
    spec = recipe.calibration.model_copy(update={"n_texts": 8, "max_tokens": 32})
    small = recipe.model_copy(update={"calibration": spec})
    (estimate,) = inspect("gte-Qwen2-7B-instruct", recipe=small).estimates
    assert estimate.warning is not None
    assert "18,944 input features, fewer than 4 each" in estimate.warning
    assert inspect("nano", recipe=recipe).estimates[0].warning is None
