"""The layering that CONTRIBUTING.md states holds."""

from __future__ import annotations

import ast
from pathlib import Path

import gteopt

PACKAGE = Path(gteopt.__file__).parent
RANKS = [
    {"errors"},
    {"recipe", "families", "licenses"},
    {"records"},
    {"quant", "machine", "pooling", "energy", "tables", "progress"},
    {"kernels", "formats", "artifact", "hub"},
    {"checkpoint", "runtime", "graphs"},
    {"openvino"},
    {"encoder", "card"},
    {"loading"},
    {"calibration", "layout", "dummy"},
    {"tuning", "smoothing", "sensitivity"},
    {"layer_plan"},
    {"blocks"},
    {"build"},
    {"bench", "evaluation", "choose", "report", "inspect", "publish"},
    {"plan"},
    {"cli"},
]
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names}
WITHOUT_TORCH = (
    RANKS[0]
    | RANKS[1]
    | RANKS[2]
    | {"artifact", "hub", "checkpoint", "card", "choose", "report", "publish"}
)


def imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def units() -> dict[str, list[Path]]:
    """Module or subpackage -> its files; the package's own __init__ is the door, not a unit."""
    out: dict[str, list[Path]] = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",) and parts[0] != "shipped":
            out.setdefault(parts[0], []).append(path)
    return out


def test_every_module_has_a_rank() -> None:
    assert set(units()) == set(RANK_OF)


def test_modules_import_only_lower_ranks() -> None:
    wrong = [
        f"{unit} (rank {RANK_OF[unit]}) imports {other} (rank {RANK_OF[other]})"
        for unit, files in units().items()
        for path in files
        for other in {n.split(".")[1] for n in imports(path) if n.startswith("gteopt.")}
        & set(RANK_OF)
        if other != unit and RANK_OF[other] >= RANK_OF[unit]
    ]
    assert wrong == []


def test_only_evaluation_imports_mteb() -> None:
    users = {
        u
        for u, files in units().items()
        for p in files
        if any(n.split(".")[0] == "mteb" for n in imports(p))
    }
    assert users == {"evaluation"}


def test_the_low_ranks_and_the_readers_of_records_need_no_torch() -> None:
    users = {
        u
        for u, files in units().items()
        for p in files
        if any(n.split(".")[0] in ("torch", "transformers") for n in imports(p))
    }
    assert users & WITHOUT_TORCH == set()


def test_nothing_is_pickled() -> None:
    for files in units().values():
        for path in files:
            assert not {"pickle", "torch.load", "joblib", "dill"} & imports(path), path
            assert "torch.load(" not in path.read_text(encoding="utf-8"), path
