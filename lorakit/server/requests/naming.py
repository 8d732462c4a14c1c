"""The revision that answered, said in the answer: in a header, and in its body where the engine knows it otherwise."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.types import Message, Send

REVISION_HEADER = b"x-lorakit-revision"
MIX_ERROR_HEADER = b"x-lorakit-mix-error"


def named_answer(send: Send, name: str, engine_name: str) -> Send:
    """Adds the header; where the engine knows the revision by another name, puts the right one into the body."""
    if name == engine_name:

        def passed_through(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message = _with_header(message, REVISION_HEADER, name)
            return send(message)

        return passed_through
    renaming = _Renaming(f'"model":"{engine_name}"'.encode(), f'"model":"{name}"'.encode())
    held: Message | None = None

    async def renamed(message: Message) -> None:
        nonlocal held
        if message["type"] == "http.response.start":
            held = message
            return
        last = not message.get("more_body", False)
        body = renaming.of(message.get("body", b""), last)
        if held is not None:
            headers = [(key, value) for key, value in held.get("headers", []) if key != b"content-length"]
            if last:
                headers.append((b"content-length", str(len(body)).encode()))
            start, held = {**held, "headers": headers}, None
            await send(_with_header(start, REVISION_HEADER, name))
        await send({**message, "body": body})

    return renamed


def with_mix_error(send: Send, error: float | None) -> Send:
    """Adds what a mix lost when it was cut, as a share of its norm; nothing for what is no mix."""
    if error is None:
        return send

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = _with_header(message, MIX_ERROR_HEADER, f"{error:.6g}")
        await send(message)

    return told


def _with_header(start: Message, header: bytes, value: str) -> Message:
    return {**start, "headers": [*start.get("headers", []), (header, value.encode())]}


class _Renaming:
    """Puts one text in place of another that may be cut in two by the parts that a body comes in."""

    def __init__(self, told: bytes, said: bytes) -> None:
        self._told, self._said = told, said
        self._kept = b""

    def of(self, body: bytes, last: bool) -> bytes:
        body = (self._kept + body).replace(self._told, self._said)
        self._kept = b"" if last else _begun(body, self._told)
        return body[: len(body) - len(self._kept)]


def _begun(body: bytes, text: bytes) -> bytes:
    """The end of `body` that is a beginning of `text`; empty where there is none."""
    lengths = range(min(len(text) - 1, len(body)), 0, -1)
    return text[: next((length for length in lengths if body.endswith(text[:length])), 0)]
