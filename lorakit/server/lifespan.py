"""Where lorakit begins in an app of somebody else's: when that is up, and before it listens."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message, Scope, Send

from lorakit.errors import LorakitError


def once_started(scope: Scope, send: Send, begin: Callable[[Any], Awaitable[None]]) -> Send:
    """The `send` of a lifespan that first lets `begin` have the app when it is up. What lorakit can't begin with ends
    the app, with the reason."""

    async def sent(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            try:
                await begin(scope["app"])
            except LorakitError as error:
                await send({"type": "lifespan.startup.failed", "message": f"lorakit: {error}"})
                raise
        await send(message)

    return sent
