"""A small Hugging Face hub on 127.0.0.1: what its HTTP interface needs for uploads and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

KINDS = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}


@dataclass
class Repository:
    """Files by path, and whether the repository is private."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)

    @property
    def head(self) -> str:
        """The last commit; what is cached of an earlier one is no longer right."""
        return hashlib.sha1(json.dumps(self.commits).encode()).hexdigest()


@dataclass
class StandIn:
    """The hub's content. Repositories are named models/owner/name. `token`: what writers must show."""

    token: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    refuse: bool = False  # takes nothing, as a hub that is out of order
    gate: threading.Event = field(default_factory=threading.Event)  # uploads wait until it is set
    waiting: threading.Event = field(default_factory=threading.Event)  # set when one has come to the gate


@contextmanager
def running_hub(token: str = "hf_right") -> Iterator[StandIn]:
    """Run a hub in a thread."""
    hub = StandIn(token)
    hub.gate.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Be silent."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _wait(self) -> None:
        self.hub.waiting.set()
        self.hub.gate.wait(30)

    def _refused(self) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if allowed and not (self.hub.refuse and self.command == "POST"):
            return False
        self._answer({"error": "You are not allowed to do that."}, 403)
        return True

    def do_POST(self) -> None:
        body, path = self._body(), unquote(urlsplit(self.path).path)
        if self._refused():
            return
        if path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/preupload/main", path):
            names = [file["path"] for file in json.loads(body)["files"]]
            mode = {True: "lfs", False: "regular"}
            files = [
                {"path": n, "uploadMode": mode[n.endswith(".safetensors")], "shouldIgnore": False}
                for n in names
            ]
            self._answer({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            self._wait()  # the file has been hashed, and is not opened yet to be sent
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/blob/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines() if line])
        else:
            self._answer({"error": f"no such address: {path}"}, 404)

    def _create(self, wanted: dict[str, object]) -> None:
        kind = f"{wanted.get('type', 'model')}s"
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{KINDS[kind]}{name}", "name": name}
        if f"{kind}/{name}" in self.hub.repositories:
            self._answer({"error": "You already created this repository"} | url, 409)
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[f"{kind}/{name}"] = Repository(bool(private))
        self._answer(url)

    def _commit(self, repository: str, lines: list[dict[str, dict[str, str]]]) -> None:
        self._wait()
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                added[value["path"]] = self.hub.blobs[value["oid"]]
        found = self.hub.repositories[repository]
        found.files |= added
        found.commits.append(sorted(added))
        url = f"{self.hub.url}/{repository.partition('/')[2]}/commit/{found.head}"
        self._answer({"commitUrl": url, "commitOid": found.head, "success": True, "hookOutput": ""})

    def do_PUT(self) -> None:
        body = self._body()
        name = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == name
        self.hub.blobs[name] = body
        self._answer({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self._refused():
            return
        if match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(/revision/.+)?", path):
            self._info(match[1])
        elif match := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tree/([^/]+)(/.*)?", path):
            files = self.hub.repositories[match[1]].files
            self._answer(
                [{"type": "file", "path": n, "size": len(f), "oid": _oid(f)} for n, f in files.items()]
            )
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            found = self.hub.repositories.get(f"models/{match[1]}")
            if found is None or match[2] not in found.files:
                self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
                return
            content = found.files[match[2]]
            self._answer(content, ETag=f'"{_oid(content)}"', X_Repo_Commit=found.head)
        else:
            self._answer({"error": f"no such address: {path}"}, 404)

    def _info(self, repository: str) -> None:
        found = self.hub.repositories.get(repository)
        if found is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        siblings = [{"rfilename": name} for name in found.files]
        name = repository.partition("/")[2]
        self._answer(
            {"id": name, "sha": found.head, "private": found.private, "siblings": siblings, "tags": []}
        )


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
