"""The layering that CONTRIBUTING.md states holds: packages, files, and what each may import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gteopt

PACKAGE = Path(gteopt.__file__).parent
RANKS = [
    {
        "errors",
        "interruption",
        "version",
        "frozen",
        "progress",
        "paths",
        "local_data",
        "cores",
        "own_thread",
    },
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
    """Each name, and whether only type checkers import it."""
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
    """Top-level module or package -> its files, without the top __init__ and __main__."""
    out: dict[str, list[Path]] = {}
    for name, path in files().items():
        if name not in ("gteopt", "gteopt.__main__"):
            out.setdefault(name.split(".")[1], []).append(path)
    return out


def file_circles(package: Path = PACKAGE) -> list[list[str]]:
    """Files that import one another in a loop; imports for types do not count."""
    known = files(package)
    graph = {
        name: {other for other, for_types in _imports(path) if not for_types and other in known}
        - {name}
        for name, path in known.items()
        # A package that exports names of its own files makes no circle by itself.
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


def imports_of_the_top_package(package: Path = PACKAGE) -> list[str]:
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


def test_nothing_inside_the_package_imports_the_top_package() -> None:
    assert imports_of_the_top_package() == []


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("from gteopt.errors import InputError\n", file_circles),
        ("def late():\n    from gteopt.errors import InputError\n", file_circles),
        ("from gteopt import __version__\n", imports_of_the_top_package),
        ("import gteopt\n", imports_of_the_top_package),
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


MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 600, 60, 6
PUBLIC = {
    "build.quantize.quantize",
    "commands.calls.bench",
    "commands.calls.evaluate",
    "commands.inspect.inspect",
    "encoder.encoder.embed",
    "encoder.loading.load",
    "encoder.sentence_interface.encode",  # its names are those of Sentence Transformers
}
"""For users of Python, keyword arguments read better than an object that holds them."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(package: Path = PACKAGE) -> Iterator[tuple[str, Function]]:
    """Each function with its dotted name, without the commands that Typer calls."""
    for name, path in files(package).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, Function) and not name.startswith("gteopt.cli."):
                yield f"{name.removeprefix('gteopt.')}.{node.name}", node


def long_functions(package: Path = PACKAGE) -> set[str]:
    """Functions that are too long without their docstring."""
    return {
        name
        for name, node in functions(package)
        if node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 - _docstring_lines(node) > MOST_FUNCTION_LINES
    }


def wide_functions(package: Path = PACKAGE) -> set[str]:
    """Functions with too many parameters; a kernel takes what its launch needs."""
    return {
        name
        for name, node in functions(package)
        if not name.startswith("kernels.")
        and len({parameter.arg for parameter in _parameters(node)} - {"self", "cls"})
        > MOST_PARAMETERS
    }


def long_files(package: Path = PACKAGE) -> set[str]:
    """Modules with too many lines."""
    return {
        name
        for name, path in files(package).items()
        if len(path.read_text(encoding="utf-8").splitlines()) > MOST_LINES
    }


def _parameters(node: Function) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def _docstring_lines(node: Function) -> int:
    first = node.body[0]
    if ast.get_docstring(node) is None or first.end_lineno is None:
        return 0
    return first.end_lineno - first.lineno + 1


def test_no_module_is_longer_than_can_be_read_in_one_sitting() -> None:
    assert long_files() == set()


def test_no_function_is_too_long() -> None:
    assert long_functions() == set()


def test_only_public_functions_have_many_parameters() -> None:
    assert wide_functions() == PUBLIC


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("def f(a, b, c, d, *, e, f, g):\n    return a\n", wide_functions),
        ("class A:\n    def f(self):\n" + "        self\n" * 60, long_functions),
        ("pass\n" * 601, long_files),
    ],
)
def test_a_size_over_the_limit_is_seen(tmp_path: Path, text: str, check: object) -> None:
    (tmp_path / "planted.py").write_text(text)
    assert callable(check)
    assert len(check(tmp_path)) == 1


def test_a_size_at_the_limit_is_allowed(tmp_path: Path) -> None:
    text = 'def f(a, b, c, d, *, e, f):\n    """One line."""\n' + "    a\n" * 59 + "pass\n" * 539
    (tmp_path / "planted.py").write_text(text)
    assert len(text.splitlines()) == 600
    assert not wide_functions(tmp_path) | long_functions(tmp_path) | long_files(tmp_path)


def test_nothing_is_pickled() -> None:
    for path in files().values():
        assert not {"pickle", "torch.load", "joblib", "dill"} & imports(path), path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path
