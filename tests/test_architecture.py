"""The layering that CONTRIBUTING.md states holds: packages, files, and what each may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gteopt

PACKAGE = Path(gteopt.__file__).parent
RANKS = [
    {"errors", "version", "frozen", "progress", "paths", "local_data"},
    {"config"},
    {"records"},
    {"quant", "model", "machine", "report"},
    {"vectors", "formats", "kernels"},
    {"encoder"},
    {"build", "corpus", "speed", "server"},
    {"evaluation", "publishing"},
    {"commands", "ray"},
    {"cli"},
]
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names}
WITHOUT_TORCH = RANKS[0] | RANKS[1] | RANKS[2] | {"model", "report", "publishing"}


def imports(path: Path) -> set[str]:
    """Dotted names of every module that a file imports, also inside functions."""
    return {name for name, _ in _imports(path)}


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Each name with whether it is imported for types alone, which ties nothing at run time."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in for_types
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) in for_types
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in for_types


def files(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted module name -> file, without the data folders."""
    out = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        if parts[0] not in ("shipped", "assets"):
            out[".".join(("gteopt", *(part for part in parts if part != "__init__")))] = path
    return out


def units() -> dict[str, list[Path]]:
    """Top-level module or package -> its files; __init__ and __main__ are doors, not units."""
    out: dict[str, list[Path]] = {}
    for name, path in files().items():
        if name not in ("gteopt", "gteopt.__main__"):
            out.setdefault(name.split(".")[1], []).append(path)
    return out


def file_circles(package: Path = PACKAGE) -> list[list[str]]:
    """Files that import one another in a loop, types left out."""
    known = files(package)
    graph = {
        name: {other for other, for_types in _imports(path) if not for_types and other in known}
        - {name}
        for name, path in known.items()
        # A package that hands on names of its own files ties nothing together by itself.
        if not (path.name == "__init__.py" and name != "gteopt")
    }
    circles, settled = [], set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            circles.append(trail[trail.index(name) :])
        elif name not in settled:
            for other in sorted(graph.get(name, ())):
                visit(other, [*trail, name])
            settled.add(name)

    for name in graph:
        visit(name, [])
    return circles


def imports_of_the_door(package: Path = PACKAGE) -> list[str]:
    """Files that import the top package itself, which is for users and the command line."""
    return [
        name
        for name, path in files(package).items()
        if name != "gteopt"
        and any(
            (
                isinstance(node, ast.ImportFrom)
                and node.module == "gteopt"
                and any(f"gteopt.{alias.name}" not in files() for alias in node.names)
            )
            or (
                isinstance(node, ast.Import) and any(alias.name == "gteopt" for alias in node.names)
            )
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]


def test_every_module_has_a_rank() -> None:
    assert set(units()) <= set(RANK_OF)


def test_there_are_at_most_ten_levels_of_packages() -> None:
    assert len(RANKS) <= 10


def test_packages_import_only_lower_ranks() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}, which is no lower"
        for unit, paths in units().items()
        for path in paths
        for other in {n.split(".")[1] for n in imports(path) if n.startswith("gteopt.")}
        & set(RANK_OF) - {unit}
        if RANK_OF[other] >= RANK_OF[unit] and not RANK_OF[other] == RANK_OF[unit] == 0
    ]
    assert wrong == []


def test_no_files_import_one_another_in_a_circle() -> None:
    assert file_circles() == []


def test_nothing_inside_the_package_imports_its_door() -> None:
    assert imports_of_the_door() == []


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("from gteopt.errors import InputError\n", file_circles),
        ("def late():\n    from gteopt.errors import InputError\n", file_circles),
        ("from gteopt import __version__\n", imports_of_the_door),
        ("import gteopt\n", imports_of_the_door),
    ],
)
def test_a_planted_fault_is_seen(tmp_path: Path, text: str, check: object) -> None:
    (tmp_path / "planted.py").write_text(text)
    (tmp_path / "errors.py").write_text("from gteopt.planted import something\n")
    assert callable(check)
    assert check(tmp_path)


def test_no_package_bears_the_name_of_a_public_function() -> None:
    assert {name for name in gteopt.__all__ if name.islower()} & set(units()) == set()


def users_of(*libraries: str) -> set[str]:
    """Units with a file that imports one of these libraries."""
    return {
        unit
        for unit, paths in units().items()
        for path in paths
        if {name.split(".")[0] for name in imports(path)} & set(libraries)
    }


def test_only_evaluation_imports_mteb() -> None:
    assert users_of("mteb") == {"evaluation"}


def test_the_low_ranks_and_the_readers_of_records_need_no_torch() -> None:
    assert users_of("torch", "transformers") & WITHOUT_TORCH == set()


def test_nothing_is_pickled() -> None:
    for path in files().values():
        assert not {"pickle", "torch.load", "joblib", "dill"} & imports(path), path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path
