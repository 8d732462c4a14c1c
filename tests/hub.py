"""A small hub on loopback: repositories in folders, with the routes that huggingface_hub reads and writes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`slow` names files, each with the seconds that its download takes; `gone` those that fail; `log` is what was
    asked for: (time, method, file, range)."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.slow: dict[str, float] = {}
        self.gone: set[str] = set()
        self.log: list[tuple[float, str, str, str]] = []
        self.tokens: set[str] = set()
        self.ranges = True
        self.refuses = False
        self.made: list[dict[str, Any]] = []
        self.pushed: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> dict[str, float]:
        """When each file was first asked for as a whole."""
        first: dict[str, float] = {}
        for moment, method, file, wanted in self.log:
            if method == "GET" and not wanted:
                first.setdefault(file, moment)
        return first

    def point_there(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make huggingface_hub in this process use this hub, and an empty cache."""
        from huggingface_hub import constants, file_download

        for name, value in {
            "ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_CO_URL_TEMPLATE"):
            if hasattr(file_download, name):
                monkeypatch.setattr(file_download, name, getattr(constants, name))
        from huggingface_hub import hf_api

        monkeypatch.setattr(hf_api.api, "endpoint", self.url)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Makes repositories and takes commits, all files as they are: no LFS."""
        self.hub.tokens.add(self.headers.get("authorization", ""))
        sent = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = unquote(self.path.partition("?")[0])
        if self.hub.refuses:
            return self._json(403, {"error": "you may not write there"}, X_Error_Message="you may not write there")
        if path == "/api/repos/create":
            made = json.loads(sent)
            self.hub.made.append(made)
            name = f"{made.get('organization') or 'me'}/{made['name']}"
            return self._json(200, {"url": f"{self.hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._json(200, {"errors": [], "warnings": []})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if match is None:
            return self._json(404, {})
        if match[2] == "preupload":
            files = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in
                     json.loads(sent)["files"]]  # fmt: skip
            return self._json(200, {"files": files})
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                self.hub.pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._json(200, {"commitUrl": f"{self.hub.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT})

    def _json(self, status: int, value: Any, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, *, body: bool) -> None:
        self.hub.tokens.add(self.headers.get("authorization", ""))
        path = unquote(self.path.partition("?")[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+|/tree/.+)?", path):
            return self._about(match[1], match[2] or "")
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        file = self.hub.repositories.get(match[1], Path("/none")) / match[3] if match else Path("/none")
        if not file.is_file():
            return self._json(404, {}, X_Error_Code="EntryNotFound")
        return self._file(file, body)

    def _about(self, name: str, rest: str) -> None:
        folder = self.hub.repositories.get(name)
        if folder is None:
            return self._json(404, {}, X_Error_Code="RepoNotFound")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        if rest.startswith("/tree"):
            return self._json(200, [
                {"type": "file", "path": str(file.relative_to(folder)), "size": file.stat().st_size, "oid": "0" * 40}
                for file in files
            ])  # fmt: skip
        siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
        return self._json(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [],
                                "downloads": 0, "likes": 0})  # fmt: skip

    def _file(self, file: Path, body: bool) -> None:
        wanted = self.headers.get("range", "") if self.hub.ranges else ""
        self.hub.log.append((time.monotonic(), self.command, file.name, wanted))
        data = file.read_bytes()
        size, first, last = len(data), 0, len(data) - 1
        if wanted:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(size - 1, int(end) if end else size - 1)
        elif body and file.name in self.hub.gone:
            return self._json(500, {})
        elif body:
            time.sleep(self.hub.slow.get(file.name, 0))
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            try:
                self.wfile.write(data[first : last + 1])
            except OSError:  # the client has seen enough
                self.close_connection = True
        return None
