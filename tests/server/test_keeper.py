"""An engine that a gateway elsewhere asks: it is started again when it ends, and ended when it is of no more use."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from lorakit.errors import EngineFailed
from lorakit.server.supervision import keeper as module
from lorakit.server.supervision.keeper import Keeper
from lorakit.server.supervision.supervisor import Times
from tests.server.test_supervisor import ROOT, is_there

pytestmark = pytest.mark.anyio
TIMES = Times(drain=1.0, ending=1.0, silent=0.8, hung=2.0, start=5.0)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", (0.1,))


class Kept:
    def __init__(self, folder: Path, running: asyncio.Task[None]) -> None:
        self.folder, self.running = folder, running

    @property
    def started(self) -> list[int]:
        file = self.folder / "pids"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []

    async def until_started(self, count: int) -> list[int]:
        async with asyncio.timeout(30):
            while len(self.started) < count:
                assert not self.running.done(), self.running.result()
                await asyncio.sleep(0.05)
        return self.started


@asynccontextmanager
async def kept(folder: Path, *flags: str) -> AsyncIterator[Kept]:
    def command(_: str) -> tuple[list[str], dict[str, str]]:
        line = [sys.executable, "-m", "tests.server.programs", "engine", str(folder / "pids"), "alone", *flags]
        return line, {**os.environ, "PYTHONPATH": str(ROOT)}

    keeper = Keeper("0", folder / "0.sock", command, phase_of=lambda _: None, times=TIMES, log_format="text")
    running = asyncio.create_task(keeper.run())
    there = Kept(folder, running)
    try:
        yield there
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert not [pid for pid in there.started if is_there(pid)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_what_dies_or_stops_is_started_again(
    tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    async with kept(tmp_path) as there:
        (first,) = await there.until_started(1)
        await asyncio.sleep(1.0)  # it is up
        os.kill(first, number)
        _, second = await there.until_started(2)
        assert not is_there(first)
        assert is_there(second)
    assert "engine '0': it ended" in capfd.readouterr().err


@pytest.mark.parametrize(("fault", "said"), [("ill", "health check"), ("mad", "nan"), ("numb", "has not answered")])
async def test_what_is_of_no_use_is_started_again(
    tmp_path: Path, fault: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async with kept(tmp_path, fault) as there:
        await there.until_started(2)
    assert said in capfd.readouterr().err


async def test_what_never_comes_up_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    async with kept(tmp_path, "fail") as there:
        with pytest.raises(EngineFailed, match="out of luck: the reason"):
            await there.running


async def test_what_is_left_of_a_socket_is_not_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "0.sock").write_text("")
    async with kept(tmp_path) as there:
        await there.until_started(1)
        assert not (tmp_path / "0.sock").exists()
