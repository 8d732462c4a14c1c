"""Answers of `/v1/responses` that are asked for again by their id, or made after their request has ended."""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from contextlib import ExitStack

from starlette.types import Message, Receive, Scope, Send

from lorakit.server.engines.engine import Engine
from lorakit.server.requests.naming import named_answer

PATH = "/v1/responses"
_ID = re.compile(rb'"id": ?"(resp_[A-Za-z0-9_-]+)"')
_HEAD = 400  # bytes in which an answer, or the first event of a stream, says its id
_REMEMBERED = 10_000
_LOOK = 0.25  # seconds between two looks at an answer that is still made
_UNDERWAY = ("queued", "in_progress")


class StoredResponses:
    """Which revision each answer is of; those made in the background hold their revision until they are complete."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._names: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self._held: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._held:
            task.cancel()
        await asyncio.gather(*self._held, return_exceptions=True)

    def listening(self, send: Send, name: str, engine_name: str) -> tuple[Send, list[str]]:
        """Passes an answer on, and gives its id as soon as it has said it."""
        found: list[str] = []

        async def listened(message: Message) -> None:
            if not found and (match := _ID.search(message.get("body", b"")[:_HEAD])):
                found.append(match[1].decode())
                self._names[found[0]] = (name, engine_name)
                if len(self._names) > _REMEMBERED:
                    self._names.popitem(last=False)
            await send(message)

        return listened, found

    def hold(self, id: str, leaving: ExitStack) -> None:
        """Close `leaving` when the answer is complete, or was cancelled."""

        async def until_complete() -> None:
            with leaving:
                while await self._status(id) in _UNDERWAY:  # noqa: ASYNC110 - the engine has no event for it
                    await asyncio.sleep(_LOOK)

        task = asyncio.create_task(until_complete())
        self._held.add(task)
        task.add_done_callback(self._held.discard)

    async def answer(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """A question about an earlier answer; what its revision was is said where that is still known."""
        known = self._names.get(path.removeprefix(f"{PATH}/").partition("/")[0])
        await self._engine.answer(scope, receive, named_answer(send, *known) if known else send)

    async def _status(self, id: str) -> str:
        _, body = await self._engine.call("GET", f"{PATH}/{id}", None)
        try:
            status = json.loads(body)["status"]
        except (ValueError, LookupError, TypeError):
            return ""
        return str(status)
