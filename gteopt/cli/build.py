"""Commands that make and check artifacts: quantize, truncate, export, verify, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal

from gteopt.cli.options import (
    BUILD,
    OUTPUT,
    WHERE,
    ActivationGb,
    Artifact,
    AsJson,
    BackendOption,
    Base,
    Device,
    EffortOption,
    EmbedInt8,
    Family,
    FormatOption,
    HubDir,
    KeptDtype,
    Kernels,
    Out,
    RecipeChoice,
    RecipeName,
    Revision,
    check_device_option,
    check_model_option,
)
from gteopt.cli.output import (
    print_json,
    print_status,
    show_manifest,
    show_next,
    show_progress,
    stdout,
)
from gteopt.errors import InputError

if TYPE_CHECKING:
    from gteopt.config.recipe import Effort, FormatChoice, Recipe
    from gteopt.records.manifest import Manifest


def quantize(
    base: Base,
    out: Out,
    recipe: RecipeName = "gptq-nf4",
    effort: EffortOption = None,
    embed_int8: EmbedInt8 = False,
    format: FormatOption = None,
    hub_dir: HubDir = None,
    revision: Revision = None,
    family: Family = None,
    dtype: KeptDtype = "bfloat16",
    activation_gb: ActivationGb = 4,
    device: Device = "auto",
    devices: Annotated[
        str | None,
        typer.Option(
            help="solve layers in parallel on cuda:0,cuda:1 or cpu,cpu; calibrate on the first",
            metavar="LIST",
            rich_help_panel=WHERE,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one variant of a base.

    Example: `gteopt quantize nano --recipe gptq-int4 --out artifacts/nano-int4`
    """
    print_status("importing torch")
    from gteopt.build.quantize import quantize as build
    from gteopt.machine import parse_devices

    changed = _changed_recipe(recipe, effort, embed_int8=embed_int8, format=format)
    was_there = (out / "gteopt.json").is_file()
    with show_progress() as progress:
        manifest = build(
            base,
            changed,
            out,
            hub_dir=hub_dir,
            revision=revision,
            family=family,
            dtype=dtype,
            activation_bytes=int(activation_gb * 2**30),
            device=device,
            devices=parse_devices(devices) if devices is not None else (),
            progress=progress,
        )
    next_command = f"gteopt bench {out} --baseline {base} --out {out}-results"
    show_manifest(manifest, out, as_json=as_json, was_there=was_there, next_command=next_command)


def _changed_recipe(
    recipe: str, effort: Effort | None, *, embed_int8: bool, format: FormatChoice | None
) -> Recipe:
    """The recipe, changed by the other options."""
    from gteopt.config.recipe import load_recipe

    changed = load_recipe(recipe)
    if effort is not None:
        changed = changed.with_effort(effort)
    if embed_int8:
        changed = changed.with_int8_embedding()
    return changed if format is None else changed.with_format(format)


def truncate(
    artifact: Artifact,
    out: Out,
    dims: Annotated[
        int | None,
        typer.Option(min=1, help="dimensions to keep; all when left out", rich_help_panel=BUILD),
    ] = None,
    method: Annotated[
        Literal["slice", "pca", "auto"],
        typer.Option(
            help="keep the first dimensions, the principal ones, or the better of the two",
            rich_help_panel=BUILD,
        ),
    ] = "slice",
    vectors: Annotated[
        Literal["float32", "int8", "int4", "binary", "rabitq", "pq"] | None,
        typer.Option(
            help="how a vector is stored; float32 when left out, or the best code with --bytes",
            rich_help_panel=BUILD,
        ),
    ] = None,
    n_bytes: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            min=1,
            help="bytes of a stored vector; chooses dimensions and code together",
            rich_help_panel=BUILD,
        ),
    ] = None,
    rescore: Annotated[
        int,
        typer.Option(min=1, help="candidates to rescore for each result", rich_help_panel=BUILD),
    ] = 4,
    bits: Annotated[
        int | None,
        typer.Option(
            min=1, max=8, help="bits per dimension, with --vectors rabitq", rich_help_panel=BUILD
        ),
    ] = None,
    centred: Annotated[
        bool,
        typer.Option(
            "--centred",
            help="with --vectors binary: subtract the mean before taking signs",
            rich_help_panel=BUILD,
        ),
    ] = False,
    hub_dir: HubDir = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Make an artifact with the same weights and shorter or smaller vectors.

    Example: `gteopt truncate artifacts/nano-int4 --dims 64 --vectors int8 --out artifacts/nano-64`
    """
    from gteopt.build.truncate import truncate as shorten

    with show_progress() as progress:
        manifest = shorten(
            artifact,
            out,
            dims=dims,
            method=method,
            vectors=vectors,
            rescore=rescore,
            bits=bits,
            centred=centred,
            bytes=n_bytes,
            hub_dir=hub_dir,
            device=device,
            progress=progress,
        )
    show_manifest(manifest, out, as_json=as_json)


def export(
    artifact: Annotated[str, typer.Argument(help="artifact folder, or ORG/NAME")],
    out: Annotated[Path, typer.Argument(help="folder to create")],
    hub_dir: HubDir = None,
    revision: Revision = None,
) -> None:
    """Write an artifact as a folder that Sentence Transformers opens with backend="openvino".

    Example: `gteopt export artifacts/nano-int8 nano-int8-openvino`
    """
    from gteopt.commands.export import export_openvino

    export_openvino(artifact, out, hub_dir=hub_dir, revision=revision)
    n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    stdout.print(f"{out}: {decimal(n_bytes, precision=2)}", soft_wrap=True)
    stdout.print(f'SentenceTransformer("{out}", backend="openvino")', markup=False, soft_wrap=True)


def verify(artifact: Artifact, as_json: AsJson = False) -> None:
    """Check every file of an artifact against its manifest.

    Example: `gteopt verify artifacts/nano-int4`
    """
    from gteopt.model.artifact import verify as check

    manifest = check(artifact)
    if as_json:
        print_json({"artifact": str(artifact), "files": len(manifest.files), "whole": True})
    else:
        n_bytes = sum(file.n_bytes for file in manifest.files)
        stdout.print(
            f"{artifact}: {len(manifest.files)} files, {decimal(n_bytes, precision=2)}, "
            "all match the manifest"
        )


def inspect(
    source: Annotated[
        str, typer.Argument(help="a base or an artifact", callback=check_model_option)
    ],
    recipe: RecipeChoice = None,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="show a line for each layer of an artifact", rich_help_panel=OUTPUT
        ),
    ] = False,
    effort: EffortOption = None,
    embed_int8: EmbedInt8 = False,
    format: FormatOption = None,
    hub_dir: HubDir = None,
    revision: Revision = None,
    family: Family = None,
    dtype: KeptDtype = "bfloat16",
    activation_gb: ActivationGb = 4,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda or cuda:N; this machine need not have it",
            callback=check_device_option,
            rich_help_panel=WHERE,
        ),
    ] = "auto",
    kernels: Kernels = "deterministic",
    backend: BackendOption = "torch",
    as_json: AsJson = False,
) -> None:
    """Show facts of a model, and estimates for every recipe before anything is built.

    The weights of a model on the Hub are not downloaded. Given the options of a `gteopt quantize`,
    it predicts the size, the memory and the disk space of that build.

    Example: `gteopt inspect nano --recipe gptq-int4 --effort best`
    """
    from gteopt.commands.inspect import inspect as look
    from gteopt.report.terminal import artifact_table, estimates_table, facts_table, layers_table

    if recipe is None and (effort or embed_int8 or format):
        raise InputError("--effort, --embed-int8 and --format change a recipe; give --recipe")
    changed = None
    if recipe is not None:
        changed = _changed_recipe(recipe, effort, embed_int8=embed_int8, format=format)
    inspection = look(
        source,
        hub_dir=hub_dir,
        revision=revision,
        family=family,
        recipe=changed,
        dtype=dtype,
        device=device,
        kernels=kernels,
        backend=backend,
        activation_bytes=int(activation_gb * 2**30),
    )
    if as_json:
        print_json(json.loads(inspection.model_dump_json(by_alias=True)))
        return
    if inspection.manifest is None:
        stdout.print(facts_table(inspection))
        if inspection.estimates:
            stdout.print(estimates_table(inspection))
        return
    stdout.print(artifact_table(inspection, inspection.manifest))
    if layers:
        stdout.print(layers_table(inspection.manifest))
        _show_choices(inspection.manifest)
    else:
        show_next(f"gteopt inspect {source} --layers")


def _show_choices(manifest: Manifest) -> None:
    """Print how bits were chosen and what tuning changed."""
    if (allocation := manifest.allocation) is not None:
        stdout.print(
            f"bits chosen by layer: {allocation.bits_per_weight:.3f} of at most "
            f"{allocation.budget:g} bits a weight, predicted loss {allocation.predicted_loss:.2g} "
            f"(measured by {allocation.found_by})"
        )
    if (tuning := manifest.tuning) is not None:
        stdout.print(
            f"tuned by {tuning.by} for {tuning.n_steps} steps: error on the calibration texts "
            f"{tuning.error_before:.5f} -> {tuning.error_after:.5f}, "
            f"{tuning.codes_changed:.1%} of the codes changed"
        )
