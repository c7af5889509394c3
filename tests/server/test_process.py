"""`gteopt serve` as a process: signals, exit codes, the port, and messages to the user."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from gteopt.cli.app import app
from gteopt.commands.serve import open_token_decoder, parse_served_sources
from gteopt.errors import GteoptError, InputError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gteopt", "serve", *arguments]


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and its URL."""
    process = subprocess.Popen(
        command(*arguments, "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert process.stdout is not None
        url = None
        for line in process.stdout:
            if match := re.search(r"http://[\d.]+:\d+", line):
                url = match[0]
                break
        assert url is not None, process.stderr and process.stderr.read()
        yield process, url
    finally:
        process.kill()
        process.wait()


def test_sigterm_ends_what_is_at_work_and_exits_with_0() -> None:
    with started("nano", "--log-requests", "--max-batch-tokens", "256") as (process, url):
        bulk = {"model": "nano", "input": [f"{'word ' * 60} {i}" for i in range(150)]}

        def ask() -> httpx.Response:
            return httpx.post(f"{url}/v1/embeddings", json=bulk, timeout=300)

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(ask) for _ in range(2)]
            while "gteopt_batch_texts_count 0.0" in httpx.get(f"{url}/metrics").text:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in futures]
        assert [answer.status_code for answer in answers] == [200, 200]
        assert [len(answer.json()["data"]) for answer in answers] == [150, 150]
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    requests = [line for line in lines if line.get("route") == "/v1/embeddings"]
    assert [request["inputs"] for request in requests] == [150, 150]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez")


def test_sighup_loads_anew_and_goes_on() -> None:
    with started("small=nano") as (process, url):
        assert process.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
        reader.start()
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 300
        while not any('"reloaded"' in line for line in lines):
            assert time.monotonic() < deadline, lines
            body = {"model": "small", "input": "meanwhile"}
            assert httpx.post(f"{url}/v1/embeddings", json=body).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0
        reader.join()


def test_a_device_that_dies_ends_the_process_with_70(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import sys\n"
        "from gteopt.commands.serve import ServerRuntime, serve\n"
        "from gteopt.server.settings import ServerSettings\n"
        "def kill(url, service):\n"
        "    def die():\n"
        "        raise RuntimeError('CUDA error: unspecified launch failure')\n"
        "    service.engine.call(die)\n"
        "sys.exit(serve(['nano'], ServerRuntime(port=0), ServerSettings(), on_ready=kill))\n"
    )
    assert (
        subprocess.run([sys.executable, str(script)], env=ENVIRONMENT, timeout=300).returncode == 70
    )


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ran = subprocess.run(
            command("nano", "--port", port), capture_output=True, text=True, timeout=300
        )
    assert ran.returncode == 1
    assert f"--port {port} of 127.0.0.1: Address already in use; give another port" in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nano", "nano"], "two artifacts are named 'nano'"),
        (["small=nano", "big=no/such/folder"], "there is no folder no/such/folder; give"),
        (["nano", "--api-keys", "no/such/file"], "--api-keys no/such/file: cannot be read"),
        (["nano", "--decode-tokens", "cl100k"], "did you mean cl100k_base"),
        (["nano", "--host", "203.0.113.7", "--api-keys", __file__], "--api-keys .*\\n.*line 1:"),
    ],
)
def test_what_is_wrong_at_the_start_is_said_before_anything_is_loaded(
    arguments: list[str], says: str
) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, InputError)
    assert re.search(says, str(result.exception))


def test_an_artifact_that_is_not_there_or_damaged_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(tmp_path / "none"), "--port", "0"])
    assert isinstance(result.exception, GteoptError)
    assert "none" in str(result.exception)


def test_a_missing_extra_gives_the_line_that_installs_it(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ImportError('no', name='uvicorn')\n")
    ran = subprocess.run(
        command("nano"),
        capture_output=True,
        text=True,
        timeout=300,
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert ran.returncode == 1
    assert "pip install 'gteopt[serve]'" in ran.stderr


def test_names_of_artifacts_are_given_or_the_folder_s_own() -> None:
    assert parse_served_sources(["artifacts/demo/int8", "big=org/model"]) == {
        "int8": "artifacts/demo/int8",
        "big": "org/model",
    }
    with pytest.raises(InputError, match="write NAME=ARTIFACT"):
        parse_served_sources(["=x"])
    with pytest.raises(InputError, match="name an artifact"):
        parse_served_sources([])


def test_an_unknown_tokenizer_is_refused_with_the_near_one() -> None:
    with pytest.raises(InputError, match="did you mean o200k_base"):
        open_token_decoder("o200k")
