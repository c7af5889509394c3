"""The command line: what a user types, sees, and gets when something is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import Progress

import gteopt
from gteopt.cli.app import main
from gteopt.cli.progress_bars import ProgressSteps
from gteopt.config.recipe import Calibration, LayerScheme, load_recipe
from gteopt.encoder.encoder import Encoder
from gteopt.errors import InputError
from gteopt.model.artifact import read_manifest
from gteopt.report.terminal import layers_table

COMMANDS = [
    "optimize", "run", "quantize", "truncate", "bench", "evaluate", "choose", "report", "compare",
    "verify", "publish", "pull", "inspect", "recipes", "suites", "policies", "plans", "init",
    "embed", "search",
]  # fmt: skip


class Ran:
    """Exit code and output of one call of the console script's function."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Call = Callable[..., Ran]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Call `main` with these arguments, as the console script does."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["gteopt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return Ran(int(stopped.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "int8"
    calibration = Calibration(n_texts=24, max_tokens=32)
    gteopt.quantize(
        "nano", load_recipe("int8").model_copy(update={"calibration": calibration}), out
    )
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_a_worked_example(call: Call, command: str) -> None:
    ran = call(command, "--help")
    assert ran.code == 0
    shown = " ".join(ran.out.replace("│", " ").split())
    assert f"Example: gteopt {command}" in shown
    # The help is rendered as markup. A name that markup swallowed leaves '//' or ' or / '.
    assert not re.search(r"(?<!:)//| or / ", shown)
    assert "--json" in ran.out


def test_the_top_level_help_lists_every_command(call: Call) -> None:
    ran = call("--help")
    assert ran.code == 0
    assert all(f" {command} " in ran.out for command in COMMANDS)


def test_recipes_and_suites_list_what_ships(call: Call) -> None:
    names = {row["name"] for row in json.loads(call("recipes", "--json").out)}
    assert {"bf16", "int8", "gptq-int4", "gptq-int4-slice128-binary"} <= names
    assert {row["name"] for row in json.loads(call("suites", "--json").out)} >= {"mini", "stsb"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "nano", "--recipe", "gptq-int5", "--out", "x"], "did you mean gptq-int"),
        (["quantize", "nan", "--recipe", "int8", "--out", "x"], "did you mean nano"),
        (["evaluate", "nano", "--suite", "mimi"], "did you mean mini"),
        (["evaluate", "nano", "--suite", "mini", "--devices", "cpu,gpu"], "name each GPU once"),
        (["quantize", "nano", "--out", "x", "--devices", "cpu,cuda:0"], "name each GPU once"),
        (["evaluate", "nano", "--suite", "mini", "--devices", "cpu", "--ray", "auto"], "one of th"),
        (["evaluate", "nano", "--suite", "mini", "--dtype", "float23"], "did you mean float32"),
        (
            ["evaluate", "nano", "--suite", "mini", "--out", __file__],
            "is a file; give a folder for results",
        ),
        (["evaluate", "nano", "--texts", "t", "--out", "x"], "t does not exist"),
        (["evaluate", "nano", "--texts", "t", "--suite", "mini"], "leave out --data and --suite"),
        (
            ["evaluate", "nano", "--suite", "mini", "--instruction", "i"],
            "--instruction needs --data",
        ),
        (["run", "dmo"], "did you mean demo"),
        (["run", "no/such/plan.yaml"], "no/such/plan.yaml does not exist"),
        (["bench", "nano", "--workload", "0x8"], "--workload 0x8: write TEXTSxTOKENS"),
        (["bench", "nano", "--workload", "lng"], "or a set: short, long"),
        (["bench", "nano", "--recipe", "nf4"], "--recipe and --layers need --dummy-weights"),
        (["publish", ".", "--repo", "a/b", "--out", "y"], "--out needs --dry-run"),
        (["export", "nano", "x"], "nano is not an artifact"),
        (["choose", ".", "--policy", "balanced"], "is not a results folder"),
        (["verify", "."], "is not an artifact"),
        (["inspect", "nano", "--hub-dir", "/nonexistent"], ""),
    ],
)
def test_a_wrong_name_gives_one_message_and_exit_code_1(
    call: Call, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = call(*arguments)
    if not message:  # the embedded model needs no hub directory
        assert ran.code == 0
        return
    assert ran.code == 1
    assert message in ran.err
    assert ran.err.startswith("gteopt: ")
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_folder_is_reported_as_a_missing_folder_and_not_as_a_hub_error(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ran = call("evaluate", "v/int8", "--baseline", "nano", "--suite", "mini")
    assert ran.code == 1
    assert "there is no folder v/int8" in ran.err
    assert "sent twice" not in ran.err


def test_without_a_terminal_there_is_a_line_a_minute_and_one_at_the_end() -> None:
    times = iter([0.0, 20.0, 61.0, 100.0, 122.0, 150.0, 160.0])
    written = io.StringIO()
    console = Console(file=written, width=40)
    steps = ProgressSteps(Progress(console=console), clock=lambda: next(times))
    for done in (0, 300, 400, 610, 800):  # the first step reads the clock twice
        steps("variant: task (1 of 2)", done, 1000)
    steps.close()
    assert written.getvalue().splitlines() == [
        "variant: task (1 of 2)  300/1,000 at 4.9/s, about 2 min left",
        "variant: task (1 of 2)  610/1,000 at 5.0/s, about 78 s left",
        "variant: task (1 of 2)  1,000 at 6.2/s, 160.0 s",
    ]


def test_errors_of_a_python_call_are_worded_like_errors_in_a_file(
    artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        gteopt.truncate(artifact, tmp_path / "x", dims=0, method="svd", vectors="int9")  # type: ignore[arg-type]
    assert str(caught.value).splitlines()[1:] == [
        "  - dims.n: Input should be greater than or equal to 1 (found 0)",
        "  - dims.method: Input should be 'slice', 'pca' or 'auto' (found 'svd')",
        "  - vectors.code: Input should be 'auto', 'float32', 'int8', 'int4', 'binary', "
        "'rabitq' or 'pq' (found 'int9'); did you mean int8 or int4?",
    ]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path, begun: bool) -> None:
    """The message does not say that finished work is kept, because none is."""
    as_nobody = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if as_nobody and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere; needs setpriv to give that up")
    place = tmp_path / "closed"
    (place / ".out.partial" if begun else place).mkdir(parents=True)
    closed = place / ".out.partial" if begun else place
    closed.chmod(0o555)
    command = [*as_nobody, sys.executable, "-m", "gteopt", "quantize", "nano"]
    command += ["--recipe", "rtn-int4", "--out", str(place / "out")]
    child = subprocess.run(command, capture_output=True, text=True)
    if closed.exists():
        closed.chmod(0o755)
    assert child.returncode == 1
    line = child.stderr.splitlines()[-1]
    if begun:
        assert line.startswith("gteopt: Permission denied")
    else:
        why = f"no folder can be made in {place} (Permission denied)"
        assert line.startswith(f"gteopt: --out {place / 'out'}: {why}")
    assert str(place) in line
    assert "finished work is kept" not in child.stderr
    assert "Traceback" not in child.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["truncate", "x", "--dims", "0", "--out", "y"],
        ["truncate", "x", "--dims", "-5", "--out", "y"],
        ["truncate", "x", "--rescore", "0", "--out", "y"],
        ["bench", "nano", "--queries", "3"],
        ["bench", "nano", "--repeats", "0"],
        ["bench", "nano", "--query-tokens", "0"],
        ["bench", "nano", "--price-per-hour", "-3"],
        ["bench", "nano", "--price-per-hour", "inf"],
        ["bench", "nano", "--layers", "0"],
        ["quantize", "nano", "--activation-gb", "inf", "--out", "y"],
        ["inspect", "nano", "--activation-gb", "-1"],
        ["evaluate", "nano", "--suite", "mini", "--cache-gb", "inf"],
        ["quantize", "nano"],
        ["frobnicate"],
        ["truncate", "x", "--dims", "many", "--out", "y"],
        ["truncate", "x", "--method", "svd", "--out", "y"],
    ],
)
def test_wrong_usage_is_exit_code_2(call: Call, arguments: list[str]) -> None:
    ran = call(*arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gteopt", "--debug", "verify", "."])
    with pytest.raises(gteopt.errors.InputError):
        main()


def test_inspect_predicts_the_size_that_the_build_then_has(call: Call, artifact: Path) -> None:
    description = json.loads(call("inspect", "nano", "--json").out)
    assert (description["attention"], description["pooling"]) == ("bidirectional", "lasttoken")
    assert description["end_token"] == "<|endoftext|>"
    assert description["matryoshka_dims"] == [256, 128, 64, 32]
    estimates = {estimate["recipe"]: estimate for estimate in description["estimates"]}
    built = gteopt.load(artifact).weight_bytes
    # The kernel also keeps 4 bytes for each output feature: sums for token zero points.
    assert estimates["int8"]["weight_bytes"] == pytest.approx(built, rel=0.006)
    plain = gteopt.load("nano").weight_bytes
    assert estimates["bf16"]["weight_bytes"] == pytest.approx(plain, rel=1e-6)
    assert estimates["gptq-int4"]["build_bytes"] > estimates["rtn-int4"]["build_bytes"] > plain


def test_inspect_shows_a_base_and_an_artifact_in_words(call: Call, artifact: Path) -> None:
    base, variant = call("inspect", "nano"), call("inspect", artifact, "--layers")
    assert (base.code, variant.code) == (0, 0)
    assert "bidirectional" in base.out
    assert "Instruct: {instruction}" in base.out
    assert "gptq-int4-slice128-binary" in "".join(base.out.split())
    assert "layers.0.self_attn.q_proj" in variant.out
    assert "lookup table" in variant.out
    assert "28 torch.linear" in base.out
    description = json.loads(call("inspect", artifact, "--json").out)
    assert description["kernels"] == gteopt.load(artifact).kernels
    assert "made of" in variant.out
    short = call("inspect", artifact).out
    assert len(short.splitlines()) <= 16
    assert f"Next: gteopt inspect {artifact} --layers" in short


def test_inspect_cuts_no_layers_name_and_says_which_numbers_it_has(artifact: Path) -> None:
    """Names stay whole in 80 columns, because BERT's names differ only at their ends."""
    manifest = read_manifest(artifact)
    nf4 = LayerScheme(bits=4, group_size=64, symmetric=True, number_format="nf4")
    layers = tuple(
        layer.model_copy(update={"name": f"encoder.layer.10.attention.part_{i}", "scheme": nf4})
        for i, layer in enumerate(manifest.layers)
    )
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(layers_table(manifest.model_copy(update={"layers": layers})))
    rows = [line.split("│") for line in console.export_text().splitlines() if line[:1] == "│"]
    names = "".join(row[1].strip() for row in rows)
    assert all(layer.name in names for layer in layers)
    assert sum("nf4" in row[4] for row in rows) == len(layers)


def test_memory_that_runs_out_is_one_line_and_other_errors_keep_their_traceback(
    call: Call, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["truncate", artifact, "--dims", 32, "--method", "pca", "--out", tmp_path / "out"]
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee elsewhere")

    def fails(error: Exception) -> Callable[..., object]:
        def embed_tokens(*_: object, **_more: object) -> object:
            raise error

        return embed_tokens

    monkeypatch.setattr(Encoder, "embed_tokens", fails(full))
    ran = call(*command)
    assert ran.code == 1
    assert ran.err.splitlines() == [
        "gteopt: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.); use smaller "
        "batches or another --device"
    ]
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Encoder, "embed_tokens", fails(RuntimeError("a bug of ours")))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        call(*command)


def test_truncate_then_verify_then_a_flipped_byte(
    call: Call, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "short"
    ran = call("truncate", artifact, "--dims", 32, "--vectors", "binary", "--out", out, "--json")
    assert json.loads(ran.out)["vectors"]["bytes_per_vector"] == 4
    assert call("verify", out).code == 0
    path = out / "config.json"
    path.write_bytes(path.read_bytes().replace(b"false", b"true ", 1))
    ran = call("verify", out)
    assert ran.code == 1
    assert "config.json has changed" in ran.err


def quantize_in_child(
    out: Path, preexec_fn: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "gteopt", "quantize", "nano", "--recipe", "gptq-int4"]
    return subprocess.Popen(
        [*command, "--out", str(out)], stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn
    )


def test_ctrl_c_leaves_one_line_and_no_folder_that_looks_complete(tmp_path: Path) -> None:
    out = tmp_path / "int4"
    child = quantize_in_child(out)
    first_block = tmp_path / ".int4.partial" / "weights" / "block-000.json"
    deadline = time.monotonic() + 300
    while not first_block.exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "interrupted; finished work is kept" in err
    assert "Traceback" not in err
    assert not out.exists()
    assert first_block.exists()


@pytest.mark.parametrize(
    ("arguments", "promise"),
    [
        (("bench", "nano", "--out", "o"), "measured variants are kept"),
        (("bench", "nano"), "nothing is kept, because no --out was given"),
        (("bench", "nano", "--dummy-weights", "--out=o"), "nothing is kept"),
        (("evaluate", "nano", "--suite", "mini"), "nothing is kept, because no --out was given"),
        (("evaluate", "nano", "--suite", "mini", "--out=o"), "the same command resumes it"),
        (("run", "demo"), "the same command resumes it"),
        (("verify", "."), "gteopt: interrupted\n"),
    ],
)
def test_ctrl_c_promises_what_the_command_keeps(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], promise: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in (
        *("bench.bench_to_file", "bench.bench_dummy_to_file"),
        *("evaluate.find_common_base", "run.run"),
    ):
        monkeypatch.setattr(f"gteopt.commands.{name}", stop)
    monkeypatch.setattr("gteopt.model.artifact.verify", stop)
    ran = call(*arguments)
    assert ran.code == 130
    assert promise in ran.err


def test_prices_and_margins_that_cannot_be_are_refused(call: Call) -> None:
    for command in (("bench", "nano"), ("run", "demo"), ("serve", "nano")):
        for price in ("-1", "inf"):
            ran = call(*command, "--price-per-hour", price)
            assert ran.code == 2
            assert "--price-per-hour" in ran.err
    for margin in ("0", "1", "-0.1"):
        ran = call("evaluate", "nano", "--suite", "mini", "--margin", margin)
        assert ran.code == 1
        assert "between 0 and 1" in ran.err


def test_a_full_disk_is_named_and_leaves_no_folder_that_looks_complete(tmp_path: Path) -> None:
    """A file size limit of 200 kB makes the real write of the first block fail half way."""
    out = tmp_path / "int4"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    child = quantize_in_child(out, preexec_fn=limit)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 1
    assert "File too large" in err
    assert "Traceback" not in err
    assert not out.exists()
    assert not list((tmp_path / ".int4.partial" / "weights").glob("block-*.json"))


def test_the_console_script_is_installed_and_tells_its_version() -> None:
    script = Path(sys.executable).with_name("gteopt")
    ran = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"gteopt {gteopt.__version__}"
