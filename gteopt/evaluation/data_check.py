"""Check that the data of a suite are available, before mteb, torch or a model is loaded.

Hides: where the Hub's client keeps downloads, and whether the Hub answers. Refuses to know: the
content of the data, which `tasks` checks when it reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gteopt.errors import InputError, join_problems
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.task_facts import read_task_facts

_PATIENCE_S = 3.0


def check_data(suite: Suite, hub_dir: Path | None) -> None:
    """Refuse a suite whose data are not on this machine and cannot be downloaded.

    Only tasks of the shipped suites are checked here; `resolve_tasks` checks the others.

    Raises:
        InputError: with `hub_dir`, lists every task that has no folder in it. Without `hub_dir`,
            lists every task whose data are not downloaded, if the Hub does not answer.
    """
    missing = missing_data(suite, hub_dir)
    if not missing:
        return
    if hub_dir is not None:
        problems = [
            f"{task}: no folder {hub_dir / data}; fetch it with: "
            f"{fetch_command(data, revision, hub_dir / data)}"
            for task, data, revision in missing
        ]
        raise InputError(join_problems(f"suite {suite.name} lacks data", problems))
    reason = _why_no_hub()
    if reason is not None:
        problems = [
            f"{task}: {data} is not downloaded; run on a machine with a network: "
            f"{fetch_command(data, revision, Path('DIR', data))}"
            for task, data, revision in missing
        ]
        raise InputError(
            join_problems(
                f"suite {suite.name} lacks data, and the Hub cannot be reached ({reason}); "
                f"download the data and give --hub-dir DIR",
                problems,
            )
        )


def missing_data(suite: Suite, hub_dir: Path | None) -> list[tuple[str, str, str | None]]:
    """Task, data set and revision of all data that are not on this machine."""
    missing = []
    for task, data, revision in _data_sets(suite):
        if hub_dir is not None:
            is_there = (hub_dir / data).is_dir()
        else:
            is_there = _is_downloaded(data, revision)
        if not is_there:
            missing.append((task, data, revision))
    return missing


def fetch_command(path: str, revision: str | None, folder: Path) -> str:
    """The command that downloads a data set from the Hub into a folder."""
    at = f" --revision {revision}" if revision else ""
    return f"hf download --repo-type dataset {path}{at} --local-dir {folder}"


def _data_sets(suite: Suite) -> Iterator[tuple[str, str, str | None]]:
    facts = read_task_facts()
    for entry in suite.tasks:
        task_facts = facts.get(entry.task)
        if task_facts is None or entry.data is not None:
            continue
        if task_facts.data:
            yield entry.task, task_facts.data, entry.revision
        for part in task_facts.parts:
            yield part, facts[part].data, (entry.parts or {}).get(part)


def _is_downloaded(data: str, revision: str | None) -> bool:
    """Whether the Hub's client has a snapshot, or `datasets` has cached the data."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    datasets_cache = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets"))
    snapshots = Path(HF_HUB_CACHE) / f"datasets--{data.replace('/', '--')}" / "snapshots"
    wanted = snapshots if revision is None else snapshots / revision
    return any(
        folder.is_dir() and any(folder.iterdir())
        for folder in (wanted, datasets_cache / data.replace("/", "___"))
    )


def _why_no_hub() -> str | None:
    """Why the Hub cannot be reached; None if it answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils._http import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception as error:
        # The client may use any HTTP library, so its error types are not known.
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
