"""Write and read the scores of each query, pair and document as a Parquet file.

    RESULTS/items/<variant>.parquet

A row is one array of one task, split and subset: `values` of one experiment, `gold` labels or
`similarities`. The schema's metadata record hashes of model, suite and data, prompts, library
versions and the machine. The intervals can be computed again from two such files, without a model.

Refuses to know: models, mteb, how intervals are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from gteopt.errors import IntegrityError
from gteopt.evaluation.per_item_scores import Array, Samples, Statistic
from gteopt.evaluation.task_store import SubsetScore
from gteopt.frozen import Frozen
from gteopt.records.environment import Conditions, MachineRecord
from gteopt.records.files import write_atomically

if TYPE_CHECKING:
    from gteopt.evaluation.runner import SuiteRun

_HEADER = b"gteopt"
_COLUMNS = pa.schema(
    [
        ("task", pa.string()),
        ("split", pa.string()),
        ("subset", pa.string()),
        ("statistic", pa.string()),
        ("unit", pa.string()),
        ("digits", pa.int32()),
        ("array", pa.string()),
        ("dtype", pa.string()),
        ("row", pa.int32()),
        ("n_rows", pa.int32()),
        ("values", pa.list_(pa.float64())),
    ]
)


class ItemHeader(Frozen):
    """Describes the scores of a file; stored in the metadata of its schema.

    Attributes:
        encoder: name of the variant.
        encoder_sha256: hash of the variant's files and of its stored form of vectors.
        suite, suite_sha256, protocol: the tasks and the protocol of the evaluation.
        scores: main scores with metric, instruction and data revision.
        machine, versions: the environment of the evaluation.
    """

    schema_: Literal["gteopt.items/1"] = Field(default="gteopt.items/1", alias="schema")
    encoder: str
    encoder_sha256: str
    suite: str
    suite_sha256: str
    protocol: str
    scores: tuple[SubsetScore, ...]
    machine: MachineRecord
    versions: Conditions


@dataclass(frozen=True)
class ItemScores:
    """The content of a file: the header, and entries by task, split and subset."""

    header: ItemHeader
    item_scores: Mapping[tuple[str, str, str], Samples]

    @property
    def encoder(self) -> str:
        """Name of the variant."""
        return self.header.encoder

    @property
    def encoder_sha256(self) -> str:
        """Identifies the variant."""
        return self.header.encoder_sha256

    @property
    def suite_sha256(self) -> str:
        """Identifies tasks, data and protocol."""
        return self.header.suite_sha256

    @property
    def scores(self) -> tuple[SubsetScore, ...]:
        """Main scores."""
        return self.header.scores


def write_item_scores(path: Path, run: SuiteRun, name: str) -> None:
    """Write the entries of a run's scores; `name` is the variant's name in reports."""
    rows = [row for key, samples in run.item_scores.items() for row in _rows(key, samples)]
    header = ItemHeader(
        encoder=name,
        encoder_sha256=run.encoder_sha256,
        suite=run.suite.name,
        suite_sha256=run.suite_sha256,
        protocol=run.suite.protocol or "gteopt",
        scores=run.scores,
        machine=run.machine,
        versions=run.versions,
    )
    metadata = {_HEADER: header.model_dump_json(by_alias=True).encode()}
    table = pa.Table.from_pylist(rows, schema=_COLUMNS.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue().to_pybytes())


def read_item_scores(path: Path) -> ItemScores:
    """Read what `write_item_scores` wrote.

    Raises:
        IntegrityError: the file is damaged, or not a file of item scores.
    """
    try:
        table = pq.read_table(path)
        header = ItemHeader.model_validate_json((table.schema.metadata or {})[_HEADER])
        samples = _samples(table.to_pylist())
    except (pa.ArrowException, OSError, KeyError, ValidationError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise IntegrityError(
            f"{path}: holds no item scores that gteopt wrote ({first_line}); evaluate again"
        ) from error
    return ItemScores(header, samples)


def _rows(key: tuple[str, str, str], samples: Samples) -> Iterator[dict[str, Any]]:
    task, split, subset = key
    for name, array in samples.arrays.items():
        table = np.atleast_2d(array)
        for number, values in enumerate(table):
            yield {
                "task": task,
                "split": split,
                "subset": subset,
                "statistic": samples.statistic,
                "unit": samples.unit,
                "digits": samples.digits,
                "array": name,
                "dtype": str(array.dtype),
                "row": number,
                "n_rows": len(table) if array.ndim == 2 else 0,
                "values": values.astype(np.float64),
            }


def _samples(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], Samples]:
    arrays: dict[tuple[str, str, str], dict[str, list[Array]]] = {}
    facts: dict[tuple[str, str, str], dict[str, Any]] = {}
    is_flat: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        key = row["task"], row["split"], row["subset"]
        if row["statistic"] not in get_args(Statistic):
            raise ValueError(f"unknown statistic '{row['statistic']}'")
        facts[key] = row
        values = np.array(row["values"], np.float64).astype(row["dtype"])
        arrays.setdefault(key, {}).setdefault(row["array"], []).append(values)
        if row["n_rows"] == 0:
            is_flat.setdefault(key, set()).add(row["array"])
    return {
        key: Samples(
            facts[key]["statistic"],
            facts[key]["unit"],
            {
                name: parts[0] if name in is_flat.get(key, set()) else np.stack(parts)
                for name, parts in named.items()
            },
            facts[key]["digits"],
        )
        for key, named in arrays.items()
    }
