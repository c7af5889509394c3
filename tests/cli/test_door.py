"""Lists, help and refusals answer at once: they compute nothing and import no large library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "sentence_transformers", "mteb", "datasets", "numpy", "scipy")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--help"], 0, "Usage"),
        (["recipes"], 0, "gptq-int4"),
        (["suites"], 0, "mini"),
        (["policies", "--csv"], 0, "balanced,"),
        (["plans", "--markdown"], 0, "| demo |"),
        (["quantize", "nano", "--bits", "4"], 2, "gptq-int4"),
        (["quantize", "nano", "-o", "x"], 2, "--out"),
        (["quantize", "--base", "nano"], 2, "MODEL"),
        (["quantize", "nano", "--dims", "64"], 2, "truncate"),
        (["bench", "gte-Qwen2-7B-instruct", "--recipe"], 2, "requires an argument"),
        (["recipes", "--csv", "--json"], 1, "exclude each other"),
        (["optimize", "nano", "--max-weights", "40"], 1, "write 40MB"),
        (["optimize", "nano", "--data", "no.csv"], 1, "no.csv does not exist"),
        (["optimize", "nano", "--texts", "t", "--data", "d"], 1, "has no labels to score"),
        (["evaluate", "nano", "--data", "pyproject.toml"], 1, "must end in .csv"),
        (["evaluate", "nano"], 1, "give --suite, --data or --texts"),
        (["quantize", "--help"], 0, "Usage"),
        (["quantize", "nano"], 2, "Missing option"),
        (["quantize", "nano", "--recipe", "int4", "--out", "x"], 1, "did you mean gptq-int4"),
        (["quantize", "nano", "--device", "gpu", "--out", "x"], 1, "unknown device 'gpu'"),
        (["inspect", "nano", "--device", "gpu"], 1, "did you mean cuda?"),
        (["evaluate", "nosuch", "--suite", "mini"], 1, "there is no folder nosuch"),
        (["evaluate", "nano", "--suite", "mimi"], 1, "did you mean mini"),
        (["bench", "./no-model"], 1, "there is no folder ./no-model"),
        (["choose", ".", "--policy", "balancd"], 1, "did you mean balanced"),
        (["run", "dmo"], 1, "did you mean demo"),
        (["verify", "no-artifact"], 1, "there is no folder no-artifact"),
    ],
)
def test_lists_help_and_refusals_import_no_large_library(
    arguments: list[str], code: int, message: str
) -> None:
    script = (
        "import sys\n"
        "from gteopt.cli.app import main\n"
        f"sys.argv = ['gteopt', *{arguments!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as stopped:\n    code = stopped.code or 0\n"
        f"print('imported:', [name for name in {HEAVY!r} if name in sys.modules])\n"
        "sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == code, ran.stderr
    assert message in ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == "imported: []"
