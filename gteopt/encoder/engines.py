"""Which engines open a variant of a checkpoint.

Hides: which checkpoints the OpenVINO backend supports. `config.engines` knows the other engines.
Refuses to know: weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from gteopt.config.engines import Engine, engines_of
from gteopt.config.recipe import FormatName, LayerScheme, Recipe
from gteopt.encoder.openvino import openvino_can_hold
from gteopt.encoder.skeleton import build_whole_config
from gteopt.model.checkpoint import Checkpoint


def engines_of_variant(
    checkpoint: Checkpoint,
    recipe: Recipe,
    format: FormatName | None,
    schemes: Iterable[LayerScheme],
) -> tuple[Engine, ...]:
    """The engines that open a variant of a base, or an artifact.

    Args:
        checkpoint: the base or the artifact.
        recipe: the recipe of the variant.
        format: checkpoint format of its weights.
        schemes: schemes of its quantized layers.
    """
    return engines_of(
        recipe,
        format,
        architecture=str(checkpoint.artifact_config["model_type"]),
        openvino=not checkpoint.is_table
        and openvino_can_hold(build_whole_config(checkpoint), schemes),
    )


def engines_of_artifact(checkpoint: Checkpoint) -> tuple[Engine, ...]:
    """The engines that open an artifact; empty for a model that is no artifact."""
    if (manifest := checkpoint.manifest) is None:
        return ()
    schemes = (layer.scheme for layer in manifest.layers)
    return engines_of_variant(checkpoint, manifest.recipe, manifest.format, schemes)
