"""The built-in calibration texts are many, varied, free to ship, and in no evaluation set."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from gteopt.build.calibration_texts import draw_calibration_texts
from gteopt.config.recipe import Calibration
from gteopt.paths import ASSETS
from tests.model.test_vocabularies import qwen_tokenizer

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "benchmarks/calibration_set.py"
SHIPPED = ASSETS / "calibration.jsonl"
PERMISSIVE = {"Apache-2.0", "BSD-3-Clause", "MIT", "PSF-2.0"}


@cache
def rows() -> tuple[dict[str, Any], ...]:
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
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
    assert SHIPPED.stat().st_size < 1_500_000


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
    drawn = Counter(kinds[text.text] for text in draw_calibration_texts(Calibration()))
    assert set(drawn) == {"query", "sentence", "document", "long", "code"}
    assert min(drawn.values()) >= 10


def test_the_generator_writes_the_shipped_file(tmp_path: Path) -> None:
    """Rows of botocore are made anew where the installed version is theirs, else kept."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("Python's own reference, a source of the set, differs between versions")
    out = tmp_path / "calibration.jsonl"
    command = [sys.executable, str(GENERATOR), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    for new, shipped in zip(written, rows(), strict=True):
        assert new == shipped
    assert out.read_bytes() == SHIPPED.read_bytes()


def test_the_shipped_file_and_every_text_that_may_be_kept_have_the_recorded_hashes() -> None:
    record = json.loads(GENERATOR.with_suffix(".json").read_text(encoding="utf-8"))
    assert sha256(SHIPPED.read_bytes()).hexdigest() == record["sha256"]
    kept: dict[str, list[str]] = {}
    for row in rows():
        if row["source"].split(" ")[0] == "botocore":
            kept.setdefault(row["source"], []).append(sha256(row["text"].encode()).hexdigest())
    assert kept == record["kept"]
    assert [len(texts) for texts in kept.values()] == [140]


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("calibration_set", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "calibration_set", module)
    spec.loader.exec_module(module)
    return module


def with_service(generator: Any, folder: Path, version: str, patch: pytest.MonkeyPatch) -> None:
    """Let botocore be a version with one service, whose operations have texts of our own."""
    file = folder / "data/ours/2026-01-01/service-2.json.gz"
    file.parent.mkdir(parents=True)
    start, rest = "of the service does what its name says", "It does much. " * 30
    texts = [f"<p>Operation {i} {start}. {rest}</p>" for i in range(400)]
    operations = {str(i): {"documentation": text} for i, text in enumerate(texts)}
    file.write_bytes(gzip.compress(json.dumps({"operations": operations}).encode()))
    patch.setattr(generator, "package_folder", lambda package: folder)
    patch.setattr(generator, "origin", lambda package: f"{package} {version}")
    # Each service gives six texts, and a draw takes 140.
    for i in range(40):
        shutil.copytree(folder / "data/ours", folder / f"data/ours-{i}")


def shipped_version() -> str:
    sources = {str(row["source"]) for row in rows()}
    (botocore,) = (source for source in sources if source.startswith("botocore "))
    return botocore.removeprefix("botocore ")


def test_rows_of_another_version_are_kept_and_those_of_the_same_are_made_anew(
    generator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = [row for row in rows() if row["source"].startswith("botocore ")]
    with_service(generator, tmp_path / "newer", "999.0", monkeypatch)
    assert [asdict(row) for row in generator.kept_services()] == shipped
    # The texts of the installed package count where its version is that of the set, right or wrong.
    monkeypatch.setattr(generator, "origin", lambda package: f"{package} {shipped_version()}")
    assert generator.kept_services() == []
    texts = {row.text for row in generator.services()}
    assert texts
    assert all("of the service" in text for text in texts)


def test_a_kept_row_that_was_changed_is_refused(
    generator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "origin", lambda package: f"{package} 999.0")
    changed = tmp_path / "calibration.jsonl"
    of_botocore = next(row["text"] for row in rows() if row["source"].startswith("botocore "))
    whole = SHIPPED.read_text(encoding="utf-8")
    text = json.dumps(of_botocore, ensure_ascii=False)
    changed.write_text(whole.replace(text, text.upper(), 1))
    assert changed.read_text() != whole
    monkeypatch.setattr(generator, "SHIPPED", changed)
    with pytest.raises(SystemExit, match="rows of botocore are not those whose SHA-256s"):
        generator.kept_services()


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
