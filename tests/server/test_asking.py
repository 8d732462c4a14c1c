"""What may happen to a request for a model on its way: limits, forms, templates, an engine that ends."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import Served, put_checkpoint, serving

pytestmark = pytest.mark.anyio


def answering(served: Served) -> bool:
    return bool(served.engine.asked)


async def test_an_answer_waits_for_a_client_that_reads_slowly(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        may_go_on, sent = asyncio.Event(), []
        body = iter([{"type": "http.request", "body": b'{"model": "numbers", "stream": true}'}])

        async def receive() -> Any:
            if message := next(body, None):
                return message
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 2:
                await may_go_on.wait()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        asked = asyncio.create_task(served.gateway(scope, receive, send))
        await served.until(lambda: len(sent) == 2)
        await asyncio.sleep(0.05)
        assert len(sent) == 2
        may_go_on.set()
        await asked
        assert len(sent) == 6


FILE_WORK = ("open", "os.listdir", "os.scandir", "os.remove", "sqlite3.connect")


async def test_no_file_is_touched_on_the_event_loop(tmp_path: Path, numbers: Path) -> None:
    folder = put_checkpoint(tmp_path / "runs" / "sql", 500)
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    touched: list[Any] = []
    watching, loop_thread = False, threading.get_ident()

    def hook(event: str, arguments: Any) -> None:
        if watching and event in FILE_WORK and threading.get_ident() == loop_thread:
            touched.append((event, arguments))

    sys.addaudithook(hook)
    async with serving(tmp_path, numbers) as served:
        await served.ask("sql")
        watching = True
        for model in ("sql", "sql@latest", "numbers", "nobody"):
            await served.client.post("/v1/chat/completions", json={"model": model, "messages": []})
            await served.ask(model, stream=True)
        assert served.engine.asked[1]["chat_template"] == "{{ 1 }}"
        watching = False
    assert touched == []


async def refused(served: Served, status: int, cure: str, **more: Any) -> httpx.Response:
    answer = await served.ask("sql", **more)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == status
    assert cure in error["message"]
    return answer


@pytest.mark.parametrize("limit", ["max_requests", "max_requests_per_key", "max_requests_per_adapter"])
async def test_what_goes_beyond_a_limit_is_429_and_says_which(tmp_path: Path, numbers: Path, limit: str) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    put_checkpoint(tmp_path / "runs" / "chat", 500, seed=3)
    limits: dict[str, Any] = {limit: 1}
    async with serving(tmp_path, numbers, **limits) as served:
        held = asyncio.create_task(served.ask("sql@latest", hold="x"))
        await served.until(lambda: answering(served))
        answer = await refused(served, 429, f"--{limit.replace('_', '-')}")
        assert int(answer.headers["retry-after"]) > 0
        other_key = {"Authorization": "Bearer other"}
        others = await served.client.post("/v1/completions", json={"model": "chat"}, headers=other_key)
        assert others.status_code == (429 if limit == "max_requests" else 200)
        served.engine.gate("x").set()
        assert (await held).status_code == 200
        assert (await served.ask("sql")).status_code == 200


async def test_a_body_beyond_the_limit_is_413_and_says_which(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers, max_body=1) as served:
        assert (await served.ask("numbers", prompt="a" * (2**20 - 100))).status_code == 200
        answer = await served.ask("numbers", prompt="a" * 2**20)
        assert answer.status_code == 413
        assert "--max-body" in answer.json()["error"]["message"]


async def test_an_engine_that_ends_while_it_answers_is_503_and_not_500(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:

        async def dies(scope: Any, receive: Any, send: Any) -> None:
            served.engine.dead = True
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"EngineDeadError", "more_body": False})

        served.engine.answer = dies  # type: ignore[method-assign]
        answer = await served.ask("numbers")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) > 0


# what else names a model


async def test_a_form_names_its_model_and_reaches_the_engine_as_it_was_but_for_that(
    tmp_path: Path, numbers: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 500)
    async with serving(tmp_path, numbers) as served:

        async def say(model: str | None) -> httpx.Response:
            form = {"language": "en"} if model is None else {"model": model, "language": "en"}
            files = {"file": ("a.wav", b"\0\1--\r\n\r\n", "audio/wav")}
            return await served.client.post("/v1/audio/transcriptions", data=form, files=files)

        answer = await say("sql")
        revision = answer.headers["x-lorakit-revision"]
        body = served.engine.asked[-1]["body"]
        assert f'name="model"\r\n\r\n{revision}\r\n'.encode() in body
        assert b"\0\1--\r\n\r\n" in body
        assert (await say("/etc")).status_code == 404
        assert (await say(None)).headers["x-lorakit-revision"] == "numbers"


async def test_a_websocket_reaches_the_engine_only_while_that_answers(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        reached, sent = [], []

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            reached.append(scope["path"])

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        served.gateway._inner = inner
        scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
        await served.gateway(scope, receive, send)
        assert (reached, sent) == (["/v1/realtime"], [])
        served.engine.dead = True
        await served.gateway(scope, receive, send)
        assert len(reached) == 1
        assert [(message["type"], message["code"]) for message in sent] == [("websocket.close", 1013)]


# chat templates


async def test_a_chat_with_an_adapter_uses_its_own_template_and_with_others_the_bases(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 500)
    folder = put_checkpoint(run, 1000)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    async with serving(tmp_path, numbers) as served:
        for model, template in (("sql", "{{ messages[0].content }}"), ("sql@step-500", None), ("numbers", None)):
            asked = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
            answer = await served.client.post("/v1/chat/completions", json=asked)
            assert answer.status_code == 200
            assert served.engine.asked[-1].get("chat_template") == template
        await served.ask("sql")
        assert "chat_template" not in served.engine.asked[-1]


@pytest.mark.parametrize("brought", [{"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "x"}}])
async def test_a_template_that_a_client_brings_is_refused_unless_clients_are_trusted(
    tmp_path: Path, numbers: Path, brought: dict[str, Any]
) -> None:
    asked = {"model": "numbers", "messages": [], **brought}
    async with serving(tmp_path, numbers) as served:
        answer = await served.client.post("/v1/chat/completions", json=asked)
        assert answer.status_code == 400
        assert "--trust-request-chat-template" in answer.json()["error"]["message"]
        assert (await served.ask("numbers", chat_template=None, chat_template_kwargs={"a": 1})).status_code == 200
    async with serving(tmp_path, numbers, trust_request_chat_template=True) as served:
        assert (await served.client.post("/v1/chat/completions", json=asked)).status_code == 200
