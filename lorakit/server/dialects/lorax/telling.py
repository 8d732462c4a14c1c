"""The way back: takes vLLM's answer as it is sent, and sends LoRAX's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from starlette.types import Message, Send

from lorakit.server.dialects.lorax.answer import Failed, Stream, failed, whole_answer
from lorakit.server.dialects.lorax.request import Generate, Parameters
from lorakit.server.dialects.lorax.vocabulary import Vocabulary
from lorakit.server.requests.answers import PlainJSON

_PASSED_ON = (b"x-lorakit-", b"retry-after")
_PLAIN = "/:@=,.()+ "  # what may stand in a header as it is, besides letters and digits


class Telling:
    """`many`: in a list, as `/` answers. `stream`: token by token, if it is no error."""

    def __init__(
        self, request: Generate, vocabulary: Vocabulary, base: str, send: Send, *, stream: bool, many: bool
    ) -> None:
        self._request, self._vocabulary = request, vocabulary
        self._headers = _about(request.parameters, base)
        self._send = send
        self._many = many
        self._stream = Stream(request, vocabulary) if stream else None
        self._status = 500
        self._passed_on: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._passed_on = [entry for entry in message.get("headers", ()) if entry[0].startswith(_PASSED_ON)]
            if self._stream is not None and self._status == 200:
                told = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
                await self._begin(200, [*told, (b"x-accel-buffering", b"no")])
        elif message["type"] == "http.response.body":
            body, more = message.get("body", b""), message.get("more_body", False)
            if self._stream is not None and self._status == 200:
                await self._tell(self._stream, body, more)
            else:
                self._parts.append(body)
                if not more:
                    await self._tell_whole()

    async def _tell(self, stream: Stream, body: bytes, more: bool) -> None:
        events = [*stream.events(body), *(() if more else stream.close())]
        told = b"".join(b"data:" + json.dumps(event, separators=(",", ":")).encode() + b"\n\n" for event in events)
        if told or not more:
            await self._send({"type": "http.response.body", "body": told, "more_body": more})

    async def _tell_whole(self) -> None:
        try:
            said = _read(b"".join(self._parts))
            if self._status != 200:
                raise failed(self._status, said)
            told = whole_answer(self._request, self._vocabulary, said)
        except Failed as error:
            await self._answer(error.status, error.as_dict(), [])
            return
        counted = said["usage"]
        prompt, made = counted["prompt_tokens"], counted["completion_tokens"]
        numbers = {b"x-prompt-tokens": prompt, b"x-generated-tokens": made, b"x-total-tokens": prompt + made}
        headers = [(name, str(number).encode()) for name, number in numbers.items()]
        await self._answer(200, [told] if self._many else told, headers)

    async def _answer(self, status: int, content: Any, headers: Iterable[tuple[bytes, bytes]]) -> None:
        body = PlainJSON(content).body
        length = (b"content-length", str(len(body)).encode())
        await self._begin(status, [(b"content-type", b"application/json"), length, *headers])
        await self._send({"type": "http.response.body", "body": bytes(body)})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        told = [*headers, *self._headers, *self._passed_on]
        await self._send({"type": "http.response.start", "status": status, "headers": told})


def _about(given: Parameters, base: str) -> list[tuple[bytes, bytes]]:
    """What LoRAX says of a request in the head of its answer."""
    ids = given.merged_adapters.ids if given.merged_adapters is not None else [given.adapter_id or ""]
    asked = ",".join(ids)
    told = [(b"x-model-id", base), (b"x-adapter-id", asked), (b"x-adapter-source", given.adapter_source or "")]
    return [(name, quote(value, _PLAIN, errors="surrogatepass").encode()) for name, value in told if value]


def _read(body: bytes) -> Mapping[str, Any]:
    try:
        said = json.loads(body)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
