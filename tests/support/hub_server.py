"""A model hub on this machine, for tests: what huggingface_hub calls to publish and to fetch.

It speaks the real protocol over real HTTP: repositories, the pre-upload question, the LFS batch API
with direct uploads, commits as NDJSON, trees, and files with ranges. Faults can be set: a
connection cut in the middle of a file, or held open until the client is killed. Large files may
come by the Xet protocol too (`xet_storage`), which clients use unless HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.xet_storage import read_shard, read_xorb

_LARGE = ("safetensors", "tokenizer.json")
_XET_TOKEN = "xet-token-of-an-hour"


@dataclass
class Repo:
    """A repository: its commits, oldest first, each a whole tree of paths and contents."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]

    def tree(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of `main` or of a commit."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Hub:
    """The state that handlers share, and that tests set and read.

    Attributes:
        token: the one access token that is valid; it may write to `owner` only.
        repos: by name; that of a data set begins with `datasets/`.
        requests: method and path of every request.
        received: by SHA-256, bytes of file bodies that arrived, cut-off ones included.
        served: by path, bytes of file bodies that were sent.
        cut_upload: by SHA-256, after how many bytes to cut an upload; once.
        hold_upload: SHA-256 of uploads that are read and then left without an answer.
        cut_download: by path, after how many bytes to cut a download; once.
        hold_download: by path, after how many bytes to send no more; once.
        xorbs: by hash of the xorb, chunks that came by the Xet protocol.
        xet_bytes: bytes of xorbs that arrived.
        n_shards: number of Xet uploads to answer; the next one gets no answer.
        echo_token: repeat the client's token in error messages, as a careless server may.
    """

    token: str
    owner: str
    repos: dict[str, Repo] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)
    cut_upload: dict[str, int] = field(default_factory=dict)
    hold_upload: set[str] = field(default_factory=set)
    held: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    cut_download: dict[str, int] = field(default_factory=dict)
    hold_download: dict[str, int] = field(default_factory=dict)
    xorbs: dict[str, list[bytes]] = field(default_factory=dict)
    xet_bytes: int = 0
    n_shards: int = 1 << 30
    echo_token: bool = False
    endpoint: str = ""

    def forget_traffic(self) -> None:
        """Start counting anew."""
        self.requests.clear()
        self.received.clear()
        self.served.clear()
        self.xet_bytes = 0


def serve(hub: Hub) -> ThreadingHTTPServer:
    """Start a server for this hub on a free port of the loopback interface."""

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Write no log."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        try:
            if self.command == "PUT":
                self._receive(path)
            elif self.command == "POST":
                self._post(path)
            elif match := re.fullmatch(r"/api/models/(.+)/xet-write-token/main", path):
                self._check_may_write(match[1])
                url, exp = self.state.endpoint, int(time.time()) + 3600
                self._json({"accessToken": _XET_TOKEN, "exp": exp, "casUrl": url})
            elif path.startswith("/api/models/"):
                self._describe(path.removeprefix("/api/models/"))
            elif path.startswith("/api/datasets/"):
                self._describe(path.removeprefix("/api/datasets/"), "datasets/")
            else:
                self._send_file(path)
        except _Refused as refused:
            self._refuse(refused)

    def _refuse(self, refused: _Refused) -> None:
        message = refused.message
        if self.state.echo_token:
            message += f" [{self.headers.get('Authorization')}]"
        content = json.dumps({"error": message}).encode()
        self.send_response(refused.status)
        self.send_header("X-Error-Message", message)
        if refused.code is not None:
            self.send_header("X-Error-Code", refused.code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # -- permissions

    def _caller_is_known(self) -> bool:
        authorization = self.headers.get("Authorization")
        if authorization is not None and authorization != f"Bearer {self.state.token}":
            raise _Refused(401, "Invalid credentials in Authorization header")
        return authorization is not None

    def _check_may_write(self, repo: str) -> None:
        if not self._caller_is_known():
            raise _Refused(401, "Invalid username or password.")
        if repo.partition("/")[0] != self.state.owner:
            raise _Refused(403, f"You don't have the rights to write to {repo}")

    def _visible(self, name: str) -> Repo:
        known = self._caller_is_known()
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and not known):
            # Strangers get the same answer for a missing and for a private repository.
            raise _Refused(404 if known else 401, "Repository not found", "RepoNotFound")
        return repo

    def _tree(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        tree = self._visible(name).tree(revision)
        if tree is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return tree

    # -- writing

    def _post(self, path: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            text = json.loads(body)["content"]
            wrong = [] if text.startswith("---\n") else [{"message": "no metadata"}]
            self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            self._check_may_write(match[1])
            self._preupload(self.state.repos[match[1]], json.loads(body)["files"])
        elif match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._check_may_write(match[1])
            self._batch(json.loads(body))
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            self._check_may_write(match[1])
            self._commit(match[1], body)
        elif match := re.fullmatch(r"/v1/(xorb-grants|xorbs)/default/(\w+)", path):
            self._receive_xorb(match[2], body, is_question=match[1] == "xorb-grants")
        elif path == "/v1/shards":
            self._receive_shard(body)
        else:
            raise _Refused(404, f"no such call: {path}")

    def _receive_xorb(self, name: str, body: bytes, *, is_question: bool) -> None:
        assert self.headers.get("Authorization") == f"Bearer {_XET_TOKEN}"
        is_new = name not in self.state.xorbs
        if is_question:
            if is_new:
                raise _Refused(404, "send it here")
            self._json({"status": "already_exists"})
            return
        self.state.xet_bytes += len(body)
        self.state.xorbs[name] = read_xorb(body)
        self._json({"was_inserted": is_new})

    def _receive_shard(self, body: bytes) -> None:
        assert self.headers.get("Authorization") == f"Bearer {_XET_TOKEN}"
        self.state.n_shards -= 1
        if self.state.n_shards < 0:
            self.state.held.set()
            self.state.release.wait()
            self._cut()
            return
        for sha256, content in read_shard(body, self.state.xorbs):
            assert hashlib.sha256(content).hexdigest() == sha256
            self.state.storage[sha256] = content
        self._json({"result": 1})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        self._check_may_write(name)
        if name in self.state.repos:
            raise _Refused(409, "You already created this model repo")
        first = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        private = wanted.get("visibility") == "private"
        self.state.repos[name] = Repo(private, [(_commit_id(name, first), first)])
        self._json({"url": f"{self.state.endpoint}/{name}", "name": name})

    def _preupload(self, repo: Repo, files: list[dict[str, Any]]) -> None:
        answers = []
        for file in files:
            path, large = file["path"], file["path"].endswith(_LARGE)
            stored = repo.files.get(path)
            oid = None
            if stored is not None:
                oid = hashlib.sha256(stored).hexdigest() if large else _git_sha1(stored)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answers})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.state.storage:
                href = f"{self.state.endpoint}/storage/{entry['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _receive(self, path: str) -> None:
        """The upload of one large file: to a signed address, so without the token."""
        assert self.headers.get("Authorization") is None
        oid = path.removeprefix("/storage/")
        total = int(self.headers["Content-Length"])
        stop = self.state.cut_upload.pop(oid, None)
        content = b""
        while len(content) < total and (stop is None or len(content) < stop):
            part = self.rfile.read(min(1 << 16, total - len(content)))
            if not part:
                break
            content += part
            self.state.received[oid] = self.state.received.get(oid, 0) + len(part)
        held = oid in self.state.hold_upload
        if held:
            self.state.held.set()
            self.state.release.wait()
        if held or len(content) < total:
            self._cut()
            return
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, "content does not match its name")
        self.state.storage[oid] = content
        self._json({})

    def _commit(self, name: str, body: bytes) -> None:
        repo = self.state.repos[name]
        files = dict(repo.files)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                if value.get("parentCommit", repo.commits[-1][0]) != repo.commits[-1][0]:
                    raise _Refused(412, "A commit has happened since. Please refresh and try again")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.storage[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, f"unknown operation {entry['key']}")
        commit = _commit_id(repo.commits[-1][0], files)
        repo.commits.append((commit, files))
        self._json(
            {"commitUrl": f"{self.state.endpoint}/{name}/commit/{commit}", "commitOid": commit}
        )

    # -- reading

    def _describe(self, path: str, kind: str = "") -> None:
        if match := re.fullmatch(r"(.+)/tree/([^/]+)", path):
            _, files = self._tree(kind + match[1], match[2])
            self._json([_tree_entry(file, files[file]) for file in files])
            return
        match = re.fullmatch(r"([^/]+/[^/]+)(?:/revision/(.+))?", path)
        if match is None:
            raise _Refused(404, f"no such call: {path}")
        commit, files = self._tree(kind + match[1], match[2] or "main")
        private = self.state.repos[kind + match[1]].private
        siblings = [_sibling(file, files[file]) for file in files]
        self._json({"id": match[1], "sha": commit, "private": private, "siblings": siblings})

    def _send_file(self, path: str) -> None:
        match = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match is None:
            raise _Refused(404, f"no such call: {path}")
        commit, files = self._tree(match[1], match[2])
        if match[3] not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        content = files[match[3]]
        large = match[3].endswith(_LARGE)
        etag = hashlib.sha256(content).hexdigest() if large else _git_sha1(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        last = min(int(wanted[2]), len(content) - 1) if wanted and wanted[2] else len(content) - 1
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        hold = self.state.hold_download.pop(match[3], None)
        stop = self.state.cut_download.pop(match[3], None) if hold is None else hold
        part = content[first : last + 1 if stop is None else first + stop]
        self.state.served[match[3]] = self.state.served.get(match[3], 0) + len(part)
        self.wfile.write(part)
        if hold is not None:
            self.state.held.set()
            self.state.release.wait()
        if stop is not None:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may be gone already
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def _commit_id(parent: str, files: dict[str, bytes]) -> str:
    text = "".join(f"{path}{_git_sha1(files[path])}" for path in sorted(files))
    return hashlib.sha1(f"{parent}\n{text}".encode()).hexdigest()


def _pointer(content: bytes) -> bytes:
    """The pointer that git stores for a large file."""
    oid = hashlib.sha256(content).hexdigest()
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
    ).encode()


def _lfs(content: bytes) -> tuple[str, int, int]:
    return hashlib.sha256(content).hexdigest(), len(content), len(_pointer(content))


def _sibling(path: str, content: bytes) -> dict[str, Any]:
    if not path.endswith(_LARGE):
        return {"rfilename": path, "size": len(content), "blobId": _git_sha1(content)}
    oid, size, pointer = _lfs(content)
    lfs = {"sha256": oid, "size": size, "pointerSize": pointer}
    return {"rfilename": path, "size": size, "blobId": _git_sha1(_pointer(content)), "lfs": lfs}


def _tree_entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
    if not path.endswith(_LARGE):
        return entry | {"oid": _git_sha1(content)}
    oid, size, pointer = _lfs(content)
    lfs = {"oid": oid, "size": size, "pointerSize": pointer}
    return entry | {"oid": _git_sha1(_pointer(content)), "lfs": lfs}


def running(token: str, owner: str) -> Iterator[Hub]:
    """A hub that serves until the caller is done with it; the body of a fixture."""
    hub = Hub(token=token, owner=owner)
    server = serve(hub)
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
