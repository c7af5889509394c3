"""Finds the folder of a model by its name: the embedded model, a folder, a hub directory, the Hub.

Refuses to know: what the files there mean.
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path

from gteopt.errors import InputError, suggest_names
from gteopt.model import hub
from gteopt.model.artifact import is_artifact, read_manifest
from gteopt.model.families import PUBLISHED
from gteopt.model.weight_files import INDEX, SINGLE, index_files
from gteopt.paths import ASSETS

NANO = "nano"
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.md", "*.jinja")
"""Files of a model on the Hub that describe it; they are fetched before its weights."""


@dataclass(frozen=True)
class ModelSource:
    """The folder that a name means.

    Attributes:
        id: the name to record.
        revision: as in `Checkpoint`.
        remote: the headers of weights that are not in the folder; None if the weights are there.
        has_weights: False for a folder whose weights are left alone.
    """

    folder: Path
    id: str
    revision: str | None
    remote: hub.RemoteTensors | None = None
    has_weights: bool = True


def resolve_source(
    source: str, hub_dir: Path | None, revision: str | None, headers_only: bool
) -> ModelSource:
    """The folder that a name means; a model on the Hub is fetched.

    Raises:
        InputError: there is no such folder or model; similar names are suggested.
    """
    if source == NANO:
        return ModelSource(ASSETS / "nano", NANO, revision)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    if hub_dir is not None and is_hub_id and (hub_dir / source).is_dir():
        return ModelSource(hub_dir / source, source, revision)
    if Path(source).is_dir():
        return ModelSource(Path(source), Path(source).resolve().name, revision)
    if Path(source).is_file():
        raise InputError(f"{source} is a file; give the folder of a model")
    if "/" in source and not is_hub_id:
        raise InputError(
            f"there is no folder {source}; give an existing folder, {NANO} or ORG/NAME"
        )
    if hub_dir is not None:
        present = sorted(p.relative_to(hub_dir).as_posix() for p in hub_dir.glob("*/*"))
        raise InputError(
            f"no model {source}: it is no folder and {hub_dir / source} does not exist; "
            f"{suggest_names(source, [NANO, *present])} To add it: hf download {source} "
            f"--local-dir {hub_dir / source}"
        )
    if not is_hub_id:
        raise InputError(
            f"unknown model '{source}': not a folder and not a Hub id (<org>/<name>); "
            f"{suggest_names(source, [NANO, *PUBLISHED])}"
        )
    try:
        return _download(source, revision, headers_only)
    except InputError as error:
        raise InputError(
            f"there is no folder {source}, and no model of that name could be fetched from the "
            f"hub: {error}. Or download it elsewhere and give --hub-dir. "
            f"{suggest_names(source, [NANO, *PUBLISHED])}"
        ) from error


def _download(hub_id: str, revision: str | None, headers_only: bool) -> ModelSource:
    """Fetch the files that describe a model, then its weights or their headers.

    Of an artifact, every file in its manifest is fetched.
    """
    described = hub.download_snapshot(hub_id, _SIDE_FILES, revision)
    folder, commit = described.folder, described.commit
    if is_artifact(folder):
        wanted = [record.path for record in read_manifest(folder).files]
    elif not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        wanted = index_files(folder)
    else:
        wanted = [SINGLE]
    if headers_only and not all((folder / path).is_file() for path in wanted):
        weights = [path for path in wanted if path.endswith(".safetensors")]
        return ModelSource(folder, hub_id, commit, hub.read_remote_headers(hub_id, weights, commit))
    if not headers_only:
        rest = [*map(glob.escape, wanted)] if is_artifact(folder) else ["*.safetensors"]
        hub.download_snapshot(hub_id, rest, commit)
    return ModelSource(folder, hub_id, commit)
