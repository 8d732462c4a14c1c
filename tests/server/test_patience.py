"""A limit on the time of a request."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_engine import put_checkpoint, serving

pytestmark = pytest.mark.anyio


async def test_an_answer_that_takes_too_long_is_504_and_the_engine_is_told_to_stop(
    tmp_path: Path, numbers: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers, request_timeout=0.1) as served:
        told = served.heard()
        answer = await served.ask("sql", hold="for ever")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, 504)
        assert "--request-timeout" in answer.json()["error"]["message"]
        assert served.engine.disconnected == 1
        assert [said.status for said in told] == [504]
        assert [resident.in_flight for resident in served.reconciler.residency.residents] == [0]
        assert (await served.ask("sql")).status_code == 200


async def test_a_body_that_never_ends_is_504_too(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers, request_timeout=0.05) as served:
        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        await served.gateway(scope, receive, send)
        assert sent[0]["status"] == 504


async def test_a_stream_that_takes_too_long_ends_with_an_error_of_its_own(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers, request_timeout=0.1) as served:
        begun = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send(begun)
            await send({"type": "http.response.body", "body": b'data: {"choices":[]}\n\n', "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

        served.engine.answer = slow  # type: ignore[method-assign]
        answer = await served.ask("numbers", stream=True)
        *_, last = [line for line in answer.text.split("\n\n") if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 504
