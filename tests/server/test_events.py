"""What happened, for those who ask and those who come back."""

from __future__ import annotations

import asyncio
import json

import pytest

from lorakit.server.sight.events import Event, Events

pytestmark = pytest.mark.anyio


async def take(events: Events, count: int, since: int = 0) -> list[Event]:
    found = []
    async with asyncio.timeout(5):
        async for event in events.since(since):
            assert event is not None
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_events_come_in_order_and_once_though_they_come_while_one_is_read() -> None:
    events = Events()
    events.tell("found", "one")
    seen = []
    async with asyncio.timeout(5):
        async for event in events.since(0):
            assert event is not None
            seen.append(event.number)
            if len(seen) == 4:
                break
            events.tell("found", "another")
    assert seen == [1, 2, 3, 4]


async def test_who_waits_is_woken_by_the_next_one() -> None:
    events = Events()
    waiting = [asyncio.create_task(take(events, 1)) for _ in range(3)]
    await asyncio.sleep(0)
    events.tell("alias", "sql moved", alias="sql")
    assert [[event.data["alias"] for event in await task] for task in waiting] == [["sql"]] * 3


async def test_only_the_last_thousand_are_kept() -> None:
    events = Events()
    for number in range(1500):
        events.tell("found", str(number))
    assert [event.number for event in await take(events, 1000)] == list(range(501, 1501))


async def test_a_number_of_an_engine_that_ended_means_all_that_are_kept() -> None:
    events = Events()
    events.tell("found", "one")
    assert [event.number for event in await take(events, 1, since=7000)] == [1]


def test_a_message_never_breaks_the_stream_whatever_is_in_it() -> None:
    text = Event(3, "found", 1.5, {"message": "two\nlines\r\n\n\ud800", "adapter": "é"}).as_sse()
    assert text.endswith("\n\n")
    number, kind, data = text.rstrip("\n").split("\n")
    assert (number, kind) == ("id: 3", "event: found")
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "found", "created": 1.5, "message": "two\nlines\r\n\n\ud800", "adapter": "é",
    }  # fmt: skip
    text.encode("ascii")
