"""What a canary says of an engine: that it is stuck, or wrong, and not that it is busy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lorakit.server.engines.canary import ENOUGH, Canary
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


class Engine(FakeEngine):
    """Answers its base as it is told, once it is let."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.answers: list[str | None] = []
        self.lets = asyncio.Event()
        self.tokens = 0

    async def try_out(self, name: str) -> str | None:
        assert name == self.limits.base
        await self.lets.wait()
        return self.answers.pop(0) if self.answers else None

    async def metrics(self) -> bytes:
        return b'vllm:prompt_tokens_total{engine="0"} 3.0\nvllm:generation_tokens_total 1.0e+%02d\n' % self.tokens


@asynccontextmanager
async def flying(engine: FakeEngine, interval: float = 0.01) -> AsyncIterator[Canary]:
    canary = Canary(engine, interval)
    running = asyncio.create_task(canary.run())
    try:
        yield canary
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.005)


async def test_an_engine_that_answers_is_neither_stuck_nor_wrong(numbers: Path) -> None:
    engine = Engine(numbers)
    engine.lets.set()
    engine.answers = ["wrong", "wrong", None, "wrong", "wrong", None]
    async with flying(engine) as canary:
        await until(lambda: not engine.answers)
        assert canary.wrong is None
        assert canary.stuck < 0.5


async def test_an_engine_that_is_wrong_again_and_again_is_wrong(numbers: Path) -> None:
    engine = Engine(numbers)
    engine.lets.set()
    engine.answers = ["a", "b", "no number"][-ENOUGH:] + ["no number"] * 1000
    async with flying(engine) as canary:
        await until(lambda: canary.wrong is not None)
        assert canary.wrong == "no number"


async def test_an_engine_that_does_not_answer_is_stuck_unless_it_makes_tokens_for_others(numbers: Path) -> None:
    engine = Engine(numbers)
    async with flying(engine) as canary:
        await until(lambda: canary.stuck > 0.2)
        engine.tokens += 1
        await until(lambda: canary.stuck < 0.1)
        await until(lambda: canary.stuck > 0.2)
        engine.lets.set()
        await until(lambda: canary.stuck < 0.1)


async def test_no_interval_asks_nothing(numbers: Path) -> None:
    engine = Engine(numbers)
    async with flying(engine, 0) as canary:
        await asyncio.sleep(0.05)
        assert canary.stuck == 0
