"""Commands that move artifacts to and from the model hub: publish, pull."""

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
            help="results folder that measured this artifact, for its card", rich_help_panel=PUBLISH
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            help="license of the base, where the base states none",
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
            help="write the folder that would be sent; no network",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder of --dry-run; ARTIFACT-published when left out", rich_help_panel=OUTPUT
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Send an artifact to the model hub, with a card that says what it is and what was measured.

    The access token is what `hf auth login` stored, or `HF_TOKEN`.

    Example: `gteopt publish artifacts/nano-int4 --repo me/nano-int4 --dry-run`
    """
    from gteopt.publishing.publish import prepare, write_folder
    from gteopt.publishing.publish import publish as send

    if out is not None and not dry_run:
        raise InputError("--out is where --dry-run writes; nothing is written without it")
    datasets = None
    if results is not None:
        from gteopt.evaluation.tasks import hub_datasets

        datasets = hub_datasets()
    folder = prepare(artifact, repo, results=results, license=license, datasets=datasets)
    if folder.terms.binds is not None:
        stderr.print(
            f"{repo} will be under {folder.terms.license}: {folder.terms.binds}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
    if dry_run:
        out = out or artifact.with_name(f"{artifact.name}-published")
        done = write_folder(folder, out)
    else:
        done = send(folder, private=private)
    show_publication(done, out, as_json=as_json)


def pull(
    repo: Annotated[str, typer.Argument(help="ORG/NAME on the model hub")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="folder of the artifact; artifacts/NAME when left out", rich_help_panel=OUTPUT
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="branch, tag or commit", rich_help_panel=PUBLISH)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring a published artifact and check every file against its manifest.

    Example: `gteopt pull me/nano-int4 --out artifacts/nano-int4`
    """
    from gteopt.publishing.publish import pull as bring

    out = out or Path("artifacts", Path(repo).name)
    show_manifest(
        bring(repo, out, revision=revision),
        out,
        as_json=as_json,
        next_command=f"gteopt inspect {out}",
    )
