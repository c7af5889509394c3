"""Two files of item scores give the report's own intervals again, without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import gteopt
from gteopt.commands.choose import write_comparison_page
from gteopt.errors import InputError, IntegrityError
from gteopt.evaluation.compare import compare_item_scores, compare_with_baseline
from gteopt.evaluation.item_scores_file import read_item_scores, write_item_scores
from gteopt.evaluation.runner import SuiteRun, run_views
from gteopt.evaluation.suites import Suite
from gteopt.evaluation.views import own_view, view_of
from gteopt.records.files import write_record
from gteopt.vectors.transform import VectorTransform, identity_transform


def suite_of(*tasks: dict[str, Any]) -> Suite:
    return Suite.model_validate({"schema": "gteopt.suite/1", "name": "test", "tasks": tasks})


@pytest.fixture(scope="module")
def runs() -> tuple[SuiteRun, SuiteRun]:
    """The embedded model, and its first 64 dimensions."""
    nano = gteopt.load("nano", device="cpu")
    short: VectorTransform = replace(identity_transform(nano.full_dims), dims=64)
    suite = suite_of({"task": "MiniSTS", "subsets": ["en", "pl"]}, {"task": "MiniBitextMining"})
    base, variant = run_views(nano, suite, [own_view(nano), view_of(nano, short, "short")])
    return base, variant


def test_a_comparison_of_files_is_that_of_the_runs(
    runs: tuple[SuiteRun, SuiteRun], tmp_path: Path
) -> None:
    base, variant = runs
    write_item_scores(tmp_path / "base.parquet", base, "base")
    write_item_scores(tmp_path / "short.parquet", variant, "short")
    report = compare_with_baseline(base, variant, variant_name="short")
    comparison = compare_item_scores(tmp_path / "base.parquet", tmp_path / "short.parquet")
    assert comparison.tasks == report.tasks
    assert comparison.difference == report.difference
    assert (comparison.retention_low, comparison.retention_high) == (
        report.retention_low,
        report.retention_high,
    )
    assert (comparison.variant, comparison.baseline) == (
        "short",
        base.encoder,
    ) or comparison.baseline == "base"


def test_a_page_of_two_runs_pairs_their_item_scores(
    runs: tuple[SuiteRun, SuiteRun], tmp_path: Path
) -> None:
    folders = tmp_path / "monday", tmp_path / "friday"
    for folder, run in zip(folders, runs, strict=True):
        report = compare_with_baseline(runs[0], run, variant_name="mine")
        write_record(folder / "eval" / "mine.json", report)
        write_item_scores(folder / "items" / "mine.parquet", run, "mine")
    items = compare_item_scores(*(folder / "items" / "mine.parquet" for folder in folders))
    page = write_comparison_page(*folders).read_text(encoding="utf-8")
    paired = page.split('id="paired"')[1].split("</table>")[0]
    assert items.difference is not None
    value, low, high = (
        f"{100 * number:+.2f}"
        for number in (items.difference.value, items.difference.low, items.difference.high)
    )
    assert f"<td>{value} [{low}, {high}]</td><td>{items.difference.verdict}</td>" in paired
    assert f"<td>{100 * items.baseline_score:.2f}</td><td>{100 * items.score:.2f}</td>" in paired
    (folders[1] / "items" / "mine.parquet").unlink()
    assert 'id="paired"' not in write_comparison_page(*folders).read_text(encoding="utf-8")


def test_a_file_says_what_was_scored_with_what(
    runs: tuple[SuiteRun, SuiteRun], tmp_path: Path
) -> None:
    path = tmp_path / "base.parquet"
    write_item_scores(path, runs[0], "base")
    header = json.loads(pq.read_schema(path).metadata[b"gteopt"])
    assert header["encoder_sha256"] == runs[0].encoder_sha256
    assert header["suite_sha256"] == runs[0].suite_sha256
    assert header["versions"]["torch"]
    assert all(score["dataset_revision"] for score in header["scores"])
    stored = read_item_scores(path)
    for key, samples in runs[0].item_scores.items():
        stored_samples = stored.item_scores[key]
        assert (stored_samples.statistic, stored_samples.unit, stored_samples.digits) == (
            samples.statistic,
            samples.unit,
            samples.digits,
        )
        for name, array in samples.arrays.items():
            np.testing.assert_array_equal(stored_samples.arrays[name], array)
            assert stored_samples.arrays[name].dtype == array.dtype


def test_files_of_other_suites_and_damaged_ones_are_refused(
    runs: tuple[SuiteRun, SuiteRun], tmp_path: Path
) -> None:
    base, other = tmp_path / "base.parquet", tmp_path / "other.parquet"
    write_item_scores(base, runs[0], "base")
    write_item_scores(other, replace(runs[1], suite_sha256="0" * 64), "other")
    with pytest.raises(InputError, match="tasks, data or protocol differ"):
        compare_item_scores(base, other)
    other.write_bytes(other.read_bytes()[:-40])
    with pytest.raises(IntegrityError, match=r"other\.parquet.*evaluate again"):
        compare_item_scores(base, other)
