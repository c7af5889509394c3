"""Make an artifact with shorter vectors or another code from an artifact with the same weights.

Hides: which files are copied, and which are written. Refuses to know: quantization.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypedDict, Unpack

from pydantic import ValidationError

from gteopt.build.calibration_texts import (
    draw_calibration_texts,
    record_calibration,
    tokenize_calibration,
)
from gteopt.build.fit_vectors import check_vector_recipe, needs_calibration_texts
from gteopt.build.stage import BuildRun, StageParts, find_finished_variant, finish_stage, open_stage
from gteopt.config.recipe import CodeChoice, DimsMethod, Recipe
from gteopt.config.yaml_files import explain_validation_error
from gteopt.encoder.description import RuntimeOptions
from gteopt.encoder.loading import load_checkpoint
from gteopt.errors import InputError
from gteopt.model.artifact import lock_stage, read_manifest, stage_folder
from gteopt.model.checkpoint import VECTOR_MODULES, VECTORS_FILE, open_checkpoint
from gteopt.progress import Progress, ignore_progress
from gteopt.records.manifest import Manifest


class VectorSettings(TypedDict, total=False):
    """How `truncate` shortens and stores vectors.

    Attributes:
        dims: dimensions to keep; the default is all.
        method: "slice" (the first dimensions), "pca", or "auto" (whichever keeps more).
        vectors: the code, see `Vectors.code`; the default is "float32".
        rescore: see `Vectors`.
        bits: bits for each dimension; only for the code rabitq.
        centred: whether the mean is subtracted before signs are taken; only for the code binary.
        bytes: bytes of a vector; if given, dimensions and code are chosen together.
    """

    dims: int | None
    method: DimsMethod
    vectors: CodeChoice | None
    rescore: int
    bits: int | None
    centred: bool
    bytes: int | None


def truncate(
    artifact: str | Path,
    out: str | Path,
    *,
    hub_dir: Path | None = None,
    device: str = "auto",
    progress: Progress = ignore_progress,
    **settings: Unpack[VectorSettings],
) -> Manifest:
    """Make an artifact with the same weights and other vectors: fewer dimensions, smaller codes.

    Args:
        artifact: the artifact to start from; its own vector settings are replaced.
        out: folder of the new artifact; must not exist, or be empty.
        hub_dir: folder in the Hub's layout with calibration data sets.
        device: device that computes vectors of the calibration texts.
        progress: called with the calibration texts that are encoded.
        settings: see `VectorSettings`.

    Raises:
        InputError: `artifact` is not an artifact, the vector settings are impossible, the model has
            fewer dimensions, or `out` is in use.

    Example:
        >>> gteopt.truncate("artifacts/nano-int8", "artifacts/nano-48", bytes=48)
    """
    source = Path(artifact)
    old = read_manifest(source)
    dims, n_bytes = settings.get("dims"), settings.get("bytes")
    method = settings.get("method", "slice")
    code = settings.get("vectors") or ("float32" if n_bytes is None else "auto")
    parts = [old.recipe.name]
    parts += [f"{method}{dims}"] if dims is not None else []
    parts += [code] if code != "auto" else []
    parts += [f"{n_bytes}b"] if n_bytes is not None else []
    content = {
        **old.recipe.model_dump(by_alias=True),
        "name": "-".join(parts),
        "summary": f"{old.recipe.name} with other vectors",
        "dims": {"n": dims, "method": method} if dims is not None else None,
        "vectors": {
            "code": code,
            "rescore": settings.get("rescore", 4),
            "bits": settings.get("bits"),
            "centred": settings.get("centred", False),
            "bytes": n_bytes,
        },
    }
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise explain_validation_error(f"the vector settings for {source}", error) from error
    return truncate_to_recipe(
        source, recipe, out, hub_dir=hub_dir, device=device, progress=progress
    )


def truncate_to_recipe(
    artifact: Path,
    recipe: Recipe,
    out: str | Path,
    *,
    hub_dir: Path | None = None,
    device: str = "auto",
    progress: Progress = ignore_progress,
) -> Manifest:
    """Make the variant of `recipe` from an artifact that already has the recipe's weights.

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
    finished = find_finished_variant(out, recipe, old.base.sha256, old.base.dtype)
    if finished is not None:
        return finished
    checkpoint = open_checkpoint(artifact)
    check_vector_recipe(recipe, checkpoint)
    spec = recipe.calibration
    texts = draw_calibration_texts(spec, hub_dir=hub_dir) if needs_calibration_texts(recipe) else ()
    with lock_stage(stage_folder(out)):
        run = BuildRun(
            checkpoint=checkpoint,
            recipe=recipe,
            out=out,
            hub_dir=hub_dir,
            device=device,
            devices=(),
            dtype=old.base.dtype,
            activation_bytes=0,
            progress=progress,
        )
        stage = open_stage(run)
        encoder = load_checkpoint(checkpoint, RuntimeOptions(device))
        for file in old.files:
            if not file.path.startswith(VECTOR_MODULES) and file.path != VECTORS_FILE:
                target = stage / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact / file.path, target)
        calibration = old.calibration
        if texts and calibration is None:
            tokens = tokenize_calibration(encoder.tokenization, texts, spec.max_tokens)
            longest = encoder.tokenization.max_tokens
            calibration = record_calibration(spec, texts, tokens, longest=longest)
        parts = StageParts(
            base=old.base,
            calibration=calibration,
            layers=old.layers,
            embedding=old.embedding,
            allocation=old.allocation,
            tuning=old.tuning,
            format=old.format,
            unquantized=old.unquantized,
        )
        return finish_stage(run, encoder, parts, texts)
