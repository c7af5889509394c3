"""The record of a published folder."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gteopt.frozen import Frozen


class PublishedFile(Frozen):
    """One file of a published folder; `sent` is false where the Hub already had its bytes."""

    path: str
    n_bytes: int
    sent: bool


class Publication(Frozen):
    """What `publish` did, or would do where `commit` is None.

    Attributes:
        artifact_sha256: hash of the published gteopt.json.
        published_from: hash of the local artifact's gteopt.json.
        binds: what the license requires of users; None for permissive licenses.
        deleted: paths of an earlier version that were deleted.
        kept: other paths in the repository that stay.
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
