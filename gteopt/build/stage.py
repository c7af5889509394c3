"""Open, resume, complete and seal the stage folder, in which an artifact is put together.

Hides: what an interrupted build left, which files are removed at the end, and when the artifact
gets its name. Refuses to know: how the parts of the artifact are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gteopt.build.blocks import SOLVED
from gteopt.build.calibration_texts import CalibrationText
from gteopt.build.canary import encode_canary
from gteopt.build.card import CARD, render_card
from gteopt.build.fit_vectors import fit_vectors
from gteopt.build.st_folder import WEIGHTS, write_st_vectors
from gteopt.config.recipe import FormatName, Recipe
from gteopt.encoder.encoder import Encoder
from gteopt.frozen import Frozen
from gteopt.machine import describe_machine, read_library_versions
from gteopt.model.artifact import (
    check_free_folder,
    empty_folder,
    file_records,
    is_artifact,
    read_manifest,
    seal_artifact,
    stage_folder,
)
from gteopt.model.checkpoint import LATENT_FILE, Checkpoint
from gteopt.progress import Progress
from gteopt.records.files import write_record
from gteopt.records.manifest import (
    AllocationRecord,
    BaseRecord,
    CalibrationRecord,
    LayerRecord,
    Manifest,
    TuningRecord,
    UnquantizedRecord,
)

ALLOCATION = "allocation.json"
"""File of the measured losses by which bits are chosen."""
_STATE = "build-state.json"


class _BuildState(Frozen):
    """Identifies the build of a half-finished stage folder; any other build clears the folder."""

    recipe_sha256: str
    base_sha256: str
    dtype: str
    versions: dict[str, str]


@dataclass(frozen=True)
class BuildRun:
    """The checked arguments of a build.

    Attributes:
        device: device of the build.
        devices: devices that solve layers at the same time; if empty, `device` solves one after the
            other.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    out: Path
    hub_dir: Path | None
    device: str
    devices: tuple[str, ...]
    dtype: str
    activation_bytes: int
    progress: Progress

    @property
    def stage(self) -> Path:
        """The folder in which the artifact is put together."""
        return stage_folder(self.out)

    @property
    def activations(self) -> Path:
        """The folder for hidden states that do not fit into memory."""
        return self.stage / "activations"


@dataclass(frozen=True)
class StageParts:
    """The manifest's records of an artifact's parts, without the record of its vectors."""

    base: BaseRecord
    calibration: CalibrationRecord | None
    layers: tuple[LayerRecord, ...]
    embedding: LayerRecord | None
    allocation: AllocationRecord | None
    tuning: TuningRecord | None
    format: FormatName | None
    unquantized: tuple[UnquantizedRecord, ...]


def find_finished_variant(
    out: Path, recipe: Recipe, base_sha256: str, dtype: str
) -> Manifest | None:
    """The manifest of `out` if `out` already is this variant, else None.

    Raises:
        InputError: `out` holds something else.
    """
    if is_artifact(out):
        manifest = read_manifest(out)
        made_from = (manifest.recipe_sha256, manifest.base.sha256, manifest.base.dtype)
        if made_from == (recipe.sha256(), base_sha256, dtype):
            return manifest
    check_free_folder(out)
    return None


def seal_finished_stage(run: BuildRun) -> Manifest | None:
    """Seal a stage folder that an interrupted build had completed; None if it is incomplete."""
    if not is_artifact(run.stage):
        return None
    manifest = read_manifest(run.stage)
    built = (manifest.recipe_sha256, manifest.base.sha256, manifest.base.dtype, manifest.versions)
    if built != (run.recipe.sha256(), run.checkpoint.sha256, run.dtype, read_library_versions()):
        return None
    seal_artifact(run.stage, run.out, manifest)
    return manifest


def open_stage(run: BuildRun) -> Path:
    """Open the stage folder; it keeps the blocks that an earlier run of this build has finished."""
    stage = run.stage
    state = _BuildState(
        recipe_sha256=run.recipe.sha256(),
        base_sha256=run.checkpoint.sha256,
        dtype=run.dtype,
        versions=read_library_versions(),
    )
    state_path = stage / _STATE
    if state_path.is_file():
        try:
            if _BuildState.model_validate_json(state_path.read_bytes()) == state:
                # Files that a killed process had not renamed yet.
                for path in list(stage.rglob("*")):
                    if path.is_file() and (path.name.startswith(".") or path.suffix == ".part"):
                        path.unlink()
                return stage
        except ValueError:
            pass  # the state cannot be read, so the build starts afresh
    empty_folder(stage)
    write_record(state_path, state)
    return stage


def finish_stage(
    run: BuildRun,
    encoder: Encoder,
    parts: StageParts,
    texts: Sequence[CalibrationText],
    blocks: str | None = None,
) -> Manifest:
    """Fit and write the vectors, then seal the artifact.

    Args:
        run: the arguments of the build.
        encoder: the model with its finished weights; its `blocks` may be freed.
        parts: the manifest's records of the other parts.
        texts: the texts on which vectors are fitted.
        blocks: name of the list of blocks whose shards the stage holds; None without shards.
    """
    stage = run.stage
    transform = fit_vectors(encoder, run.recipe, texts, run.progress)
    write_st_vectors(transform, stage, encoder.checkpoint.matryoshka_dims)
    # A build resumes from these files, so they stay until the manifest is written.
    scraps = {stage / _STATE, stage / ALLOCATION, stage / CARD}
    scraps |= {*(stage / SOLVED).glob("*"), *(stage / WEIGHTS).glob("*.json")}
    if parts.format != "gteopt":
        scraps |= {*(stage / WEIGHTS).glob("*")}
    files = file_records(stage, scraps=scraps)
    weights = [
        f
        for f in files
        if f.path.startswith((f"{WEIGHTS}/", "model", LATENT_FILE))
        and f.path.endswith(".safetensors")
    ]
    manifest = Manifest(
        schema="gteopt.artifact/1",
        recipe=run.recipe,
        recipe_sha256=run.recipe.sha256(),
        base=parts.base,
        calibration=parts.calibration,
        layers=parts.layers,
        embedding=parts.embedding,
        allocation=parts.allocation,
        tuning=parts.tuning,
        format=parts.format,
        unquantized=parts.unquantized,
        vectors=transform.record(),
        canary=encode_canary(
            encoder, transform, blocks=blocks, layers=parts.layers, shards=stage / WEIGHTS
        ),
        weight_bytes=sum(f.n_bytes for f in weights),
        files=files,
        versions=read_library_versions(),
        machine=describe_machine(),
    )
    (stage / CARD).write_text(render_card(manifest, encoder.checkpoint), encoding="utf-8")
    files = tuple(sorted((*files, *file_records(stage, only=CARD)), key=lambda file: file.path))
    manifest = manifest.model_copy(update={"files": files})
    seal_artifact(stage, run.out, manifest)
    return manifest
