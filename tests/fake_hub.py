"""A hub on this machine: as much of its HTTP interface as pushing and pulling a package uses."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class FakeHub:
    """Repositories by name, each the files of its only branch."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)  # paths that each one touched
    large: set[str] = field(default_factory=lambda: {"model.safetensors"})  # told by SHA-256
    refuse: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)  # by path part
    tokens: set[str] = field(default_factory=set)  # that were shown

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Return status, content (bytes, or what becomes JSON) and headers."""
        for part, (status, headers) in self.refuse.items():
            if part in path:
                return status, {"error": headers.get("X-Error-Message", "no")}, headers
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repos[name] = {".gitattributes": b"* text"}
            self.private[name] = asked.get("visibility") == "private" or asked.get("private")
            return 200, {"url": f"{self.url}/{name}"}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        words = path.removeprefix("/api/models").strip("/").split("/")
        name, rest = "/".join(words[:2]), [unquote(word) for word in words[2:]]
        if name not in self.repos:
            return 404, {}, {"X-Error-Code": "RepoNotFound"}
        return self._of_repo(name, rest, body)

    def _of_repo(self, name: str, rest: list[str], body: bytes) -> tuple[int, Any, dict[str, str]]:
        files, verb = self.repos[name], rest[0] if rest else "revision"
        if verb == "revision":
            if rest[1:] not in ([], ["main"], [self.sha(name)]):
                return 404, {}, {"X-Error-Code": "RevisionNotFound"}
            return 200, {"id": name, "sha": self.sha(name), "private": True, "siblings": []}, {}
        if verb == "tree":
            return 200, [self._entry(path, data) for path, data in files.items()], {}
        if verb == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            return 200, [self._entry(path, files[path]) for path in asked if path in files], {}
        if verb == "preupload":
            asked = [item["path"] for item in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": path} | how for path in asked]}, {}
        if verb == "resolve":
            data = files.get("/".join(rest[2:]))
            return (404, {}, {"X-Error-Code": "EntryNotFound"}) if data is None else (200, data, {})
        return self._commit(name, body)

    def _commit(self, name: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        items = [json.loads(line) for line in body.splitlines()]
        header = next(item["value"] for item in items if item["key"] == "header")
        if header.get("parentCommit") not in (None, self.sha(name)):
            return 412, {"error": "another commit was there"}, {}
        files, touched = dict(self.repos[name]), []
        for item in items:
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                touched.append(item["value"]["path"])
            elif item["key"] == "deletedFile":
                del files[item["value"]["path"]]
                touched.append(item["value"]["path"])
        self.repos[name] = files
        self.commits.append(touched)
        sha = self.sha(name)
        url = f"{self.url}/{name}/commit/{sha}"
        return 200, {"success": True, "commitOid": sha, "commitUrl": url}, {}

    def sha(self, name: str) -> str:
        """Return the commit of a repository: a digest of all that is in it."""
        content = [(path, data.hex()) for path, data in sorted(self.repos[name].items())]
        return hashlib.sha1(repr(content).encode()).hexdigest()

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if path in self.large:
            sha256 = hashlib.sha256(data).hexdigest()
            entry |= {"oid": "0" * 40}
            entry |= {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}}
        return entry


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a hub until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else self._chunked()
            hub.tokens.add(self.headers.get("Authorization", ""))
            status, content, headers = hub.answer(self.command, urlsplit(self.path).path, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815

        def _chunked(self) -> bytes:
            data = b""
            if self.headers.get("Transfer-Encoding", "") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            return data

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
