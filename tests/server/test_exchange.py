"""What is told of a request when its answer has ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_engine import Served, put_checkpoint, serving

pytestmark = pytest.mark.anyio


async def play(served: Served, body: bytes, *, path: str = "/v1/completions", until: Any = None) -> list[Any]:
    """A request as an ASGI server gives it, whose client goes away when `until` is set: what was sent to it."""
    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        if message := next(messages, None):
            return message
        await (until.wait() if until is not None else asyncio.Event().wait())
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await served.gateway({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
    return sent


async def test_each_request_is_told_once_with_its_revision_and_what_it_took(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        told = served.heard()
        answer = await served.ask("sql")
        (said,) = told
        assert (said.model, said.path, said.status) == ("sql", "/v1/completions", 200)
        assert said.revision is not None
        assert said.revision.name == answer.headers["x-lorakit-revision"]
        assert said.request_id == answer.headers["x-request-id"]
        assert (said.prompt_tokens, said.completion_tokens, said.pieces) == (3, 5, 0)
        assert 0 <= said.waited <= (said.first_byte or 0) <= said.seconds


async def test_a_stream_is_told_by_its_pieces_and_a_failure_by_its_status(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        told = served.heard()
        await served.ask("sql", stream=True)
        await served.ask("sql", boom=True)
        await served.ask("nobody")
        await served.client.post("/v1/completions", content=b"{")
        await served.ask("numbers")
        assert [(said.model, said.status, said.pieces) for said in told] == [
            ("sql", 200, 3), ("sql", 400, 0), ("nobody", 404, 0), ("", 400, 0), ("numbers", 200, 0),
        ]  # fmt: skip
        assert [said.revision is not None for said in told] == [True, True, False, False, False]
        assert told[0].completion_tokens is None


async def test_a_client_that_leaves_before_its_answer_ended_is_told_as_499(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:
        told, gone = served.heard(), asyncio.Event()
        asked = asyncio.create_task(play(served, b'{"model": "sql", "hold": "x"}', until=gone))
        await served.until(lambda: bool(served.engine.asked))
        gone.set()
        await asked
        assert [said.status for said in told] == [499]
        assert served.engine.disconnected == 1
