"""`gteopt export`: write an artifact as an OpenVINO model."""

from __future__ import annotations

import shutil
from pathlib import Path

from gteopt.build.st_folder import WEIGHTS, _write_json
from gteopt.encoder.description import parse_dtype
from gteopt.encoder.loading import load_openvino_weights
from gteopt.encoder.openvino import save_openvino_model
from gteopt.encoder.skeleton import build_skeleton, build_whole_config
from gteopt.errors import InputError, UnsupportedError
from gteopt.model.artifact import MANIFEST
from gteopt.model.checkpoint import VECTORS_FILE, open_checkpoint


def export_openvino(
    artifact: str | Path, out: Path, *, hub_dir: Path | None = None, revision: str | None = None
) -> None:
    """Write a folder that Sentence Transformers opens with `backend="openvino"`, without gteopt.

    It holds the artifact's tokenizer, pooling and prompts, and an OpenVINO model with the packed
    weights. Its vectors are float32; gteopt's vector codes are not part of it.

    Args:
        artifact: artifact folder, or `<org>/<name>`.
        out: folder to create.
        hub_dir: see `load`.
        revision: see `load`.

    Raises:
        InputError: not an artifact, or `out` exists.
        IntegrityError: see `open_checkpoint`.
        UnsupportedError: OpenVINO is missing or cannot express this model; see
            `gteopt.encoder.openvino.OpenVinoModel`.
        OSError: the folder cannot be written, for example because the disk is full.
    """
    if out.exists():
        raise InputError(f"{out} exists; give a new folder, or remove it")
    # A base on the Hub is refused before its weights are downloaded.
    checkpoint = open_checkpoint(artifact, hub_dir=hub_dir, revision=revision, headers_only=True)
    manifest = checkpoint.manifest
    if manifest is None:
        raise InputError(
            f"{artifact} is not an artifact; build one with `gteopt quantize`, which keeps all "
            f"weights with `--recipe bf16`"
        )
    if not checkpoint.weight_files:
        checkpoint = open_checkpoint(artifact, hub_dir=hub_dir, revision=revision)
    if checkpoint.latent is not None:
        raise UnsupportedError("latent-attention pooling is not supported in an OpenVINO model")
    unfinished = out.with_name(f".{out.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    not_copied = {path.name for path in checkpoint.weight_files}
    not_copied |= {MANIFEST, VECTORS_FILE, WEIGHTS, "README.md", "model.safetensors.index.json"}

    def ignored(folder: str, names: list[str]) -> list[str]:
        is_top = Path(folder) == checkpoint.folder
        return [name for name in names if name in not_copied] if is_top else []

    try:
        shutil.copytree(checkpoint.folder, unfinished, ignore=ignored)
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        _write_json(unfinished / "config.json", config)
        kind = parse_dtype(manifest.base.dtype)
        weights = load_openvino_weights(checkpoint, build_skeleton(checkpoint), kind)
        save_openvino_model(build_whole_config(checkpoint), weights, unfinished)
        unfinished.replace(out)
    except shutil.Error as error:  # its message is a list of files and reasons
        raise OSError(f"{out} cannot be written: {error.args[0][0][2]}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
