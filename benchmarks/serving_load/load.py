"""Load on a server of OpenAI's API: clients that ask again when they were answered, and clients that keep to a clock.
Light, for it shares the cores with what it measures."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp

ASKED = {"prompt": "the quick brown fox", "max_tokens": 16, "temperature": 0}


@dataclass
class Seen:
    """Of answers: seconds each took, and to its first byte; `seconds` is how long all of it went on, and `processors`
    the time that the server's processes used meanwhile."""

    times: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    failed: int = 0
    seconds: float = 0.0
    processors: float = 0.0

    @property
    def rate(self) -> float:
        return len(self.times) / self.seconds

    def delay(self, share: float) -> float:
        """Seconds within which this share of the answers was complete."""
        return sorted(self.times)[min(len(self.times) - 1, int(share * len(self.times)))] if self.times else 0.0

    @property
    def first(self) -> float:
        return statistics.median(self.firsts) if self.firsts else 0.0


@asynccontextmanager
async def session(url: str, clients: int = 0) -> AsyncIterator[aiohttp.ClientSession]:
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=clients), timeout=timeout) as opened:
        yield opened


async def ask(client: aiohttp.ClientSession, model: str, seen: Seen, *, stream: bool) -> None:
    """One request, read to its end."""
    begun = time.perf_counter()
    try:
        async with client.post("/v1/completions", json={"model": model, "stream": stream, **ASKED}) as response:
            first = True
            async for _ in response.content.iter_any():
                if first:
                    seen.firsts.append(time.perf_counter() - begun)
                first = False
            response.raise_for_status()
    except aiohttp.ClientError:
        seen.failed += 1
        return
    seen.times.append(time.perf_counter() - begun)


async def closed_loop(url: str, model: Callable[[], str], clients: int, seconds: float, *, stream: bool) -> Seen:
    """Each client asks again as soon as it was answered."""
    seen = Seen()
    begun = time.perf_counter()

    async def loop() -> None:
        while time.perf_counter() < begun + seconds:
            await ask(client, model(), seen, stream=stream)

    async with session(url, clients) as client:
        await asyncio.gather(*(loop() for _ in range(clients)))
    seen.seconds = time.perf_counter() - begun
    return seen


async def open_loop(url: str, model: Callable[[], str], rate: float, until: asyncio.Event, *, seed: int = 0) -> Seen:
    """Requests that come at random moments, `rate` a second, whether or not the earlier ones are answered."""
    seen, moments, tasks = Seen(), random.Random(seed), set[asyncio.Task[None]]()
    begun = time.perf_counter()
    due = begun
    async with session(url) as client:
        while not until.is_set():
            due += moments.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(ask(client, model(), seen, stream=True))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    seen.seconds = time.perf_counter() - begun
    return seen
