"""The end of an engine process: how it is told, and that it may be asked for again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from lorakit.server.supervision.engine_process import EngineProcess

pytestmark = pytest.mark.anyio


def started(program: str) -> EngineProcess:
    return EngineProcess(([sys.executable, "-c", program], dict(os.environ)), lambda _: None, 1.0, "text")


async def until_ended(process: EngineProcess) -> None:
    async with asyncio.timeout(10):
        while not process.ended:  # noqa: ASYNC110 - there is no event of that alone
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("program", "how"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "killed by SIGKILL"),
    ],
)
async def test_how_one_ended_is_known_before_and_after_it_is_cleared_up(program: str, how: str) -> None:
    process = started(program)
    await until_ended(process)
    assert process.how_it_ended == how
    await process.end(1.0, asyncio.Event())
    assert process.how_it_ended == how


async def test_one_that_is_over_may_be_ended_again() -> None:
    process = started("print('the reason')")
    await until_ended(process)
    await asyncio.gather(process.end(1.0, asyncio.Event()), process.end(1.0, asyncio.Event()))
    await process.ask_to_stop()
    await process.end(1.0, asyncio.Event())
    assert "the reason" in process.last_words


async def test_an_end_that_was_cancelled_is_made_good_by_the_next() -> None:
    process = started("import time; time.sleep(600)")
    ending = asyncio.create_task(process.end(1.0, asyncio.Event()))
    await asyncio.sleep(0.1)
    ending.cancel()
    await asyncio.gather(ending, return_exceptions=True)
    now = asyncio.Event()
    now.set()
    await process.end(1.0, now)
    assert process.ended
    assert process.how_it_ended == "killed by SIGKILL"
    assert process.members() == []
