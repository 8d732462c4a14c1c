"""An engine over HTTP; what it offers is asked for at the start, not assumed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import aiohttp
from starlette.types import Message, Receive, Scope, Send
from yarl import URL

from lorakit.errors import EngineFailed
from lorakit.server.engines.engine import Limits, LoadFailed, Unreached
from lorakit.server.engines.vllm import (
    COMPLETIONS,
    LOAD,
    OF_DEVELOPERS,
    UNLOAD,
    WAYS_AROUND,
    Offered,
    adapters_inside,
    described,
    message_of,
    offered,
    take_out,
    templated_over_http,
    wrong_with_first_token,
)
from lorakit.server.requests.answers import unavailable
from lorakit.server.sight.logs import log

LOOK = 1.0  # seconds between two looks at its health
_LIST_EVERY = 10  # looks: it may have been started anew between two of them
# Of one connection, so not handed on to the other (RFC 9110, section 7.6.1), and what is said anew there.
_OWN_HEADERS = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
     b"trailer", b"transfer-encoding", b"upgrade", b"host", b"authorization", b"x-api-key", b"content-length"}
)  # fmt: skip
_OWN_ANSWERS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server"})


UNIX = "unix:"  # before the path of a socket


class Http:
    """Connections to one address: `http://HOST:PORT`, or `unix:/PATH` of a socket. `key`: what it wants as a bearer.
    `failures`: answers that did not come, or not whole, since somebody looked."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url = url.rstrip("/")
        self.failures = 0
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        # vLLM closes a connection that was idle for 5 s: one that it may be closing is not used again.
        idle = 2.0
        if self.url.startswith(UNIX):
            self._root = "http://engine"
            path = self.url.removeprefix(UNIX)
            connector: aiohttp.BaseConnector = aiohttp.UnixConnector(path, limit=0, keepalive_timeout=idle)
        else:
            self._root = self.url
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=idle)
        self._session = aiohttp.ClientSession(
            connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0), read_bufsize=2**16,
            skip_auto_headers=("user-agent", "accept-encoding", "accept"),
        )  # fmt: skip

    async def close(self) -> None:
        await self._session.close()

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Status and body; 599 with the reason where there was no answer."""
        if self._session.closed:
            return 599, json.dumps({"error": {"message": f"{self.url} was started anew"}}).encode()
        raw = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, **({} if raw is None else {"content-type": "application/json"})}
        try:
            async with self._session.request(method, URL(self._root + path), data=raw, headers=headers) as answer:
                return answer.status, await answer.read()
        except (aiohttp.ClientError, OSError) as error:
            self.failures += 1
            return 599, json.dumps({"error": {"message": f"{self.url} does not answer: {_named(error)}"}}).encode()

    async def hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request and its answer, each piece as it comes, and no faster than it is taken at the other end.

        Raises:
            Unreached: nobody listens there.
        """
        asked = asyncio.Event()
        exchange = asyncio.create_task(self._exchange(scope, _body(await receive(), receive, asked), send))
        leaving = asyncio.create_task(_left(receive, asked))
        try:
            await asyncio.wait({exchange, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                exchange.result()
        finally:  # where the client is gone first, its request ends there too: the connection is closed
            leaving.cancel()
            exchange.cancel()
            await asyncio.gather(exchange, leaving, return_exceptions=True)

    async def _exchange(self, scope: Scope, body: bytes | AsyncIterator[bytes] | None, send: Send) -> None:
        query = scope.get("query_string", b"").decode("latin-1")
        path = (scope.get("raw_path") or quote(scope["path"]).encode()).decode("latin-1")
        url = URL(f"{self._root}{path}{'?' if query else ''}{query}", encoded=True)
        headers = [(key.decode("latin-1"), value.decode("latin-1"))
                   for key, value in scope["headers"] if key not in _OWN_HEADERS]  # fmt: skip
        started = False
        if self._session.closed:
            raise Unreached(f"{self.url} was started anew, and what was asked for is gone")
        try:
            async with self._session.request(
                scope["method"], url, data=body, headers=[*headers, *self._headers.items()], allow_redirects=False
            ) as answer:
                said = [(key.lower(), value) for key, value in answer.raw_headers if key.lower() not in _OWN_ANSWERS]
                await send({"type": "http.response.start", "status": answer.status, "headers": said})
                started = True
                async for piece in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except aiohttp.ClientConnectorError as error:
            self.failures += 1
            raise Unreached(f"{self.url} does not answer: {_named(error)}") from None
        except (aiohttp.ClientError, OSError) as error:
            self.failures += 1
            if started:  # what is cut off there is cut off here, and does not look complete
                raise
            await unavailable(f"{self.url} does not answer: {_named(error)}")(scope, _nothing, send)


def _body(first: Message, receive: Receive, asked: asyncio.Event) -> bytes | AsyncIterator[bytes] | None:
    """A body that is there as it is, another as it comes; `asked` is set when it has been read."""
    if first.get("more_body", False):
        return _pieces(first, receive, asked)
    asked.set()
    return first.get("body", b"") or None


async def _pieces(first: Message, receive: Receive, asked: asyncio.Event) -> AsyncIterator[bytes]:
    message = first
    while True:
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client is gone")
        yield message.get("body", b"")
        if not message.get("more_body", False):
            break
        message = await receive()
    asked.set()


async def _left(receive: Receive, asked: asyncio.Event) -> None:
    """Until the client goes away."""
    await asked.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _nobody(_: bool) -> None:
    pass


def _named(error: BaseException) -> str:
    return str(error) or type(error).__name__


class RemoteEngine:
    """A vLLM at an address. `offers` is what it said of itself; `store` is where adapters are loaded from, which has to
    be there at the same path."""

    def __init__(self, http: Http, offers: Offered, store: Path) -> None:
        self._http = http
        self._offers = offers
        self._store = store
        self._limits = offers.limits
        self._numbers: dict[str, int] = {}  # of the adapters that can be taken out
        self._named: set[str] = set()  # what it has to know
        self._taken = len(offers.there)  # adapters that it took in its life
        self._alive = True
        self.told: Callable[[bool], None] = _nobody  # whether it answers, whenever that changes
        self.lost = asyncio.Event()  # set when it has forgotten what was loaded: it was started again
        self._said: set[str] = set()

    @classmethod
    async def connect(
        cls, http: Http, store: Path, *, base_path: str, slots: int, max_rank: int, memory: int = 0
    ) -> Self:
        """Ask what it can do, and take out what an earlier gateway on this store left there; `slots`: use no more.
        `memory`: adapters that it holds at all, where that is known.

        Raises:
            EngineFailed: it can't be used.
        """
        try:
            offers = await offered(http.call, base_path=base_path, slots=slots, max_rank=max_rank)
        except EngineFailed as error:
            raise EngineFailed(f"the engine at {http.url} can't be used: {error}") from None
        except (ValueError, LookupError, TypeError, StopIteration) as error:
            raise EngineFailed(f"what answers at {http.url} is no vLLM ({type(error).__name__}: {error})") from None
        engine = cls(http, offers, store)
        await engine._settle(slots)
        if memory and engine._offers.removes:
            engine._limits = replace(engine._limits, memory=memory)
        return engine

    async def _settle(self, slots: int) -> None:
        """Adapters of others keep their places; those of an earlier gateway leave, or are known again."""
        there, ours = self._offers.there, self._ours()
        if self._offers.removes:
            numbers = sorted(await adapters_inside(self._http.call))
            if len(numbers) == len(there):  # numbered as they came
                self._numbers = dict(zip(there, numbers, strict=True))
            await self._take_up(ours)
        else:
            self._named = set(ours)
        places = self._limits.slots - (len(there) - len(ours))
        if places < 1:
            raise EngineFailed(f"the engine at {self._http.url} is full of adapters of others: {', '.join(there)}")
        # What can't be freed is not let go of either, for as long as there is place.
        memory = places if self._offers.for_good else 0
        self._limits = replace(self._limits, slots=min(slots, places), memory=memory)

    async def _take_up(self, ours: list[str]) -> None:
        """What an earlier gateway left there, and can be taken out."""
        for name in ours:
            await self.remove(name)
        if len(ours) == len(self._offers.there):  # one that was killed may have left some that have no name any more
            for number in await adapters_inside(self._http.call):
                await take_out(self._http.call, number)

    async def close(self) -> None:
        """Leave nothing behind, as far as that can be."""
        if self._offers.removes and self._alive:
            for name in list(self._named):
                await self.remove(name)

    def _ours(self) -> list[str]:
        revisions = self._store / "revisions"
        return [name for name, path in self._offers.there.items() if Path(path).is_relative_to(revisions)]

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def offers(self) -> Offered:
        """What it said of itself, with the limits that hold here."""
        return replace(self._offers, limits=self._limits)

    def no_place_for(self, name: str) -> str | None:
        reason = self._offers.for_good
        if reason is None or self._taken < self._offers.limits.slots or name in self._named:
            return None
        self._say_once(f"'{name}' is not loaded: {reason}")
        return reason

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning("%s", message)

    async def load(self, name: str, folder: Path) -> None:
        if name in self._named:
            return  # an earlier gateway left it there, and a name means the same for ever
        before = await adapters_inside(self._http.call) if self._offers.removes else set()
        status, body = await self._http.call("POST", LOAD, {"lora_name": name, "lora_path": str(folder)})
        added = await adapters_inside(self._http.call) - before if self._offers.removes else set()
        self._taken += 1  # a failed one may keep its place
        if status != 200:
            for number in added:
                await take_out(self._http.call, number)
            raise LoadFailed(message_of(body) + self._where(body))
        self._named.add(name)
        if added:
            self._numbers[name] = added.pop()

    def _where(self, body: bytes) -> str:
        if b"No adapter found" not in body:
            return ""
        return f" (the engine at {self._http.url} has to see the store '{self._store}' at the same path)"

    async def remove(self, name: str) -> None:
        self._named.discard(name)
        await self._http.call("POST", UNLOAD, {"lora_name": name})
        await self._ended(name)
        if (number := self._numbers.get(name)) is not None:
            await take_out(self._http.call, number)
            del self._numbers[name]
            return
        # What was cut off a moment ago may be in one more step, which may read its files: the next answer comes after.
        await self.try_out(self._limits.base)
        self._say_once(
            f"the engine at {self._http.url} removes no adapter: what is unloaded keeps its place until it is needed"
        )

    async def _ended(self, name: str) -> None:
        """Until no request for it is in the engine: all come through here, and were counted out."""

    async def try_out(self, name: str) -> str | None:
        return await wrong_with_first_token(self.call, name) if self.serves(COMPLETIONS) else None

    async def alive(self, *, now: bool = False) -> bool:
        if now:
            status = await self._health()
            self._is(status == 200 or (status == 0 and self._alive))
        return self._alive

    async def watch(self, patience: float) -> None:
        """Look at its health until it is found to have been started anew. A connection that is refused says that it is
        dead, one that is slow only after some seconds."""
        since, looks = 0.0, 0
        while True:
            status, failures, looks = await self._health(), self._http.failures, looks + 1
            if status == 200 and (failures or looks % _LIST_EVERY == 0):
                remembers = await self._remembers()
                if remembers is False:
                    self.lost.set()
                    return
                self._http.failures -= failures if remembers else 0
            since = 0.0 if status == 200 else since + LOOK
            self._is(status == 200 or (status == 0 and since < patience))
            await asyncio.sleep(LOOK)

    def _is(self, alive: bool) -> None:
        if alive != self._alive:
            self._alive = alive
            self.told(alive)

    async def _health(self) -> int:
        """Status; 0 for one that takes its time."""
        try:
            async with asyncio.timeout(LOOK):
                return (await self._http.call("GET", "/health", None))[0]
        except TimeoutError:
            return 0

    async def _remembers(self) -> bool | None:
        """Whether what was loaded is there; None where it does not say."""
        named = set(self._named)  # what is loaded meanwhile may not be listed yet
        try:
            async with asyncio.timeout(5 * LOOK):
                status, body = await self._http.call("GET", "/v1/models", None)
        except TimeoutError:
            return None
        if status != 200:
            return None
        return named & self._named <= {card["id"] for card in json.loads(body)["data"]}

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._http.hand_on(scope, receive, send)
        except Unreached:
            self._is(False)  # until the next look
            raise

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        return await self._http.call(method, path, body)

    def model_card(self) -> dict[str, Any]:
        return dict(self._offers.card)

    def serves(self, path: str) -> bool:
        return path in self._offers.paths

    def goes_around(self, path: str) -> bool:
        return path.startswith(WAYS_AROUND) or (self._offers.removes and path.startswith(OF_DEVELOPERS))

    def templated(self, path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
        # vLLM says so itself where it was started without --trust-request-chat-template
        return templated_over_http(path, said, template)

    async def metrics(self) -> bytes:
        status, body = await self._http.call("GET", "/metrics", None)
        return body if status == 200 else b""

    async def describe(self) -> dict[str, Any]:
        return await described(self.call)
