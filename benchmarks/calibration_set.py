"""Write gteopt/assets/calibration.jsonl: texts of many kinds, each with its source and license.

Without --out, the licenses that come with the packages and `calibration_set.json`, which holds
SHA-256s, are written too.

Rows that were written for gteopt stay as they are, and the script makes all other rows anew. Their
sources are `calibration_grammar.yaml` and installed packages of the tested versions, so that the
same environment writes the same file:

    .venv/bin/python benchmarks/calibration_set.py

botocore is the exception: s3fs decides which of its versions is installed, and another version
gives other texts. So the rows of another version are kept as well; --renew makes them anew.

Kinds are mixed by length, role, language and domain. None of the sets that variants are judged on
is a source. Lengths are in characters here; tests/build/test_calibration_set.py counts tokens.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import html
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

from gteopt.paths import ASSETS

OURS = "written for gteopt"
OUR_LICENSE = "Apache-2.0"
RECORD = Path(__file__).with_suffix(".json")
"""The SHA-256 of the shipped file, and of every text of a row that may be kept, by its source."""
SHIPPED = ASSETS / "calibration.jsonl"
GRAMMAR = Path(__file__).parent / "calibration_grammar.yaml"
SEARCH = "Given a web search query, retrieve relevant passages that answer the query"
PROSE = {"scipy": "BSD-3-Clause", "networkx": "BSD-3-Clause", "sympy": "BSD-3-Clause"}
CODE = {
    "werkzeug": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "attrs": "MIT",
    "click": "BSD-3-Clause",
}
APACHE = {"botocore", "dashscope"}
MODULES = {"attrs": "attr"}
STDLIB = f"Python {sys.version_info.major}.{sys.version_info.minor}"
LENGTHS = {
    "sentence": (40, 200),
    "document": (300, 1_800),
    "long": (2_500, 7_000),
    "function": (150, 1_500),
    "module": (2_000, 5_000),
}
"""Fewest and most characters of an English text, by kind."""


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    language: str
    role: str
    instruction: str | None
    text: str
    kind: str
    source: str
    license: str


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, help="another file")
    parser.add_argument("--renew", action="store_true", help="keep no rows of botocore")
    given = parser.parse_args()
    out = given.out or SHIPPED
    rows = make_rows(renew=given.renew)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in rows]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if given.out is None:
        (ASSETS / "calibration_licenses.txt").write_text(licenses(rows), encoding="utf-8")
        RECORD.write_text(json.dumps(hashes(rows), indent=1) + "\n", encoding="utf-8")
    print(f"{len(lines):,} texts, {out.stat().st_size:,} bytes")


def hashes(rows: Iterable[Row]) -> dict[str, Any]:
    """What `RECORD` holds, of the shipped file and its rows."""
    kept: dict[str, list[str]] = {}
    for row in rows:
        if row.source.startswith("botocore "):
            kept.setdefault(row.source, []).append(sha256(row.text.encode()).hexdigest())
    return {"sha256": sha256(SHIPPED.read_bytes()).hexdigest(), "kept": kept}


def licenses(rows: Iterable[Row]) -> str:
    """The copyright notices that the texts of others are shipped under."""
    sources = {row.source.split(" ")[0]: row.source for row in rows}
    parts = [
        "Texts in calibration.jsonl that are not our own come from these packages. The field "
        "source of a text names its package. Apache-2.0 is the license in LICENSE.\n"
    ]
    for package in sorted({*PROSE, *CODE, "botocore", "dashscope"}):
        files = distribution(package).files or []
        file_name = "NOTICE" if package in APACHE else "LICENSE"
        paths = [file for file in files if file.stem == file_name]
        # A line of dashes begins the notices of other software in the same wheel.
        texts = [re.split(r"\n-{4,}\n", file.read_text())[0].strip() for file in paths[:1]]
        parts.append("\n\n".join([f"== {sources[package]}", *texts]))
    python = Path(json.__file__).parent.parent / "LICENSE.txt"
    parts.append(f"== {STDLIB}\n\n{python.read_text(encoding='utf-8').strip()}")
    return "\n\n".join(parts) + "\n"


def make_rows(*, renew: bool = False) -> list[Row]:
    """All rows, no text twice, in a fixed order.

    Args:
        renew: make rows of botocore anew, whichever version is installed.
    """
    ours, kept = list(written()), [] if renew else kept_services()
    of_services = kept or services()
    all_rows = [*ours, *pages(ours), *from_grammar(), *prose(), *of_services, *chinese(), *code()]
    rows: dict[str, Row] = {}
    for row in all_rows:
        rows.setdefault(row.text, row)
    return list(rows.values())


def written() -> Iterator[Row]:
    """The rows of the shipped file that have no other source."""
    for line in SHIPPED.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("source", OURS) == OURS and row.get("kind") != "long":
            kind = "query" if row["role"] == "query" else "document"
            if kind == "document" and len(row["text"]) < LENGTHS["sentence"][1]:
                kind = "sentence"
            yield Row(
                row["language"],
                row["role"],
                row["instruction"],
                row["text"],
                kind,
                OURS,
                OUR_LICENSE,
            )


def pages(ours: Iterable[Row]) -> Iterator[Row]:
    """Long pages made of several documents that were written for gteopt."""
    draw = random.Random(1)
    texts: dict[str, list[str]] = {}
    for row in ours:
        if row.role == "document":
            texts.setdefault(row.language, []).append(row.text)
    for language, documents in texts.items():
        for length in (700, 1_000, 1_400, 1_800, 2_200, 2_600, 3_000, 3_500, 4_000, 5_000):
            limit = length // 3 if language == "zh" else length
            order = draw.sample(documents, len(documents))
            page = order[0]
            for text in order[1:]:
                if len(page) + len(text) <= limit:
                    page += f"\n\n{text}"
            if page != order[0]:
                yield Row(language, "document", None, page, "long", OURS, OUR_LICENSE)


def from_grammar() -> Iterator[Row]:
    """Queries, sentences, documents and long documents from calibration_grammar.yaml."""
    grammar = yaml.safe_load(GRAMMAR.read_text(encoding="utf-8"))
    draw = random.Random(2)
    source = "calibration_grammar.yaml"
    for language, rules in grammar.items():

        def fill(pattern: str, rules: dict[str, list[str]] = rules) -> str:
            def value(slot: re.Match[str]) -> str:
                if slot[1] == "number":
                    return str(draw.choice([draw.randint(3, 99), draw.randint(1_900, 2_030)]))
                return draw.choice(rules[slot[1]])

            text = re.sub(r"\{(\w+)\}", value, pattern)
            return text[0].upper() + text[1:]

        for _ in range(30):
            query = fill(draw.choice(rules["queries"]))
            yield Row(language, "query", SEARCH, query, "query", source, OUR_LICENSE)
        joined = "" if language == "zh" else " "
        for kind, n_texts, least, most in (
            ("sentence", 30, 1, 1),
            ("document", 20, 3, 8),
            ("long", 5, 16, 40),
        ):
            for _ in range(n_texts):
                n_sentences = draw.randint(least, most)
                text = joined.join(
                    fill(draw.choice(rules["sentences"])) for _ in range(n_sentences)
                )
                yield Row(language, "document", None, text, kind, source, OUR_LICENSE)


def prose() -> Iterator[Row]:
    """English documents: parts of docstrings, and chapters of Python's reference."""
    draw = random.Random(3)
    for package, license in PROSE.items():
        documents = [text for tree in trees(package) for text in docstrings(tree)]
        rows = Row("en", "document", None, "", "document", origin(package), license)
        for text in draw.sample(fitting(documents, "document"), 35):
            yield replace(rows, text=text)
        for text in draw.sample(fitting(documents, "long"), 4):
            yield replace(rows, text=text, kind="long")
    chapters = fitting([" ".join(words) for words in _paragraphs(topics.values())], "long")
    for text in draw.sample(chapters, 12):
        yield Row("en", "document", None, text, "long", f"{STDLIB}: reference", "PSF-2.0")


def _paragraphs(chapters: Iterable[str]) -> Iterator[list[str]]:
    """Words of each chapter without section marks, cut to the length of a long text."""
    for chapter in chapters:
        words = re.sub(r"[*=^~-]{3,}", "", chapter).split()
        yield words[: LENGTHS["long"][1] // 7]


def kept_services() -> list[Row]:
    """The rows of the shipped file that are of another version of botocore than the installed one.

    Raises:
        SystemExit: they are not those that `RECORD` knows.
    """
    lines = SHIPPED.read_text(encoding="utf-8").splitlines()
    shipped = [Row(**json.loads(line)) for line in lines]
    rows = [row for row in shipped if row.source.startswith("botocore ")]
    if any(row.source == origin("botocore") for row in rows):
        return []
    known = json.loads(RECORD.read_text(encoding="utf-8"))["kept"]
    if hashes(rows)["kept"] != known:
        raise SystemExit(f"{SHIPPED}: rows of botocore are not those whose SHA-256s {RECORD} holds")
    return rows


def services() -> Iterator[Row]:
    """English sentences and paragraphs from descriptions of several hundred services."""
    draw = random.Random(4)
    texts: list[str] = []
    for path in sorted((package_folder("botocore") / "data").glob("*/*/service-2.json.gz")):
        service = json.loads(gzip.decompress(path.read_bytes()))
        parts = [service.get("documentation", "")]
        parts += [action.get("documentation", "") for action in service["operations"].values()]
        plain = [html.unescape(re.sub(r"<[^>]+>", " ", part)) for part in parts]
        clean = [" ".join(part.split()) for part in plain]
        texts += [part for part in draw.sample(clean, min(6, len(clean))) if part]
    sentences = [re.split(r"(?<=\.) ", text)[0] for text in texts]
    for kind, candidates, n_texts in (("sentence", sentences, 80), ("document", texts, 60)):
        for text in draw.sample(fitting(candidates, kind), n_texts):
            yield Row("en", "document", None, text, kind, origin("botocore"), OUR_LICENSE)


def chinese() -> Iterator[Row]:
    """Chinese technical documents: single sections, and longer texts of several sections."""
    folder = package_folder("dashscope")
    sections: list[str] = []
    for path in sorted((folder / "examples").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        sections += [part.strip() for part in re.split(r"(?m)^(?=#+ )", text) if is_chinese(part)]
    row = Row("zh", "document", None, "", "document", origin("dashscope"), OUR_LICENSE)
    for text in sections:
        if 80 <= len(text) <= 1_200:
            yield replace(row, text=text)
    for start in range(0, len(sections), 6):
        yield replace(row, text="\n\n".join(sections[start : start + 6])[:3_000], kind="long")


def code() -> Iterator[Row]:
    """Functions and longer pieces of modules."""
    draw = random.Random(5)
    places = [(name, package_folder(MODULES.get(name, name)), CODE[name]) for name in CODE]
    named = [(origin(name), folder, license) for name, folder, license in places]
    standard = Path(json.__file__).parent.parent
    named.append((f"{STDLIB}: library", standard, "PSF-2.0"))
    for source, folder, license in named:
        is_standard = folder == standard
        paths = sorted(folder.glob("*.py") if is_standard else folder.rglob("*.py"))
        paths = [path for path in paths if "test" not in str(path.relative_to(folder))]
        files = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
        functions = [piece for text in files for piece in definitions(text)]
        row = Row("code", "document", None, "", "code", source, license)
        for text in draw.sample(fitting(functions, "function"), 14):
            yield replace(row, text=text)
        for text in draw.sample(fitting([text[:5_000] for text in files], "module"), 2):
            yield replace(row, text=text)


def package_folder(package: str) -> Path:
    """Folder of an installed package."""
    spec = find_spec(MODULES.get(package, package))
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent


def origin(package: str) -> str:
    """Name and version of a package, as the field `source` gives them."""
    return f"{package} {distribution(package).version}"


def trees(package: str) -> Iterator[ast.Module]:
    """The parsed modules of a package, without its tests."""
    folder = package_folder(package)
    for path in sorted(folder.rglob("*.py")):
        if "test" not in str(path.relative_to(folder)):
            yield ast.parse(path.read_text(encoding="utf-8"))


def docstrings(tree: ast.Module) -> Iterator[str]:
    """Docstrings of a module and of its public functions and classes."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and not getattr(node, "name", "").startswith("_"):
            yield ast.get_docstring(node) or ""


def definitions(text: str) -> Iterator[str]:
    """Source text of the functions and classes at a module's top level."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield ast.get_source_segment(text, node) or ""


def fitting(texts: Iterable[str], kind: str) -> list[str]:
    """Distinct texts whose length lies in the range of a kind."""
    least, most = LENGTHS[kind]
    return [text for text in dict.fromkeys(texts) if least <= len(text) <= most]


def is_chinese(text: str) -> bool:
    """Whether more than a fifth of the characters are Chinese."""
    return sum("一" <= c <= "鿿" for c in text) * 5 > len(text)


if __name__ == "__main__":
    main()
