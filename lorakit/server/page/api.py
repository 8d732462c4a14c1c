"""The public HTTP API as the page asks it, with its visitor's key."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import httpx
from starlette.types import ASGIApp

from lorakit.errors import LorakitError
from lorakit.server.page.sessions import Session
from lorakit.server.page.within import Within

PATIENCE = 10.0  # seconds that a key which asked too often is waited for
_DATA = b"data: "


class NotTold(LorakitError):
    """The API says no, in its own words; 0 is the status of what did not answer at all."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class SignedOut(NotTold):
    """The key is not, or not any more, one that counts."""


class Api:
    """Whatever it does is one request to the gateway, in this process."""

    def __init__(self, gateway: ASGIApp, session: Session) -> None:
        self._session = session
        self._client = httpx.AsyncClient(transport=Within(gateway), base_url="http://lorakit", timeout=None)

    async def get(self, path: str, **query: Any) -> dict[str, Any]:
        """Raises NotTold."""
        return _object(await self._ask("GET", path, query))

    async def change(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """Raises NotTold."""
        return _object(await self._ask(method, path, {}, body))

    async def text(self, path: str) -> str:
        """Raises NotTold."""
        return (await self._ask("GET", path, {})).text

    async def events(self, after: str = "") -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """What happens, each with its id; ends where the key ends to count.

        Raises:
            NotTold: it can't be listened to.
        """
        headers = {"Last-Event-ID": after} if after else {}
        async with self._answer("GET", "/v1/events", headers=headers) as answer:
            id = ""
            async for line in _lines(answer):
                if line.startswith(b"id: "):
                    id = line[4:].decode()
                elif line.startswith(_DATA):
                    yield id, json.loads(line[len(_DATA) :])

    @asynccontextmanager
    async def asked(self, path: str, body: dict[str, Any]) -> AsyncIterator[tuple[str, AsyncIterator[dict[str, Any]]]]:
        """The revision that answers, and its answer event by event.

        Raises:
            NotTold: it does not.
        """
        async with self._answer("POST", path, body={**body, "stream": True}) as answer:
            yield answer.headers.get("x-lorakit-revision", ""), _events_of(answer)

    async def _ask(self, method: str, path: str, query: dict[str, Any], body: Any = None) -> httpx.Response:
        async with self._answer(method, path, query=query, body=body) as answer:
            await answer.aread()
            return answer

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, *, query: dict[str, Any] | None = None, body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[httpx.Response]:  # fmt: skip
        waited = 0.0
        while True:
            request = self._client.build_request(
                method, path, params=query or None, json=body, headers={**self._authorization(), **(headers or {})}
            )
            answer = await self._client.send(request, stream=True)
            try:
                if answer.status_code == 429 and waited < PATIENCE:
                    waited += (wait := _seconds(answer))
                    if waited <= PATIENCE:
                        await asyncio.sleep(wait)
                        continue
                await _refuse_errors(answer)
                yield answer
                return
            finally:
                await answer.aclose()

    def _authorization(self) -> dict[str, str]:
        """Raises SignedOut where the visitor has left."""
        if self._session.over:
            raise SignedOut(401, "you have signed out")
        self._session.used = time.monotonic()
        return {"Authorization": f"Bearer {self._session.key}"} if self._session.key else {}


def part(name: str) -> str:
    """One part of a path, whatever is in it."""
    return quote(name, safe="", errors="surrogateescape")


async def _refuse_errors(answer: httpx.Response) -> None:
    if answer.status_code < 400:
        return
    await answer.aread()
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = f"the server answers {answer.status_code}"
    raise (SignedOut if answer.status_code == 401 else NotTold)(answer.status_code, message)


async def _events_of(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in _lines(answer):
        said = line[len(_DATA) :] if line.startswith(_DATA) else b""
        if said.startswith(b"{"):
            event = json.loads(said)
            if isinstance(event.get("error"), dict):
                raise NotTold(int(event["error"].get("code") or 0), str(event["error"].get("message")))
            yield event


async def _lines(answer: httpx.Response) -> AsyncIterator[bytes]:
    """As server-sent events have them: httpx' own end at all that Unicode calls an end, which a text may hold."""
    kept = b""
    async for piece in answer.aiter_bytes():
        *lines, kept = (kept + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")


def _object(answer: httpx.Response) -> dict[str, Any]:
    said = answer.json()
    if not isinstance(said, dict):
        raise NotTold(answer.status_code, "the server's answer can't be read")
    return said


def _seconds(answer: httpx.Response) -> float:
    said = answer.headers.get("retry-after", "1")
    return float(said) if said.isdigit() else 1.0
