"""The stage folder, in which an artifact is put together: opened, resumed, completed and sealed.

Hides: what an interrupted build left, which files are scraps, and when the artifact gets its name.
Refuses to know: how the parts of the artifact are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gteopt.build.blocks import SOLVED
from gteopt.build.calibration_texts import CalibrationText
from gteopt.build.canary import canary_of
from gteopt.build.card import CARD, card
from gteopt.build.fit_vectors import fit_vectors
from gteopt.build.st_folder import WEIGHTS, write_vectors
from gteopt.config.recipe import FormatName, Recipe
from gteopt.encoder.encoder import Encoder
from gteopt.frozen import Frozen
from gteopt.machine import machine, versions
from gteopt.model.artifact import (
    check_free,
    clear,
    file_records,
    is_artifact,
    read_manifest,
    seal,
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
"""File of the losses that bits are chosen by."""
_STATE = "build-state.json"


class _BuildState(Frozen):
    """The build that a half-finished stage folder belongs to; another build clears the folder."""

    recipe_sha256: str
    base_sha256: str
    dtype: str
    versions: dict[str, str]


@dataclass(frozen=True)
class BuildRun:
    """The checked arguments of a build.

    Attributes:
        device: where calibration runs.
        devices: where layers are solved side by side; empty solves one after the other.
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
        """Where the artifact is put together."""
        return stage_folder(self.out)

    @property
    def activations(self) -> Path:
        """Folder of the hidden states that do not fit into memory."""
        return self.stage / "activations"


@dataclass(frozen=True)
class Parts:
    """The manifest's records of an artifact's parts; its vectors are not among them."""

    base: BaseRecord
    calibration: CalibrationRecord | None
    layers: tuple[LayerRecord, ...]
    embedding: LayerRecord | None
    allocation: AllocationRecord | None
    tuning: TuningRecord | None
    format: FormatName | None
    unquantized: tuple[UnquantizedRecord, ...]


def existing_variant(out: Path, recipe: Recipe, base_sha256: str, dtype: str) -> Manifest | None:
    """The manifest of `out` if it already is this variant, else None.

    Raises:
        InputError: something else lies at `out`.
    """
    if is_artifact(out):
        manifest = read_manifest(out)
        made_from = (manifest.recipe_sha256, manifest.base.sha256, manifest.base.dtype)
        if made_from == (recipe.sha256(), base_sha256, dtype):
            return manifest
    check_free(out)
    return None


def resume_seal(run: BuildRun) -> Manifest | None:
    """Seal a stage folder that an interrupted build had completed; None if it is not complete."""
    if not is_artifact(run.stage):
        return None
    manifest = read_manifest(run.stage)
    built = (manifest.recipe_sha256, manifest.base.sha256, manifest.base.dtype, manifest.versions)
    if built != (run.recipe.sha256(), run.checkpoint.sha256, run.dtype, versions()):
        return None
    seal(run.stage, run.out, manifest)
    return manifest


def open_stage(run: BuildRun) -> Path:
    """The stage folder, with the blocks that an earlier run of the same build has finished."""
    stage = run.stage
    state = _BuildState(
        recipe_sha256=run.recipe.sha256(),
        base_sha256=run.checkpoint.sha256,
        dtype=run.dtype,
        versions=versions(),
    )
    state_path = stage / _STATE
    if state_path.is_file():
        try:
            if _BuildState.model_validate_json(state_path.read_bytes()) == state:
                # A killed process leaves files under the names that they have before their rename.
                for path in list(stage.rglob("*")):
                    if path.is_file() and (path.name.startswith(".") or path.suffix == ".part"):
                        path.unlink()
                return stage
        except ValueError:
            pass  # unreadable state belongs to no build; start afresh
    clear(stage)
    write_record(state_path, state)
    return stage


def finish(
    run: BuildRun,
    encoder: Encoder,
    parts: Parts,
    texts: Sequence[CalibrationText],
    blocks: str | None = None,
) -> Manifest:
    """Fit and write the vectors, then seal.

    Args:
        run: what was asked for.
        encoder: the model with its finished weights; its `blocks` may be freed.
        parts: what the manifest says of it.
        texts: that vectors are fitted on.
        blocks: name of the list of blocks whose shards the stage holds; None without any.
    """
    stage = run.stage
    transform = fit_vectors(encoder, run.recipe, texts, run.progress)
    write_vectors(transform, stage, encoder.checkpoint.matryoshka_dims)
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
        canary=canary_of(
            encoder, transform, blocks=blocks, layers=parts.layers, shards=stage / WEIGHTS
        ),
        weight_bytes=sum(f.n_bytes for f in weights),
        files=files,
        versions=versions(),
        machine=machine(),
    )
    (stage / CARD).write_text(card(manifest, encoder.checkpoint), encoding="utf-8")
    files = tuple(sorted((*files, *file_records(stage, only=CARD)), key=lambda file: file.path))
    manifest = manifest.model_copy(update={"files": files})
    seal(stage, run.out, manifest)
    return manifest
