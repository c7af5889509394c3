"""Commands that send artifacts to the Hub and fetch them: publish, pull."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gteopt.cli.options import OUTPUT, PUBLISH, Artifact, AsJson, Repo
from gteopt.cli.output import show_manifest, show_publication, stderr
from gteopt.errors import InputError


def publish(
    artifact: Artifact,
    repo: Repo,
    results: Annotated[
        Path | None,
        typer.Option(
            help="results folder with this artifact's measurements, for its card",
            rich_help_panel=PUBLISH,
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            help="license of the base model; needed when its model card states none",
            rich_help_panel=PUBLISH,
        ),
    ] = None,
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="make the repository private when it is created",
            rich_help_panel=PUBLISH,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="only write the folder that would be sent; no network",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for --dry-run; ARTIFACT-published when left out", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send an artifact to the Hub, with a card that describes it and its measurements.

    The access token comes from `hf auth login` or the variable `HF_TOKEN`.

    Example: `gteopt publish artifacts/nano-int4 --repo me/nano-int4 --dry-run`
    """
    from gteopt.publishing.publish import prepare_publication, write_publication
    from gteopt.publishing.publish import publish as send

    if out is not None and not dry_run:
        raise InputError("--out needs --dry-run, which writes to that folder")
    datasets = None
    if results is not None:
        from gteopt.evaluation.tasks import hub_datasets

        datasets = hub_datasets()
    folder = prepare_publication(
        artifact, repo, results=results, license=license, datasets=datasets
    )
    if folder.terms.binds is not None:
        stderr.print(
            f"{repo} will be under {folder.terms.license}: {folder.terms.binds}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if dry_run:
        out = out or artifact.with_name(f"{artifact.name}-published")
        publication = write_publication(folder, out)
    else:
        publication = send(folder, private=private)
    show_publication(publication, out, as_json=as_json)


def pull(
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the Hub")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder for the artifact; artifacts/NAME when left out", rich_help_panel=OUTPUT
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit", rich_help_panel=PUBLISH)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Download a published artifact and check every file against its manifest.

    Example: `gteopt pull me/nano-int4 --out artifacts/nano-int4`
    """
    from gteopt.publishing.publish import pull as download

    out = out or Path("artifacts", Path(repo).name)
    show_manifest(
        download(repo, out, revision=revision),
        out,
        as_json=as_json,
        next_command=f"gteopt inspect {out}",
    )
