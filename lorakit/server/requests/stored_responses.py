"""Answers of `/v1/responses` that are asked for again by their id, or made after their request has ended."""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from lorakit.errors import NotFound
from lorakit.server.access.rights import Rights, rights_of
from lorakit.server.engines.engine import Answering
from lorakit.server.requests.answers import error_response
from lorakit.server.requests.naming import named_answer

PATH = "/v1/responses"
_ID = re.compile(rb'"id": ?"(resp_[A-Za-z0-9_-]+)"')
_HEAD = 400  # bytes in which an answer, or the first event of a stream, says its id
_REMEMBERED = 10_000
_LOOK = 0.25  # seconds between two looks at an answer that is still made
_UNDERWAY = ("queued", "in_progress")


Spend = Callable[[str, int], None]  # a key's id, and tokens


class NoResponse(NotFound):
    """There is no such answer, or it is another's."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """Which engine has it, which revision it is of, as clients and as the engine know it, and whose key asked for
    it."""

    engine: Answering
    name: str
    engine_name: str
    key: str


def is_of_stored(path: str) -> bool:
    """Whether a path is of an answer that was given."""
    return path.startswith(f"{PATH}/") and path != f"{PATH}/render"


class StoredResponses:
    """Which revision each answer is of, and whose; those made in the background hold their revision to their end."""

    def __init__(self, engine: Answering, spend: Spend) -> None:
        self._engine = engine
        self._spend = spend
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._held: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._held:
            task.cancel()
        await asyncio.gather(*self._held, return_exceptions=True)

    def listening(self, send: Send, engine: Answering, name: str, engine_name: str, key: str) -> tuple[Send, list[str]]:
        """Passes an answer on, and gives its id as soon as it has said it."""
        found: list[str] = []

        async def listened(message: Message) -> None:
            if not found and (match := _ID.search(message.get("body", b"")[:_HEAD])):
                found.append(match[1].decode())
                self._answers[found[0]] = _Answer(engine, name, engine_name, key)
                if len(self._answers) > _REMEMBERED:
                    self._answers.popitem(last=False)
            await send(message)

        return listened, found

    def hold(self, id: str, leaving: ExitStack) -> None:
        """Close `leaving` when the answer is complete, or was cancelled."""

        async def until_complete() -> None:
            with leaving:
                while (said := await self._said(id)).get("status") in _UNDERWAY:  # noqa: ASYNC110 - there is no event
                    await asyncio.sleep(_LOOK)
            if (known := self._answers.get(id)) is not None:
                self._spend(known.key, _tokens_in(said))

        task = asyncio.create_task(until_complete())
        self._held.add(task)
        task.add_done_callback(self._held.discard)

    async def answer(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        """A question about an earlier answer; what its revision was is said where that is still known."""
        id = path.removeprefix(f"{PATH}/").partition("/")[0]
        try:
            self.refuse_others(id, rights_of(scope))
        except NoResponse as error:
            await error_response(404, "NotFoundError", str(error))(scope, receive, send)
            return
        known = self._answers.get(id)
        named = named_answer(send, known.name, known.engine_name) if known else send
        await self._engine_of(id).answer(scope, receive, named)

    def _engine_of(self, id: str) -> Answering:
        known = self._answers.get(id)
        return self._engine if known is None else known.engine

    def refuse_others(self, id: Any, rights: Rights) -> None:
        """Raises NoResponse where an answer was not asked for with this key, or nobody knows any more by whom."""
        if id is None or rights.is_whole:
            return
        known = self._answers.get(str(id))
        if known is None or known.key != rights.key:
            raise NoResponse(f"there is no response '{id}'")

    async def _said(self, id: str) -> dict[str, Any]:
        """What the engine says of an answer; nothing where it does not know it any more."""
        _, body = await self._engine_of(id).call("GET", f"{PATH}/{id}", None)
        try:
            said = json.loads(body)
        except ValueError:
            return {}
        return said if isinstance(said, dict) else {}


def _tokens_in(said: dict[str, Any]) -> int:
    usage = said.get("usage")
    found = usage.get("total_tokens") if isinstance(usage, dict) else None
    return found if isinstance(found, int) else 0
