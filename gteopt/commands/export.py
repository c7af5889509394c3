"""What `gteopt export` does: write an artifact as an OpenVINO model."""

from __future__ import annotations

import shutil
from pathlib import Path

from gteopt.build.st_folder import WEIGHTS, _write_json
from gteopt.encoder.description import parse_dtype
from gteopt.encoder.loading import openvino_weights
from gteopt.encoder.openvino import save
from gteopt.encoder.skeleton import build_skeleton, whole_config
from gteopt.errors import InputError, UnsupportedError
from gteopt.model.artifact import MANIFEST
from gteopt.model.checkpoint import VECTORS_FILE, open_checkpoint


def export_openvino(
    artifact: str | Path, out: Path, *, hub_dir: Path | None = None, revision: str | None = None
) -> None:
    """Write a folder that Sentence Transformers opens with `backend="openvino"`, without gteopt.

    It has the artifact's tokenizer, pooling and prompts, and its packed weights as they are inside
    an OpenVINO graph.

    Args:
        artifact: its folder, or `<org>/<name>`; its vectors are not shortened by a code of gteopt's
            own.
        out: folder to make.
        hub_dir: as for `load`.
        revision: as for `load`.

    Raises:
        InputError: no artifact, or `out` exists.
        IntegrityError: see `open_checkpoint`.
        UnsupportedError: OpenVINO is missing or cannot say this model; see
            `gteopt.encoder.openvino.OpenVinoModel`.
        OSError: the folder cannot be written (a full disk).
    """
    if out.exists():
        raise InputError(f"{out} exists; name a new folder, or remove it")
    # A base on the Hub is refused before its weights are fetched.
    checkpoint = open_checkpoint(artifact, hub_dir=hub_dir, revision=revision, headers_only=True)
    manifest = checkpoint.manifest
    if manifest is None:
        raise InputError(f"{artifact} is not an artifact; build one, `--recipe bf16` for a base")
    if not checkpoint.weight_files:
        checkpoint = open_checkpoint(artifact, hub_dir=hub_dir, revision=revision)
    if checkpoint.latent is not None:
        raise UnsupportedError("latent-attention pooling is not part of an OpenVINO graph")
    stage = out.with_name(f".{out.name}.part")
    shutil.rmtree(stage, ignore_errors=True)
    not_taken = {path.name for path in checkpoint.weight_files}
    not_taken |= {MANIFEST, VECTORS_FILE, "README.md", "model.safetensors.index.json"}

    def left_out(folder: str, names: list[str]) -> list[str]:
        inside = Path(folder) != checkpoint.folder
        return [] if inside else [name for name in names if name in not_taken or name == WEIGHTS]

    try:
        shutil.copytree(checkpoint.folder, stage, ignore=left_out)
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        _write_json(stage / "config.json", config)
        kind = parse_dtype(manifest.base.dtype)
        weights = openvino_weights(checkpoint, build_skeleton(checkpoint), kind)
        save(whole_config(checkpoint), weights, stage)
        stage.replace(out)
    except shutil.Error as error:  # a list of files and reasons, which is no sentence
        raise OSError(f"{out} cannot be written: {error.args[0][0][2]}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
