"""One server takes the place of another (tests/server/programs.py), and the way in that it comes by."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from lorakit.errors import Conflict, NotFound
from lorakit.server.supervision.takeover import door, take_over
from lorakit.store.serving import serving
from tests.server.fake_engine import put_checkpoint
from tests.server.fake_engine import serving as serving_fake
from tests.server.test_supervisor import Program, gone, supervising


@contextmanager
def asking(program: Program, path: str = "/") -> Iterator[list[str]]:
    """Clients that ask without a pause, one over a connection that it keeps: what they were answered, or what
    failed."""
    seen: list[str] = []
    ends = threading.Event()

    def ask(client: httpx.Client) -> None:
        with client:
            while not ends.is_set():
                try:
                    answer = client.get(program.address + path, timeout=20)
                    seen.append(answer.text if answer.status_code == 200 else f"failed: {answer.status_code}")
                except httpx.TransportError as error:
                    seen.append(f"failed: {error!r}")

    anew = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))
    clients = [threading.Thread(target=ask, args=(client,)) for client in (httpx.Client(), anew)]
    for client in clients:
        client.start()
    try:
        yield seen
    finally:
        ends.set()
        for client in clients:
            client.join()


def test_another_server_takes_the_address_over_without_a_failed_request(tmp_path: Path) -> None:
    with supervising(tmp_path) as old:
        first = old.until_up()
        with httpx.Client() as idle, asking(old) as seen, asking(old, "/slow") as slow:
            idle.get(old.address)  # and keeps its connection
            with supervising(tmp_path, "late", verb="succeed") as new:
                assert new.address == old.address
                second = old.until_up(but=first)
                assert old.process.wait(20) == 0, "the old one finished, and ended"
                assert gone(first)()
                seen.clear()
                old.until(lambda: len(seen) > 5)
                assert set(seen) == {f"engine {second}"}
                assert not [answer for answer in slow if "failed" in answer]
                assert new.get("/told").text == "[]"
                with pytest.raises(Conflict, match="Stop it"), refusing(tmp_path):
                    take_over(tmp_path / "home", "base", new.address)
                assert new.end(signal.SIGTERM) == 0
        assert "another server is about to take over" in old.log
        assert not list((tmp_path / "home").glob("serving/*")), "nothing is left of either"


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """The way in is nobody's."""
    (way_in,) = (folder / "home" / "serving").glob("*.sock")
    aside = way_in.rename(way_in.with_suffix(".aside"))
    try:
        yield
    finally:
        aside.rename(way_in)


@pytest.mark.parametrize("how", ["fail", "cold"])
def test_a_takeover_that_comes_to_nothing_leaves_the_old_server_as_it_was(tmp_path: Path, how: str) -> None:
    with supervising(tmp_path) as old:
        engine = old.until_up()
        with asking(old) as seen, supervising(tmp_path, how, verb="succeed") as new:
            if how == "fail":
                assert new.process.wait(20) == 1
                assert "out of luck: the reason" in (tmp_path / "log2").read_text()
            else:
                old.until(lambda: old.get("/held").text == "True")
                new.process.kill()
            old.until(lambda: old.get("/held").text == "False")
        assert set(seen) == {f"engine {engine}"}
        assert old.end(signal.SIGTERM) == 0


def test_without_a_server_there_is_nothing_to_take_over(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="without --takeover"):
        take_over(tmp_path, "base", "http://127.0.0.1:8000")


def test_only_its_own_user_can_open_the_way_in_and_its_path_may_be_long(tmp_path: Path) -> None:
    home = tmp_path / ("a" * 100) / ("b" * 100)
    home.mkdir(parents=True)
    with serving(home, "base", "http://here") as file:
        with door(file.with_suffix(".sock")):
            mode = os.stat(file.with_suffix(".sock")).st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
        assert not file.with_suffix(".sock").exists()
        with pytest.raises(Conflict, match="Stop it, then start this one"):
            take_over(home, "base", "http://here")
    with door(None) as nobody:
        assert nobody is None


@pytest.mark.anyio
async def test_a_gateway_that_is_held_answers_and_changes_nothing_until_it_is_let_go(
    numbers: Path, tmp_path: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 1)
    async with serving_fake(tmp_path, numbers) as served:
        before = await served.revision_of("sql")
        await served.reconciler.hold()
        answer = await served.client.post("/v1/adapters/sql/rollback")
        assert answer.status_code == 503
        assert "another server is taking over" in answer.text
        assert answer.headers["retry-after"]
        put_checkpoint(tmp_path / "runs" / "sql", 2)
        await asyncio.sleep(0.3)
        assert await served.revision_of("sql") == before
        assert (await served.client.get("/v1/adapters/sql")).status_code == 200
        served.reconciler.resume()

        async def followed() -> bool:
            return "@step-2-" in str(await served.revision_of("sql"))

        await served.until(followed)
