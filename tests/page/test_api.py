"""The page as a client of the HTTP API: with its visitor's key, in the API's own words."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from lorakit.server.page import api
from lorakit.server.page.api import Api, NotTold, SignedOut, part
from lorakit.server.page.sessions import Session

pytestmark = pytest.mark.anyio

Answer = tuple[int, dict[str, str], bytes]


class Server:
    """Gives one answer after another, and remembers what it was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = (await receive())["body"]
        self.asked.append({"method": scope["method"], "path": scope["path"], "headers": headers, "body": body})
        status, more, said = self.answers.pop(0)
        told = [(name.encode(), value.encode()) for name, value in more.items()]
        await send({"type": "http.response.start", "status": status, "headers": told})
        await send({"type": "http.response.body", "body": said})


def said(status: int, value: Any, **headers: str) -> Answer:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(value).encode()


def error(status: int, message: str, **headers: str) -> Answer:
    return said(status, {"error": {"message": message, "code": status}}, **headers)


async def test_the_visitors_key_goes_into_the_header_and_nowhere_else() -> None:
    server = Server(said(200, {"id": "sql"}), said(200, {}))
    client = Api(server, Session("lk-secret", wanted=True))
    assert await client.get("/v1/adapters/sql", revisions=2) == {"id": "sql"}
    await client.change("PUT", f"/v1/adapters/{part('a/b')}/aliases/prod", {"revision": "latest"})
    assert [one["headers"]["authorization"] for one in server.asked] == ["Bearer lk-secret"] * 2
    assert not any("lk-secret" in str(one["path"]) + str(one["body"]) for one in server.asked)
    assert server.asked[1]["body"] == b'{"revision":"latest"}'
    assert "authorization" not in (await keyless()).asked[0]["headers"]


async def keyless() -> Server:
    server = Server(said(200, {}))
    await Api(server, Session()).get("/v1/key")
    return server


async def test_errors_are_told_in_the_servers_words() -> None:
    client = Api(Server(error(404, "there is no adapter 'x'"), (500, {}, b"<html>"), said(200, [1])), Session())
    with pytest.raises(NotTold, match="there is no adapter 'x'") as found:
        await client.get("/v1/adapters/x")
    assert found.value.status == 404
    with pytest.raises(NotTold, match="the server answers 500"):
        await client.get("/")
    with pytest.raises(NotTold, match="can't be read"):
        await client.get("/")


async def test_a_key_that_does_not_count_and_a_visitor_who_left_are_signed_out() -> None:
    session = Session("lk-secret", wanted=True)
    client = Api(Server(error(401, "the API key is missing or wrong")), session)
    with pytest.raises(SignedOut):
        await client.get("/v1/key")
    session.key = ""
    with pytest.raises(SignedOut):
        await client.get("/v1/key")


async def test_a_key_that_asked_too_often_is_waited_for_as_long_as_the_server_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    often = error(429, "this key may send 1/s requests", retry_after="2")
    client = Api(Server(often, often, said(200, {"id": 1})), Session("k", wanted=True))
    assert await client.get("/") == {"id": 1}
    assert slept == [2.0, 2.0]
    with pytest.raises(NotTold, match="may send 1/s"):
        await Api(Server(*[often] * 20), Session("k", wanted=True)).get("/")
    assert sum(slept[2:]) <= api.PATIENCE


async def test_what_happens_is_told_with_its_number_and_taken_up_again() -> None:
    stream = (
        b'id: 7\nevent: alias\ndata: {"type":"alias"}\n\n: still here\n\nid: 9\nevent: gone\ndata: {"type":"gone"}\n\n'
    )
    server = Server((200, {"content-type": "text/event-stream"}, stream))
    told = [one async for one in Api(server, Session()).events("5")]
    assert told == [("7", {"type": "alias"}), ("9", {"type": "gone"})]
    assert server.asked[0]["headers"]["last-event-id"] == "5"


async def test_an_answer_comes_event_by_event_and_an_error_in_it_is_one() -> None:
    """A text may hold what Unicode calls the end of a line, and no server writes otherwise."""
    said = {"choices": [{"text": "a\u2028b\x85"}]}
    stream = f"data: {json.dumps(said, ensure_ascii=False)}\r\n\r\n"
    stream += 'data: {"error":{"message":"it broke","code":500}}\n\ndata: [DONE]\n\n'
    server = Server((200, {"x-lorakit-revision": "sql@step-1-aa"}, stream.encode()))
    async with Api(server, Session()).asked("/v1/completions", {"model": "sql"}) as (revision, events):
        assert revision == "sql@step-1-aa"
        assert await anext(events) == said
        with pytest.raises(NotTold, match="it broke"):
            await anext(events)
    assert json.loads(server.asked[0]["body"]) == {"model": "sql", "stream": True}
