"""Requests within the process: answers come as they are made, and whoever goes away is seen to."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from lorakit.server.page.within import Within

pytestmark = pytest.mark.anyio


def client_of(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=Within(app), base_url="http://there")


async def test_a_request_is_given_to_the_app_as_a_server_would() -> None:
    seen: dict[str, Any] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.update(scope, body=(await receive())["body"])
        await send({"type": "http.response.start", "status": 201, "headers": [(b"x-said", b"yes")]})
        await send({"type": "http.response.body", "body": b"made"})

    async with client_of(app) as client:
        answer = await client.put("/v1/a%2Fb", params={"n": "1"}, json={"a": 1}, headers={"Authorization": "Bearer k"})
    assert (answer.status_code, answer.headers["x-said"], answer.text) == (201, "yes", "made")
    assert (seen["method"], seen["path"], seen["raw_path"]) == ("PUT", "/v1/a/b", b"/v1/a%2Fb")
    assert seen["query_string"] == b"n=1"
    assert seen["body"] == b'{"a":1}'
    assert (b"authorization", b"Bearer k") in seen["headers"]


async def test_each_piece_is_there_before_the_next_one_is_made() -> None:
    go_on = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await go_on.wait()
        await send({"type": "http.response.body", "body": b"second", "more_body": False})

    async with client_of(app) as client, client.stream("GET", "/") as answer:
        pieces = answer.aiter_bytes()
        assert await anext(pieces) == b"first"
        go_on.set()
        assert await anext(pieces) == b"second"


async def test_an_app_sees_that_nobody_listens_any_more() -> None:
    left = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        left.set()

    async with client_of(app) as client:
        async with client.stream("GET", "/") as answer:
            assert await anext(answer.aiter_bytes()) == b"first"
        async with asyncio.timeout(60):
            await left.wait()


async def test_what_an_app_raises_is_raised() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("out of luck")

    async with client_of(app) as client:
        with pytest.raises(ValueError, match="out of luck"):
            await client.get("/")
