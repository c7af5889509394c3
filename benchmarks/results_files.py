"""Read and write the JSON files in benchmarks/results, with machine and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gteopt.machine import describe_machine, read_library_versions
from gteopt.records.files import write_atomically


def conditions(more_versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The fields `machine` and `versions` of a results file."""
    return {
        "machine": describe_machine().model_dump(),
        "versions": {**read_library_versions(), **(more_versions or {})},
    }


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file; empty if there is no file."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return results


def write_results(path: Path, results: Mapping[str, Any], *, indent: int = 1) -> None:
    """Write a results file; a reader sees either the old or the complete new content."""
    write_atomically(path, (json.dumps(results, indent=indent) + "\n").encode())


def write_part(path: Path, part: str, content: Mapping[str, Any], *, indent: int = 1) -> None:
    """Replace one part of a results file, and keep the other parts."""
    write_results(path, {**read_results(path), part: content}, indent=indent)
