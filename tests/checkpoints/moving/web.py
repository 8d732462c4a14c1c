"""A web server on the loopback, as good and as bad as those in the world."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "X-Amz-Signature=5ec4e7"
WORDS = ("5ec4e7", "pa55word")  # no output and no file may hold one


@dataclass
class Page:
    """What is behind a path.

    `cuts` are the bytes after which the connection breaks, of each request one; `stalls` the same, but silent.
    """

    data: bytes
    etag: str | None = '"v1"'
    modified: str | None = formatdate(1_700_000_000, usegmt=True)
    ranges: bool = True
    length: int | None = -1  # what is said: -1 the truth, None nothing (in chunks)
    cuts: list[int] = field(default_factory=list)
    stalls: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    body: bytes = b"<Error><Code>AccessDenied</Code></Error>"
    headers: dict[str, str] = field(default_factory=dict)
    encoding: str = ""
    unended: bool = False  # sent in chunks, of which the last never comes
    location: str = ""
    then: Page | None = None  # stands there after the first request


class Web:
    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.release = threading.Event()
        web = self

        class Handler(_Handler):
            pass

        Handler.web = web
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        """With a user, a password and a signature, none of which anybody else may see."""
        return f"http://user:pa55word@127.0.0.1:{self.port}/{path}?X-Amz-Expires=60&{SECRET}"

    def put(self, path: str, data: bytes, **page: Any) -> Page:
        self.pages[path] = Page(data, **page)
        return self.pages[path]

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def ranges(self) -> list[str]:
        return [headers.get("range", "") for _, headers in self.asked]


@contextlib.contextmanager
def serving() -> Iterator[Web]:
    web = Web()
    try:
        yield web
    finally:
        web.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has seen enough is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.web.asked.append((path, headers))
        page = self.web.pages.get(path)
        with contextlib.suppress(OSError):
            self._answer(page, path, headers)
        if page is not None and page.then is not None:
            self.web.pages[path] = page.then

    def _answer(self, page: Page | None, path: str, headers: dict[str, str]) -> None:
        if page is None:
            return self._short(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if page.location:
            return self._short(302, b"", Location=page.location)
        if page.statuses and (status := page.statuses.pop(0)) != 200:
            return self._short(status, page.body, **page.headers)
        data = page.data
        if page.encoding == "gzip":
            packer = zlib.compressobj(1, wbits=31)
            data = packer.compress(data) + packer.flush()
        size, start, status = len(data), 0, 200
        if "range" in headers and page.ranges:
            unmatched = headers.get("if-match", page.etag) != page.etag
            if unmatched or headers.get("if-unmodified-since", page.modified) != page.modified:
                return self._short(412, b"")
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", headers["range"])
            assert match
            start, status = int(match[1]), 206
            if start >= size:
                return self._short(416, b"", Content_Range=f"bytes */{size}")
            data = data[start : int(match[2]) + 1 if match[2] else size]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        for name, value in {"ETag": page.etag, "Last-Modified": page.modified, **page.headers}.items():
            if value is not None:
                self.send_header(name, value)
        if page.encoding:
            self.send_header("Content-Encoding", page.encoding)
        chunked = page.length is None
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(data) if page.length == -1 else page.length))
        self.end_headers()
        cut = min(page.cuts.pop(0) if page.cuts else len(data), len(data))
        stall = page.stalls.pop(0) if page.stalls else None
        for block in _pieces(data[: cut if stall is None else stall]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
        self.wfile.flush()
        if stall is not None:
            self.web.release.wait(30)
            self.close_connection = True
        elif cut < len(data) or page.length not in (-1, None) or page.unended:
            self.close_connection = True
        elif chunked:
            self.wfile.write(b"0\r\n\r\n")
        return None

    def _short(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)


def _pieces(data: bytes, size: int = 1 << 16) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
