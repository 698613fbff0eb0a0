"""The server: what `huggingface_hub` and `datasets` ask of the Hub, answered from a folder, and failing on demand.

The folder holds `models/<owner>/<name>/` and `datasets/<owner>/<name>/`. Each repository has one state. Its commit is a
hash of its files, `main` is that commit, and a commit that a profile pins names the same state.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".bin", ".safetensors", ".parquet", ".json.gz")
"""What the Hub keeps as large files: these are named by the sha256 of their content, others as git does it."""
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
BRANCHES = ("main", "refs/convert/parquet")
"""Other than a commit, what a revision may be: the second has the Hub's own conversion of a data set."""


class Repository:
    """One model or data set: its files, their sizes and hashes."""

    def __init__(self, folder: Path) -> None:
        self.name = f"{folder.parent.name}/{folder.name}"
        self.files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    @cached_property
    def entries(self) -> dict[str, dict[str, Any]]:
        """What the Hub says of each file, by path."""
        return {name: _entry(name, path) for name, path in self.files.items()}

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1(json.dumps(self.entries, sort_keys=True).encode()).hexdigest()

    def has(self, revision: str) -> bool:
        return revision in BRANCHES or re.fullmatch(r"[0-9a-f]{40}", revision) is not None

    def commit_of(self, revision: str) -> str:
        return self.commit if revision in BRANCHES else revision

    def tree(self, within: str, recursive: bool) -> list[dict[str, Any]]:
        """The files and folders under a folder, "" for all."""
        prefix = f"{within}/" if within else ""
        files = [entry for name, entry in self.entries.items() if name.startswith(prefix)]
        folders = {str(folder) for entry in files for folder in PurePosixPath(entry["path"]).parents} - {"."}
        found = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)] + files
        return [
            entry for entry in found
            if entry["path"].startswith(prefix) and (recursive or "/" not in entry["path"].removeprefix(prefix))
        ]  # fmt: skip


def _entry(name: str, path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def git_hash(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Hub:
    """The stand-in, at `url` while the body of `with` runs.

    requests: what was asked, such as "GET /api/models/a/b". faults: what goes wrong from now on, by the end of
    "<owner>/<name>/<file>": "busy" (503), "short" (half of the file, as if that were all), "dropped" (the connection
    breaks half way, once) or "damaged" (bytes without the announced hash).
    """

    def __init__(self, folder: Path) -> None:
        self.repositories = {
            (kind, repository.name): repository
            for kind in ("models", "datasets")
            for found in sorted((folder / kind).glob("*/*"))
            for repository in [Repository(found)]
        }
        self.requests: list[str] = []
        self.faults: dict[str, str] = {}
        self.connections: list[socket.socket] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Stop answering: connections are refused from now on, and those that clients keep open are closed."""
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def fault(self, place: str) -> str | None:
        return next((fault for end, fault in self.faults.items() if place.endswith(end)), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        """Keep quiet."""

    def _answer(self) -> None:
        asked = urlsplit(self.path)
        path = unquote(asked.path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if found := API.fullmatch(asked.path):
            if self.hub.fault(path) == "busy":
                self._send(503, b"busy")
            else:
                self._api(*(part and unquote(part) for part in found.groups()), parse_qs(asked.query), body)
        elif found := FILE.fullmatch(asked.path):
            self._file("datasets" if found[1] else "models", *map(unquote, found.groups()[1:]))
        else:
            self._send(404, b"no such page")

    def _api(
        self, kind: str, name: str, what: str | None, revision: str | None, within: str | None, query: Any, body: str
    ) -> None:
        repository = self._repository(kind, name, revision or "main")
        if repository is None:
            return
        commit = repository.commit_of(revision or "main")
        if what == "tree":
            self._json(repository.tree(within or "", query.get("recursive", ["false"])[0].lower() in ("true", "1")))
        elif what == "paths-info":
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            there = repository.tree("", recursive=True)
            self._json([entry for entry in there if entry["path"] in paths])
        else:
            self._json(_info(repository, commit))

    def _repository(self, kind: str, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            self._send(404, b"", **{"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif not repository.has(revision):
            self._send(404, b"", **{"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return None
        return repository

    def _file(self, kind: str, name: str, revision: str, path: str) -> None:
        repository = self._repository(kind, name, revision)
        if repository is None:
            return
        if self.hub.fault(f"{name}/{path}") == "busy":
            self._send(503, b"busy")
            return
        headers = {"X-Repo-Commit": repository.commit_of(revision), "Accept-Ranges": "bytes"}
        if path not in repository.files:
            self._send(404, b"", **headers, **{"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content, entry = repository.files[path].read_bytes(), repository.entries[path]
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        headers |= {"ETag": f'"{etag}"', "X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        self._content(f"{name}/{path}", content, headers)

    def _content(self, place: str, content: bytes, headers: dict[str, str]) -> None:
        """Send a file or the part of it that was asked for, with the fault that it is meant to have."""
        fault = self.hub.fault(place) if self.command == "GET" else None
        whole, begin, end = len(content), 0, len(content)
        if fault == "damaged":
            content = bytes(byte ^ 1 for byte in content)
        elif fault == "short":
            content, end = content[: whole // 2], whole // 2
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            begin, end = int(wanted[1]), min(end, int(wanted[2] or end - 1) + 1)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{whole}"
        if fault == "dropped":
            self._break_off(place, content[begin:end], headers)
        else:
            self._send(206 if wanted else 200, content[begin:end], **headers)

    def _break_off(self, place: str, content: bytes, headers: dict[str, str]) -> None:
        """Announce all of a file, send half of it and hang up; the next time the file comes whole."""
        del self.hub.faults[next(end for end in self.hub.faults if place.endswith(end))]
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _info(repository: Repository, commit: str) -> dict[str, Any]:
    return {
        "id": repository.name, "modelId": repository.name, "sha": commit, "private": False, "gated": False,
        "disabled": False, "tags": [], "downloads": 0, "likes": 0, "lastModified": "2025-01-01T00:00:00.000Z",
        "createdAt": "2025-01-01T00:00:00.000Z", "siblings": [{"rfilename": name} for name in repository.files],
    }  # fmt: skip
