"""Fit projections and code ranges of a variant on vectors of its calibration texts.

Hides: which vectors a fit needs. Refuses to know: weights, how a fit works (see `vectors.fit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gteopt.build.calibration_texts import (
    CalibrationText,
    add_document_sentences,
    draw_calibration_texts,
    tokenize_calibration,
)
from gteopt.build.layer_plan import shortens_vectors
from gteopt.config.recipe import Dims, Recipe, VectorCode, Vectors
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError
from gteopt.model.checkpoint import Checkpoint
from gteopt.progress import Progress, ignore_progress
from gteopt.records.manifest import Similarity
from gteopt.vectors.fit import check_vector_bytes, fit_vector_transform
from gteopt.vectors.transform import VectorTransform, identity_transform


def fit_transforms(
    encoder: Encoder,
    dims: Sequence[int],
    codes: Sequence[VectorCode],
    *,
    hub_dir: Path | None = None,
    progress: Progress = ignore_progress,
) -> list[VectorTransform]:
    """Fit the transforms that `truncate` would fit on the encoder, for each length in each code.

    An artifact uses the method and the calibration texts of its recipe; a base is sliced. The texts
    are encoded once.

    Args:
        encoder: a base or an artifact.
        dims: numbers of dimensions; an empty list means all dimensions.
        codes: codes of stored vectors.
        hub_dir: folder in the Hub's layout with calibration data sets.
        progress: called with the calibration texts that are encoded.

    Returns:
        One transform for each length and code; the codes of one length follow each other.

    Raises:
        InputError: more dimensions than the model has, or too few calibration texts.
    """
    manifest = encoder.manifest
    source = manifest.recipe if manifest else Recipe(schema="gteopt.recipe/1", name="base")
    method = source.dims.method if source.dims else "slice"
    recipes = []
    for n in dims or [encoder.full_dims]:
        shorter = Dims(n=n, method=method) if n != encoder.full_dims else None
        for code in codes:
            vectors = source.vectors
            if vectors.code != code:
                vectors = Vectors(code=code, rescore=source.vectors.rescore)
            recipe = source.model_copy(update={"dims": shorter, "vectors": vectors})
            check_vector_recipe(recipe, encoder.checkpoint)
            recipes.append(recipe)
    # If nothing is fitted, only the width of this array is read, so no rows are needed.
    fitted_on = np.zeros((0, encoder.full_dims), np.float32)
    if any(_is_fitted(recipe) for recipe in recipes):
        texts = draw_calibration_texts(source.calibration, hub_dir=hub_dir)
        fitted_on = _calibration_vectors(encoder, source, texts, progress)
    similarity: Similarity = "cosine" if encoder.checkpoint.unit_vectors else "dot"
    return [
        fit_vector_transform(fitted_on, recipe.dims, recipe.vectors, similarity=similarity)
        for recipe in recipes
    ]


def needs_calibration_texts(recipe: Recipe) -> bool:
    """Whether a build of the recipe needs calibration texts."""
    return recipe.weights.method == "gptq" or _is_fitted(recipe)


def _is_fitted(recipe: Recipe) -> bool:
    """Whether the recipe's vectors depend on calibration texts."""
    vectors = recipe.vectors
    shortened = recipe.dims is not None and recipe.dims.method != "slice"
    return shortened or vectors.centred or vectors.code not in ("float32", "binary")


def check_vector_recipe(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Check before the slow work that the model can give the recipe's vectors.

    Raises:
        InputError: the recipe has more dimensions than the model, or bytes that no code has.
    """
    dims, n_bytes = recipe.dims, recipe.vectors.bytes
    if dims is not None and dims.n > checkpoint.dims:
        trained = ", ".join(map(str, checkpoint.matryoshka_dims)) or "none stated"
        raise InputError(
            f"dims {dims.n} is more than the {checkpoint.dims} that {checkpoint.id} has (lengths "
            f"it was trained for: {trained})"
        )
    if n_bytes is not None:
        check_vector_bytes(checkpoint.dims, n_bytes)


def fit_vectors(
    encoder: Encoder, recipe: Recipe, texts: Sequence[CalibrationText], progress: Progress
) -> VectorTransform:
    """Fit the recipe's vector transform on the variant's own vectors of the texts.

    Raises:
        InputError: there are too few texts for the fit.
    """
    kept = encoder.checkpoint.truncate_dim
    similarity: Similarity = "cosine" if encoder.checkpoint.unit_vectors else "dot"
    if not shortens_vectors(recipe):
        return identity_transform(encoder.full_dims, kept=kept, similarity=similarity)
    vectors = _calibration_vectors(encoder, recipe, texts, progress)
    dims = recipe.dims
    if dims is None and kept is not None and recipe.vectors.bytes is None:
        dims = Dims(n=kept, method="slice")
    return fit_vector_transform(vectors, dims, recipe.vectors, similarity=similarity)


def _calibration_vectors(
    encoder: Encoder, recipe: Recipe, texts: Sequence[CalibrationText], progress: Progress
) -> npt.NDArray[np.float32]:
    """Vectors [N, full_dims] of the calibration texts and their sentences."""
    tokens = tokenize_calibration(
        encoder.tokenization, add_document_sentences(texts), recipe.calibration.max_tokens
    )
    vectors = np.empty((len(tokens), encoder.full_dims), np.float32)
    done = 0
    for positions, batch in encoder.tokenization.batches(tokens, 32):
        vectors[positions] = encoder.embed_tokens(batch)
        done += len(batch)
        progress(f"fitting vectors of {recipe.name}", done, len(tokens))
    return vectors
