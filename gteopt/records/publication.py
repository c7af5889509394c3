"""The record of a published folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.frozen import Frozen


class PublishedFile(Frozen):
    """One file of a published folder; `sent` says whether it had to travel."""

    path: str
    n_bytes: int
    sent: bool


class Publication(Frozen):
    """What `publish` did, or would do where `commit` is None.

    Attributes:
        artifact_sha256: of the published gteopt.json.
        published_from: of the artifact's own.
        binds: what the license asks of whoever takes it; None where little.
        deleted: paths of an earlier version that are gone.
        kept: paths that are in the repository beside the artifact, and stay.
    """

    schema_: Literal["gteopt.publication/1"] = Field("gteopt.publication/1", alias="schema")
    repo: str
    url: str | None
    commit: str | None
    artifact_sha256: str
    published_from: str
    license: str
    binds: str | None
    files: tuple[PublishedFile, ...]
    deleted: tuple[str, ...]
    kept: tuple[str, ...] = ()
