"""Changes of one name come one after another, those of others beside them, and none while they are held."""

from __future__ import annotations

import asyncio

import pytest

from lorakit.server.following.changes import Changes

pytestmark = pytest.mark.anyio


class Record:
    def __init__(self) -> None:
        self.changes, self.seen = Changes(), list[str]()

    async def change(self, name: str, until: asyncio.Event | None = None) -> None:
        async with self.changes.of(name):
            self.seen.append(f"{name} begins")
            if until is not None:
                await until.wait()
            self.seen.append(f"{name} ends")


async def test_one_name_takes_turns_and_another_does_not_wait_for_it() -> None:
    record, ends = Record(), asyncio.Event()
    first = asyncio.create_task(record.change("a", ends))
    second = asyncio.create_task(record.change("a"))
    await asyncio.sleep(0)
    await record.change("b")
    assert record.seen == ["a begins", "b begins", "b ends"]
    ends.set()
    await asyncio.gather(first, second)
    assert record.seen[3:] == ["a ends", "a begins", "a ends"]


async def test_held_no_change_begins_and_what_is_under_way_is_waited_for() -> None:
    record, ends = Record(), asyncio.Event()
    first = asyncio.create_task(record.change("a", ends))
    await asyncio.sleep(0)
    holding = asyncio.create_task(record.changes.hold())
    later = [asyncio.create_task(record.change(name)) for name in "ab"]
    await asyncio.sleep(0.01)
    assert (holding.done(), record.changes.held, record.seen) == (False, True, ["a begins"])
    ends.set()
    await holding
    await first
    await asyncio.sleep(0.01)
    assert record.seen == ["a begins", "a ends"]
    record.changes.resume()
    await asyncio.gather(*later)
    assert sorted(record.seen[2:]) == ["a begins", "a ends", "b begins", "b ends"]


async def test_what_fails_or_is_given_up_lets_the_next_begin() -> None:
    record = Record()
    with pytest.raises(ZeroDivisionError):
        async with record.changes.of("a"):
            raise ZeroDivisionError
    waiting = asyncio.create_task(record.change("a", asyncio.Event()))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await record.change("a")
    await record.changes.hold()
