"""An artifact with shorter vectors or another code, made from one whose weights stay as they are.

Hides: which files are copied and which are written anew. Refuses to know: quantization.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from gteopt.build.calibration_texts import CalibrationText, draw_texts, record, tokenize
from gteopt.build.fit_vectors import _check_dims, _needs_texts
from gteopt.build.quantize import _finish, _finished, _open_stage
from gteopt.config.recipe import Recipe, VectorCode
from gteopt.config.yaml_files import invalid
from gteopt.encoder.loading import load_checkpoint
from gteopt.errors import InputError
from gteopt.model.artifact import alone, read_manifest, stage_folder
from gteopt.model.checkpoint import VECTOR_MODULES, VECTORS_FILE, Checkpoint, open_checkpoint
from gteopt.progress import Progress, quiet
from gteopt.records.manifest import Manifest


def truncate(
    artifact: str | Path,
    out: str | Path,
    *,
    dims: int | None = None,
    method: str = "slice",
    vectors: VectorCode = "float32",
    rescore: int = 4,
    hub_dir: Path | None = None,
    device: str = "auto",
    progress: Progress = quiet,
) -> Manifest:
    """Make an artifact with the same weights and other vectors: fewer dimensions, smaller codes.

    Args:
        artifact: the artifact to start from; its own vector settings are replaced, not stacked.
        out: folder of the new artifact.
        dims: how many dimensions to keep; None keeps all.
        method: "slice" (the first dimensions), "pca", or "auto" (whichever keeps more).
        vectors: "float32", "int8" or "binary".
        rescore: candidates fetched per result when searching codes.
        hub_dir: where calibration data sets lie.
        device: where calibration vectors are computed.
        progress: told how far the step is.

    Raises:
        InputError: not an artifact, vectors that cannot be, more dimensions than the model has, or
            `out` is in use.

    Example:
        >>> gteopt.truncate("artifacts/nano-int4", "artifacts/nano-64", dims=64, vectors="int8")
    """
    source = Path(artifact)
    old = read_manifest(source)
    shortened = dims is not None
    parts = [old.recipe.name, *([f"{method}{dims}"] if shortened else []), vectors]
    content = {
        **old.recipe.model_dump(by_alias=True),
        "name": "-".join(parts),
        "summary": f"{old.recipe.name} with other vectors",
        "dims": {"n": dims, "method": method} if shortened else None,
        "vectors": {"code": vectors, "rescore": rescore},
    }
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise invalid(f"what to make of {source}", error) from error
    return restyle(source, recipe, out, hub_dir=hub_dir, device=device, progress=progress)


def restyle(
    artifact: Path,
    recipe: Recipe,
    out: str | Path,
    *,
    hub_dir: Path | None = None,
    device: str = "auto",
    progress: Progress = quiet,
) -> Manifest:
    """Make `recipe` from an artifact whose weights are already what the recipe asks for.

    Raises:
        InputError: the artifact's weights were made by another recipe.
    """
    out = Path(out)
    old = read_manifest(artifact)
    if old.recipe.weights_sha256() != recipe.weights_sha256():
        raise InputError(
            f"{artifact} holds the weights of recipe {old.recipe.name}, which differ from those of "
            f"{recipe.name}; quantize the base instead"
        )
    finished = _finished(out, recipe, old.base.sha256, old.base.dtype)
    if finished is not None:
        return finished
    checkpoint = open_checkpoint(artifact)
    _check_dims(recipe.dims, checkpoint)
    texts = draw_texts(recipe.calibration, hub_dir=hub_dir) if _needs_texts(recipe) else ()
    with alone(stage_folder(out)):
        return _restyle(artifact, checkpoint, old, recipe, out, texts, device, progress)


def _restyle(
    artifact: Path,
    checkpoint: Checkpoint,
    old: Manifest,
    recipe: Recipe,
    out: Path,
    texts: Sequence[CalibrationText],
    device: str,
    progress: Progress,
) -> Manifest:
    """`restyle` of what was opened and checked, with the stage folder to itself."""
    stage = _open_stage(out, recipe, checkpoint, old.base.dtype)
    encoder = load_checkpoint(checkpoint, device=device)
    for file in old.files:
        if not file.path.startswith(VECTOR_MODULES) and file.path != VECTORS_FILE:
            target = stage / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact / file.path, target)
    calibration = old.calibration
    if texts and calibration is None:
        tokens = tokenize(encoder.tokenization, texts, recipe.calibration.max_tokens)
        calibration = record(recipe.calibration, texts, tokens)
    return _finish(
        encoder, recipe, stage, out, old.base, calibration, old.layers, old.embedding,
        old.allocation, old.tuning, old.format, old.unquantized, texts, progress,
    )  # fmt: skip
