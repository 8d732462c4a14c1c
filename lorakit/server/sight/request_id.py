"""One id for a request, from its client or made here: in the answer, in vLLM, and in every line logged meanwhile."""

from __future__ import annotations

import random
import re
from collections.abc import Awaitable
from contextvars import ContextVar

from starlette.types import Message, Scope, Send

HEADER = b"x-request-id"
# What stands in headers and log lines as it is, and can't be taken for more than one of them.
_FIT = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:/+=@-]{0,127}")

current_request: ContextVar[str] = ContextVar("current_request", default="")


def identified(scope: Scope, send: Send) -> tuple[Scope, Send]:
    """The same request with an id in its headers, and an answer that will carry it; `current_request` is set to it.

    A client's own id is taken over unless it could not stand in a log line.
    """
    given = next((value for name, value in scope["headers"] if name == HEADER), b"")
    fits = _FIT.fullmatch(given) is not None
    value = given if fits else b"%032x" % random.getrandbits(128)
    current_request.set(value.decode())
    headers = [(name, other) for name, other in scope["headers"] if name != HEADER]

    def carrying(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            others = [(name, other) for name, other in message.get("headers", ()) if name.lower() != HEADER]
            message = {**message, "headers": [*others, (HEADER, value)]}
        return send(message)

    return {**scope, "headers": [*headers, (HEADER, value)]}, carrying
