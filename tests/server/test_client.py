"""What the command line makes of a server's answers, and of what is no server."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from lorakit.errors import Conflict, LorakitError, NotFound, Refused, UsageError
from lorakit.server.client import Client
from tests.cli.commands import lorakit
from tests.loopback import running


class Answering:
    """A server that answers everything with one thing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.body = 200, b"{}"
        self.asked: list[tuple[str, str, str | None]] = []
        answering = self

        class Requests(BaseHTTPRequestHandler):
            def answer(self) -> None:
                answering.asked.append((self.command, self.path, self.headers["authorization"]))
                self.rfile.read(int(self.headers["content-length"] or 0))
                self.send_response(answering.status)
                self.send_header("content-length", str(len(answering.body)))
                self.end_headers()
                self.wfile.write(answering.body)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def answering() -> Iterator[Answering]:
    found = Answering()
    with running(found.server):
        yield found


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, Refused), (404, NotFound), (409, Conflict), (422, Refused), (500, LorakitError), (503, LorakitError)],
)
def test_an_error_is_the_servers_words_with_an_exit_code_of_its_kind(
    answering: Answering, status: int, kind: type[LorakitError]
) -> None:
    answering.status, answering.body = status, b'{"error": {"message": "the words", "type": "x", "code": 1}}'
    with pytest.raises(kind, match=r"^the words$") as error:
        Client(answering.url).served()
    assert type(error.value) is kind


@pytest.mark.parametrize("key", ["", "sk-wrong"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_missing_or_wrong_is_named_and_never_shown(
    answering: Answering, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, status: int, key: str
) -> None:
    answering.status, answering.body = status, b'{"error": {"message": "the API key is missing or wrong"}}'
    monkeypatch.setenv("LORAKIT_API_KEY", key)
    ended = lorakit(capsys, "ps", "--url", answering.url)
    assert ended.code == 1
    assert "LORAKIT_API_KEY" in ended.err
    assert "sk-wrong" not in ended.err + ended.out
    assert answering.asked[0][2] == (f"Bearer {key}" if key else None)
    assert "sk-wrong" not in repr(Client(answering.url, "sk-wrong"))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b"\xff", b'{"detail": "Not Found"}'])
@pytest.mark.parametrize("status", [404, 502])
def test_what_is_no_lorakit_is_said_to_be_another_server(answering: Answering, status: int, body: bytes) -> None:
    answering.status, answering.body = status, body
    with pytest.raises(LorakitError, match="not as lorakit does"):
        Client(answering.url).served()


def test_names_reach_the_server_as_one_part_of_the_path(answering: Answering) -> None:
    answering.body = b'{"data": []}'
    client = Client(f"{answering.url}/behind/a/proxy/")
    client.adapter("a/../b?c#d é")
    client.point("sql", "x/y", "step-1")
    client.unload("\udcff")
    assert [path for _, path, _ in answering.asked] == [
        "/behind/a/proxy/v1/adapters/a%2F..%2Fb%3Fc%23d%20%C3%A9", "/behind/a/proxy/v1/adapters/sql/aliases/x%2Fy",
        "/behind/a/proxy/v1/adapters/%FF",
    ]  # fmt: skip


def test_where_nobody_answers_it_says_what_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}", f"https://127.0.0.1:{port}", f"http://{'a' * 70}.localhost"):
        ended = lorakit(capsys, "ps", "--url", url)
        assert ended.code == 1
        assert "lorakit serve" in ended.err
        assert "LORAKIT_URL" in ended.err


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "127.0.0.1:8000",
        "ftp://x",
        "http://",
        "http://x:99999",
        "http://[::1",
        "http://u:secret@x",
        "file:///x",
        "http://x/é",
    ],
)
def test_an_address_that_is_none_is_a_matter_of_usage(url: str) -> None:
    with pytest.raises(UsageError) as error:
        Client(url)
    assert "secret" not in str(error.value)


def test_a_key_that_no_header_can_hold_is_refused_unseen() -> None:
    with pytest.raises(UsageError) as error:
        Client(key="secret\r\nx: y")
    assert "secret" not in str(error.value)


def test_the_verbs_import_nothing_heavy() -> None:
    program = """
import sys
from lorakit.cli.main import cli
for verb in ("ps", "load", "unload", "rollback", "alias"):
    cli.get_command(None, verb)
from lorakit.server.client import Client
heavy = {"torch", "numpy", "httpx", "rich", "starlette", "fastapi", "pydantic"} & sys.modules.keys()
sys.exit(", ".join(heavy) or 0)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
