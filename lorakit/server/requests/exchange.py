"""One request and its answer, as both pass through the gateway: what metrics and logs need is noted on the way."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lorakit.server.access.rights import rights_of
from lorakit.server.requests.answered import Answered
from lorakit.server.requests.usage import without_usage
from lorakit.server.sight.request_id import current_request
from lorakit.store.catalog import Revision

CLIENT_LEFT = 499
_USAGE = b'"usage":{'  # quotes inside of a text are escaped, so a text can't hold it
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens":(\d+)')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens":(\d+)')


class Exchange:
    """`receive` and `send` stand in for the server's. The bytes of an answer are passed on unread, but that the last
    `usage` that it says is remembered."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, path: str) -> None:
        self.path = path
        self.model = ""
        self.revision: Revision | None = None
        self.request_id = current_request.get()
        self.waited = 0.0
        self.started = False
        self.streams = False
        self.ended = False
        self.engine_ended = False  # while it answered, so that what it said says nothing of the revision
        self._scope = scope
        self._receive, self._send = receive, send
        self._begun = time.monotonic()
        self._first_byte: float | None = None
        self._status = 500  # what a client sees of an answer that breaks off before it began
        self._left = False
        self._pieces = 0
        self._broke = False
        self._usage = b""

    @property
    def seconds(self) -> float:
        """Since the request's head was read."""
        return time.monotonic() - self._begun

    @property
    def went_wrong(self) -> bool:
        """Whether the engine said so, before or in the middle of an answer."""
        return self._broke or (self.started and self._status >= 500)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self.ended:
            self._left = True
        return message

    def send(self, message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            self.started = True
            self._status = message["status"]
            kinds = [value for key, value in message.get("headers", ()) if key == b"content-type"]
            self.streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
        elif message["type"] == "http.response.body":
            self._note(message.get("body", b""), ends=not message.get("more_body", False))
        return self._send(message)

    def hide_usage(self) -> None:
        """Keep from the client what a stream says that it used: it did not ask."""
        self._send = without_usage(self._send)

    async def refuse(self, response: Response) -> None:
        """Answer this instead of what was asked for."""
        await response(self._scope, self.receive, self.send)

    def _note(self, body: bytes, *, ends: bool) -> None:
        if self._first_byte is None:
            self._first_byte = self.seconds
        if body.startswith(b"data: {"):
            self._pieces += 1
            self._broke = body.startswith(b'data: {"error"')
        position = body.rfind(_USAGE)
        if position >= 0:
            self._usage = body[position : position + 400]
        self.ended = self.ended or ends

    def answered(self) -> Answered:
        """What is known when it is over."""
        return Answered(
            model=self.model,
            path=self.path,
            status=CLIENT_LEFT if self._left else self._status,
            seconds=self.seconds,
            revision=self.revision,
            request_id=self.request_id,
            key=rights_of(self._scope).key,
            first_byte=self._first_byte,
            waited=self.waited,
            prompt_tokens=_number(_PROMPT, self._usage),
            completion_tokens=_number(_COMPLETION, self._usage),
            pieces=self._pieces,
            broke=self._broke,
            engine_ended=self.engine_ended,
        )


def header(scope: Scope, name: bytes) -> bytes:
    """A header's first value; empty where there is none."""
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value


def _number(pattern: re.Pattern[bytes], text: bytes) -> int | None:
    match = pattern.search(text)
    return int(match[1]) if match else None
