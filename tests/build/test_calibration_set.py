"""The built-in calibration texts are many, varied, free to ship, and in no evaluation set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from gteopt.build.calibration_texts import draw_texts
from gteopt.config.recipe import Calibration
from gteopt.paths import ASSETS
from tests.model.test_vocabularies import qwen_tokenizer

ROOT = Path(__file__).parents[2]
PERMISSIVE = {"Apache-2.0", "BSD-3-Clause", "MIT", "PSF-2.0"}


@cache
def rows() -> tuple[dict[str, Any], ...]:
    lines = (ASSETS / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def test_the_set_has_150_000_qwen2_tokens_from_short_queries_to_long_documents() -> None:
    _, encode = qwen_tokenizer()
    lengths = defaultdict(list)
    for row in rows():
        lengths[row["kind"]].append(len(encode(row["text"])))
    assert sum(sum(n_tokens) for n_tokens in lengths.values()) >= 150_000
    assert max(lengths["query"]) < 64
    assert sum(n > 512 for n_tokens in lengths.values() for n in n_tokens) >= 60
    assert 1_500 < max(map(max, lengths.values())) <= 2_048
    assert (ASSETS / "calibration.jsonl").stat().st_size < 1_500_000


def test_every_language_and_code_has_thousands_of_characters() -> None:
    n_characters: Counter[str] = Counter()
    for row in rows():
        n_characters[row["language"]] += len(row["text"])
    assert set(n_characters) == {"en", "zh", "fr", "pl", "de", "es", "code"}
    assert min(n_characters.values()) > 20_000


def test_every_text_says_where_it_is_from_under_a_license_that_allows_to_ship_it() -> None:
    assert {row["license"] for row in rows()} <= PERMISSIVE
    assert all(row["source"] for row in rows())
    assert len({row["text"] for row in rows()}) == len(rows())
    notices = (ASSETS / "calibration_licenses.txt").read_text(encoding="utf-8")
    ours = {"written for gteopt", "calibration_grammar.yaml"}
    for source in {row["source"].split(":")[0] for row in rows()} - ours:
        assert f"== {source}\n" in notices


def test_a_draw_of_the_default_size_holds_every_kind() -> None:
    kinds = {row["text"]: row["kind"] for row in rows()}
    drawn = Counter(kinds[text.text] for text in draw_texts(Calibration()))
    assert set(drawn) == {"query", "sentence", "document", "long", "code"}
    assert min(drawn.values()) >= 10


def test_the_generator_writes_the_shipped_file(tmp_path: Path) -> None:
    """Texts of botocore may differ, because s3fs holds it at an older version."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("Python's own reference, a source of the set, differs between versions")
    out = tmp_path / "calibration.jsonl"
    command = [sys.executable, "benchmarks/calibration_set.py", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(written) == len(rows())
    for new, shipped in zip(written, rows(), strict=True):
        if shipped["source"].startswith("botocore ") and new["source"] != shipped["source"]:
            assert (new["kind"], new["language"]) == (shipped["kind"], shipped["language"])
        else:
            assert new == shipped


@pytest.mark.parametrize("file", sorted((ROOT / "eval/mini").glob("*.jsonl")), ids=lambda f: f.name)
def test_no_text_of_the_shipped_suite_is_calibrated_on(file: Path) -> None:
    assert not _strings(file) & {row["text"].strip() for row in rows()}


def test_no_text_of_a_set_that_variants_are_judged_on_is_calibrated_on(shared: Path) -> None:
    files = [*shared.glob("hub/*/*/*.jsonl"), *shared.glob("beir/*/*.jsonl")]
    assert files
    ours = [row["text"].strip() for row in rows()]
    for file in files:
        judged = {text for text in _strings(file) if len(text) > 15}
        assert not judged & set(ours), file
    # A long calibration text may contain a whole document.
    long = "\n".join(text for text in ours if len(text) > 1_000)
    corpus = shared / "beir/cranfield/corpus.jsonl"
    assert not [text for text in _strings(corpus) if len(text) > 100 and text in long]


def _strings(file: Path) -> set[str]:
    strings: set[str] = set()

    def collect(value: object) -> None:
        if isinstance(value, str):
            strings.add(value.strip())
        elif isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)

    for line in file.read_text(encoding="utf-8").splitlines():
        collect(json.loads(line))
    return strings
