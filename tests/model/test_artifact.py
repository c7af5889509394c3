"""An artifact is complete and as its manifest records it, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import numpy as np
import pytest

import gteopt
from gteopt.errors import InputError, IntegrityError
from gteopt.model.artifact import (
    artifact_sha256,
    hash_file,
    read_manifest,
    verify,
    verify_while_reading,
)

TEXTS = ["Bridges carry loads to the ground.", "一座桥", "Pont"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "rtn"
    gteopt.quantize("nano", "rtn-int4", out)
    return out


@pytest.fixture
def artifact(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "copy"))


def test_a_whole_artifact_verifies_and_every_file_is_recorded(artifact: Path) -> None:
    manifest = verify(artifact)
    assert {file.path for file in manifest.files} | {"gteopt.json"} == {
        path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("position", [0, 200, -1])
def test_one_flipped_bit_in_any_weight_file_is_found(artifact: Path, position: int) -> None:
    path = artifact / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"model\.safetensors has changed"):
        gteopt.load(artifact)


def test_weights_are_hashed_beside_what_reads_them(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load then takes as long as its slowest part, not as long as the sum."""
    reading = Event()

    def hash_after_that(path: Path) -> str:
        assert path.suffix != ".safetensors" or reading.wait(30)
        return hash_file(path)

    monkeypatch.setattr("gteopt.model.artifact.hash_file", hash_after_that)
    with verify_while_reading(artifact) as manifest:
        reading.set()
    assert manifest == read_manifest(artifact)


def test_an_error_of_whoever_reads_a_whole_artifact_stays_that_error(artifact: Path) -> None:
    with pytest.raises(KeyError, match="own"), verify_while_reading(artifact):
        raise KeyError("own")


def test_missing_extra_and_shortened_files_are_all_named_at_once(artifact: Path) -> None:
    (artifact / "tokenizer.json").unlink()
    (artifact / "run_me.py").write_text("print('no')")
    (artifact / "config.json").write_bytes((artifact / "config.json").read_bytes()[:-1])
    with pytest.raises(IntegrityError) as caught:
        verify(artifact)
    message = str(caught.value)
    assert "tokenizer.json is missing" in message
    assert "run_me.py is not in the manifest" in message
    assert "config.json has" in message


@pytest.mark.parametrize(
    "path", ["../own.txt", "/etc/hostname", "a/../../own.txt", "C:\\own.txt", ""]
)
def test_a_manifest_that_leads_out_of_its_folder_is_refused(artifact: Path, path: str) -> None:
    """A manifest may come from anywhere; files that it names are read, copied and removed."""
    manifest = json.loads((artifact / "gteopt.json").read_text())
    manifest["files"][0]["path"] = path
    (artifact / "gteopt.json").write_text(json.dumps(manifest))
    with pytest.raises(IntegrityError, match="is not inside the artifact"):
        verify(artifact)


def test_an_edited_manifest_changes_the_artifacts_name(artifact: Path) -> None:
    before = artifact_sha256(artifact)
    content = json.loads((artifact / "gteopt.json").read_text())
    content["recipe"]["summary"] = "something else"
    (artifact / "gteopt.json").write_text(json.dumps(content))
    assert artifact_sha256(artifact) != before
    content["surprise"] = 1
    (artifact / "gteopt.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError, match="surprise"):
        verify(artifact)


def test_save_then_load_gives_identical_vectors(original: Path, artifact: Path) -> None:
    np.testing.assert_array_equal(
        gteopt.load(original).encode(TEXTS), gteopt.load(artifact).encode(TEXTS)
    )


def test_the_same_build_gives_the_same_bytes(original: Path, tmp_path: Path) -> None:
    gteopt.quantize("nano", "rtn-int4", tmp_path / "again")
    assert artifact_sha256(tmp_path / "again") == artifact_sha256(original)


def test_an_out_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists and holds other files"):
        gteopt.quantize("nano", "bf16", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def linked(place: Path) -> Path:
    (place / "there").mkdir()
    (place / "link").symlink_to(place / "there")
    return place / "link"


def here(place: Path) -> Path:
    return Path(os.path.relpath(place))


def in_a_file(place: Path) -> Path:
    (place / "file").write_text("")
    return place / "file" / "a" / "variant"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (linked, "is a link; give the folder itself"),
        (here, "is the folder that gteopt runs in"),
        (in_a_file, "file is no folder"),
        (lambda _: Path("/proc/variant"), "no folder can be made in /proc"),
        (lambda _: Path("/dev/shm/.."), "cannot be replaced|holds other files"),
    ],
)
def test_a_place_that_no_artifact_can_be_put_at_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Callable[[Path], Path], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out = where(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        gteopt.quantize("nano", "bf16", out)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_artifact_can_be_put_on_another_file_system(original: Path, tmp_path: Path) -> None:
    """It is staged beside its place, because a rename does not cross file systems."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system at /dev/shm")
    with TemporaryDirectory(dir=shared) as other:
        gteopt.quantize("nano", "rtn-int4", Path(other) / "out")
        assert artifact_sha256(Path(other) / "out") == artifact_sha256(original)
        assert [path.name for path in Path(other).iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", ["bf16", "rtn-int4", "rtn-int8"])
def test_copied_weights_outlive_their_files(tmp_path: Path, recipe: str) -> None:
    """In a child process, which a truncated mapped file would end with a bus error."""
    gteopt.quantize("nano", recipe, tmp_path / "out", dtype="float32")
    script = (
        "import sys, numpy as np, gteopt; from pathlib import Path\n"
        "out = Path(sys.argv[1])\n"
        "wanted = gteopt.load(out).encode(['a text'])\n"
        "encoder = gteopt.load(out, copy=True)\n"
        "for path in out.rglob('*.safetensors'): path.open('wb').close()\n"
        "np.testing.assert_array_equal(encoder.encode(['a text']), wanted)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=True)


def test_another_recipe_never_replaces_an_artifact(artifact: Path) -> None:
    before = artifact_sha256(artifact)
    with pytest.raises(InputError, match="holds another artifact"):
        gteopt.quantize("nano", "bf16", artifact)
    assert artifact_sha256(artifact) == before


def test_another_dtype_is_another_build(original: Path) -> None:
    with pytest.raises(InputError, match="holds another artifact"):
        gteopt.quantize("nano", "rtn-int4", original, dtype="float32")


def test_a_folder_that_is_no_artifact_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no gteopt\.json"):
        verify(tmp_path)
