"""A user of the hub server: a token, an environment, and what a repository holds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.hub_server import Hub

TOKEN = "hf_secretSECRETsecretSECRETsecret0001"


REPO = "me/nano-small"


@dataclasses.dataclass(frozen=True)
class User:
    """Someone at a command line, whose Hub client keeps its files in `home`."""

    hub: Hub
    home: Path
    xet: bool = False

    def start(
        self,
        *arguments: object,
        token: str | None = TOKEN,
        endpoint: str | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[str]:
        hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE")
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        env |= {
            "HF_ENDPOINT": endpoint or self.hub.endpoint,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "NO_PROXY": "127.0.0.1",
        }
        if token is not None:
            env["HF_TOKEN"] = token
        command = [sys.executable, "-m", "gteopt", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe, cwd=cwd)

    def run(self, *arguments: object, **how: Any) -> subprocess.CompletedProcess[str]:
        child = self.start(*arguments, **how)
        out, err = child.communicate(timeout=300)
        assert TOKEN not in out + err
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    def publish(self, artifact: Path, *options: object) -> Any:
        ran = self.run("publish", artifact, "--repo", REPO, *options, "--json")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
