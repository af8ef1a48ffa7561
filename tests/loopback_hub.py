"""A model hub on the loopback interface: the endpoints that a push of huggingface_hub uses, over real HTTP."""

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

TOKEN = "hf_loopback_0123456789abcdef"


@dataclass
class Hub:
    """What was pushed: repositories by name, branches of files by path; and what shall fail, once each."""

    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str]] = field(default_factory=list)  # branch, summary
    requests: list[str] = field(default_factory=list)
    failures: list[tuple[str, int]] = field(default_factory=list)  # part of a request line, status

    def status_of(self, line: str) -> int | None:
        """The status with which a request shall fail now."""
        for failure in self.failures:
            if re.search(failure[0], line):
                self.failures.remove(failure)
                return failure[1]
        return None


@contextmanager
def loopback_hub() -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {self.path}"
        self.state.requests.append(line)
        if (status := self.state.status_of(line)) is not None:
            return self._send(status, {"error": "as asked for"})
        is_storage = self.path.startswith("/storage/")  # like a presigned address: it needs no token, and gets none
        if is_storage and "Authorization" in self.headers:
            return self._send(400, {"error": "the token was sent to the storage"})
        if not is_storage and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, line):
                return self._send(*method(self.state, body, *found.groups()))
        return self._send(404, {"error": f"no route for {line}"})

    def _send(self, status: int, data: object) -> None:
        content = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def _create(hub: Hub, body: bytes) -> tuple[int, object]:
    asked = json.loads(body)
    name = f"{asked['organization']}/{asked['name']}"
    if name in hub.repositories:
        return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
    hub.repositories[name] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
    if asked.get("visibility") == "private" or asked.get("private"):
        hub.private.add(name)
    return 200, {"url": f"{hub.url}/{name}"}


def _branch(hub: Hub, _: bytes, name: str, branch: str) -> tuple[int, object]:
    if branch in hub.repositories[name]:
        return 409, {"error": "Reference already exists"}
    hub.repositories[name][branch] = dict(hub.repositories[name]["main"])
    return 201, {}


def _validate(_: Hub, body: bytes) -> tuple[int, object]:
    is_card = json.loads(body)["content"].startswith("---\n")
    return 200, {"errors": [] if is_card else [{"message": "no metadata"}], "warnings": []}


def _preupload(hub: Hub, body: bytes, name: str, branch: str) -> tuple[int, object]:
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}
    there, answers = hub.repositories[name][branch], []
    for file in json.loads(body)["files"]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        known = there.get(file["path"])
        oid = None if known is None else hashlib.sha256(known).hexdigest() if mode == "lfs" else _git_oid(known)
        answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return 200, {"files": answers}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _batch(hub: Hub, body: bytes, _: str) -> tuple[int, object]:
    objects = []
    for asked in json.loads(body)["objects"]:
        actions = {
            "upload": {"href": f"{hub.url}/storage/{asked['oid']}"},
            "verify": {"href": f"{hub.url}/verify"},
        }
        objects.append({**asked, **({} if asked["oid"] in hub.blobs else {"actions": actions})})
    return 200, {"transfer": "basic", "objects": objects}


def _store(hub: Hub, body: bytes, oid: str) -> tuple[int, object]:
    if hashlib.sha256(body).hexdigest() != oid:
        return 400, {"error": "other bytes than those announced"}
    hub.blobs[oid] = body
    return 200, {}


def _verify(hub: Hub, body: bytes) -> tuple[int, object]:
    asked = json.loads(body)
    return (200, {}) if len(hub.blobs.get(asked["oid"], b"")) == asked["size"] else (404, {"error": "not there"})


def _commit(hub: Hub, body: bytes, name: str, branch: str) -> tuple[int, object]:
    files, summary = {}, ""
    for line in map(json.loads, body.splitlines()):
        value = line["value"]
        if line["key"] == "header":
            summary = value["summary"]
        elif line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        else:
            assert line["key"] == "lfsFile"
            files[value["path"]] = hub.blobs[value["oid"]]
    hub.repositories[name][branch].update(files)
    hub.commits.append((branch, summary))
    oid = f"{len(hub.commits):040x}"
    return 200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""}


def _info(hub: Hub, _: bytes, name: str, *__: str) -> tuple[int, object]:
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}
    return 200, {"id": name, "sha": f"{len(hub.commits):040x}", "siblings": [], "tags": [], "private": False}


ROUTES = (
    (r"POST /api/repos/create", _create),
    (r"POST /api/validate-yaml", _validate),
    (r"POST /api/models/([^/]+/[^/]+)/branch/([^/?]+)", _branch),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/([^/?]+)", _preupload),
    (r"POST /api/models/([^/]+/[^/]+)/commit/([^/?]+)", _commit),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
    (r"PUT /storage/([0-9a-f]{64})", _store),
    (r"POST /verify", _verify),
    (r"GET /api/models/([^/]+/[^/]+)(?:/revision/([^/?]+))?", _info),
)
