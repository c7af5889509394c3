"""The public names of the package: `dir`, `help`, and the cost of an import."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import gteopt

FUNCTIONS = [name for name in gteopt.__all__ if inspect.isfunction(getattr(gteopt, name))]
CLASSES = [name for name in gteopt.__all__ if inspect.isclass(getattr(gteopt, name))]


def test_dir_lists_every_public_name_and_nothing_else() -> None:
    assert dir(gteopt) == sorted(gteopt.__all__)
    assert {"load", "quantize", "truncate", "inspect", "verify"} <= set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_on_a_public_function_has_an_example_and_types(name: str) -> None:
    function = getattr(gteopt, name)
    assert "Example:" in (function.__doc__ or "")
    assert f"gteopt.{name}(" in function.__doc__
    signature = inspect.signature(function)
    assert all(
        parameter.annotation is not parameter.empty for parameter in signature.parameters.values()
    )
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_class_says_what_it_is(name: str) -> None:
    assert getattr(gteopt, name).__doc__


def test_importing_the_package_imports_no_large_library() -> None:
    script = (
        "import sys, gteopt\n"
        "dir(gteopt)\n"
        "print([n for n in ('torch', 'numpy', 'pydantic', 'mteb') if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
