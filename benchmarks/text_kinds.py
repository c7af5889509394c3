"""Judge variants on seven kinds of text that are not used for calibration.

Their sources are BANKING77, STS-B and its translations, LCQMC, Cranfield, and two packages.
`calibration_set.py` uses none of them for the shipped calibration texts.
"""

from __future__ import annotations

import ast
import json
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gteopt.config.recipe import Calibration
from gteopt.encoder.encoder import Encoder

KINDS = (
    "queries",
    "sentences",
    "documents",
    "long documents",
    "code",
    "fr, pl, zh",
    "zh questions",
)
CODE = ("pydantic", "jinja2")
ONE_SOURCE = Calibration(texts="mteb/stsbenchmark-sts", column="sentence1", n_texts=256)
"""Only sentences of STS-B, on which quantizers of embedding models are often calibrated."""
N_NEAREST = 10


@dataclass(frozen=True)
class KindError:
    """How far a variant moved the texts of one kind.

    Attributes:
        error: 1 - mean cosine to the original.
        p1_cosine: the cosine that 99 % of the texts exceed.
        neighbour_overlap: share of a text's 10 nearest texts of all kinds that stay nearest.
    """

    error: float
    p1_cosine: float
    neighbour_overlap: float


def judged_texts(hub_dir: Path, beir: Path) -> dict[str, list[str]]:
    """Texts by kind, drawn with a fixed seed."""
    return _drawn(hub_dir, beir, random.Random(0), without=())


def ideal_texts(hub_dir: Path, beir: Path) -> dict[str, list[str]]:
    """Other texts of the sources of `judged_texts`: the best that a user can calibrate on."""
    judged = judged_texts(hub_dir, beir)
    documents = [part for text in judged["long documents"] for part in text.split("\n\n")]
    judged_ones = {text for texts in judged.values() for text in texts}.union(documents)
    return _drawn(hub_dir, beir, random.Random(1), without=judged_ones)


def _drawn(
    hub_dir: Path, beir: Path, draw: random.Random, without: Collection[str]
) -> dict[str, list[str]]:

    def column(name: str, *keys: str, language: str | None = None) -> list[str]:
        rows = map(json.loads, (hub_dir / name).read_text(encoding="utf-8").splitlines())
        in_language = (row for row in rows if language in (None, row.get("lang")))
        return list(dict.fromkeys(row[key] for row in in_language for key in keys))

    def some(texts: list[str], n_texts: int) -> list[str]:
        texts = [text for text in texts if text not in without]
        return draw.sample(texts, min(n_texts, len(texts)))

    corpus = map(json.loads, (beir / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    documents = [row["text"] for row in corpus if len(row["text"]) > 300]
    languages: list[str] = []
    for language in ("fr", "pl", "zh"):
        sentences = column("mteb/stsb_multi_mt/test.jsonl", "sentence1", language=language)
        languages += some(sentences, 40)
    return {
        "queries": some(column("mteb/banking77/test.jsonl", "text"), 100),
        "sentences": some(
            column("mteb/stsbenchmark-sts/test.jsonl", "sentence1", "sentence2"), 100
        ),
        "documents": some(documents, 50),
        "long documents": ["\n\n".join(some(documents, 6)) for _ in range(16)],
        "code": some([text for package in CODE for text in functions(package)], 40),
        "fr, pl, zh": languages,
        "zh questions": some(column("C-MTEB/LCQMC/test.jsonl", "sentence1"), 80),
    }


def functions(package: str) -> list[str]:
    """The longer functions and classes of a package, cut at 2,000 characters."""
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    pieces: list[str] = []
    for path in sorted(Path(spec.origin).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            piece = ast.get_source_segment(text, node) or ""
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(piece) > 200:
                pieces.append(piece[:2_000])
    return pieces


def encode_kinds(
    encoder: Encoder, texts: Mapping[str, list[str]]
) -> dict[str, NDArray[np.float32]]:
    """Vectors [N, D] of each kind; queries have the model's prompt for queries."""
    return {
        kind: encoder.encode(kind_texts, role="query" if kind == "queries" else "document")
        for kind, kind_texts in texts.items()
    }


def kind_errors(
    reference: Mapping[str, NDArray[np.float32]], variant: Mapping[str, NDArray[np.float32]]
) -> dict[str, KindError]:
    """How far the variant is from the original, by kind."""
    pairs = zip(_nearest(reference), _nearest(variant), strict=True)
    kept = iter([len(set(a) & set(b)) / N_NEAREST for a, b in pairs])
    errors: dict[str, KindError] = {}
    for kind, original in reference.items():
        cosines = (original.astype(np.float64) * variant[kind]).sum(axis=1)
        errors[kind] = KindError(
            error=float(1 - cosines.mean()),
            p1_cosine=float(np.quantile(cosines, 0.01)),
            neighbour_overlap=float(np.mean([next(kept) for _ in original])),
        )
    return errors


def mean_and_worst(errors: Mapping[str, KindError]) -> tuple[float, float, str]:
    """Mean error over kinds, error of the worst kind, and name of the worst kind."""
    worst = max(errors, key=lambda kind: errors[kind].error)
    return (
        float(np.mean([kind_error.error for kind_error in errors.values()])),
        errors[worst].error,
        worst,
    )


def _nearest(kinds: Mapping[str, NDArray[np.float32]]) -> NDArray[np.intp]:
    """Indices [N, 10] of the nearest texts of all kinds, for each text in the order of kinds."""
    vectors = np.concatenate(list(kinds.values()))
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :N_NEAREST]
