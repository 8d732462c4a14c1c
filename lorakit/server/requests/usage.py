"""What a stream used, where its key's tokens are counted: asked for though its client did not, and kept from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.types import Message, Send

if TYPE_CHECKING:
    from lorakit.server.requests.models import Asked

PATHS = frozenset({"/v1/completions", "/v1/chat/completions"})  # the others say it without being asked
_END = b"\n\n"


def asking_for_usage(path: str, asked: Asked) -> dict[str, Any]:
    """The members that have a stream say at its end what it used; none where it does, or is none."""
    options = asked.said.get("stream_options")
    given = {} if options is None else options
    if path not in PATHS or asked.said.get("stream") is not True or not isinstance(given, dict):
        return {}
    return {} if given.get("include_usage") else {"stream_options": {**given, "include_usage": True}}


def without_usage(send: Send) -> Send:
    """Passes a stream on without the event that says what it used, and nothing else."""
    kept = b""

    async def passed_on(message: Message) -> None:
        nonlocal kept
        if message["type"] == "http.response.body":
            *events, kept = (kept + message.get("body", b"")).split(_END)
            body = b"".join(event + _END for event in events if _is_kept(event))
            if not message.get("more_body", False):
                body, kept = body + kept, b""
            message = {**message, "body": body}
        await send(message)

    return passed_on


def _is_kept(event: bytes) -> bool:
    return not (b'"choices":[]' in event and b'"usage":{' in event)
