"""How a replica stays in touch with the gateway: it says how it is, and asks what it is to do, for ever."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Protocol

from lorakit.server.on_ray.hosted import Hosted
from lorakit.server.on_ray.messages import Orders, Told

TELL = 0.5  # seconds between two tellings of how it is
SOON = 1.0  # seconds before it is tried again to reach the gateway
HEARS = 10.0  # seconds that the gateway has to say something


class Overseer(Protocol):
    """The gateway, as a replica reaches it: what fails is tried again."""

    async def tell(self, told: Told) -> None: ...

    async def orders(self, replica: str) -> Orders: ...


async def keep_telling(hosted: Hosted, overseer: Overseer) -> None:
    """Now and then, and as soon as something came of an order."""
    while True:
        told = hosted.told()
        try:
            async with asyncio.timeout(HEARS):
                await overseer.tell(told)
        except Exception:  # the gateway is not there, or is another by now
            hosted.untold(told)
            await asyncio.sleep(SOON)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TELL):
                await hosted.changed.wait()


async def keep_obeying(hosted: Hosted, overseer: Overseer) -> None:
    while True:
        try:
            async with asyncio.timeout(HEARS):
                orders = await overseer.orders(hosted.name)
        except Exception:  # the gateway is not there, or is another by now: whatever Ray raises then
            await asyncio.sleep(SOON)
            continue
        hosted.obey(orders)
