"""The line between two processes of one server: words, and the handles that come with them."""

from __future__ import annotations

import asyncio
import os

import pytest

from lorakit.server.supervision.line import Line, pair

pytestmark = pytest.mark.anyio


async def test_a_word_arrives_with_what_was_said_and_the_handle_that_belongs_to_it() -> None:
    one, other = map(Line, pair())
    read, write = os.pipe()
    await one.say("first", number=1)
    await one.say("second", handles=[write])
    os.close(write)
    first, second = await other.hear(), await other.hear()
    assert first is not None
    assert (first.say, first.data, first.handles) == ("first", {"number": 1}, ())
    assert second is not None
    assert not os.get_inheritable(second.handles[0])
    os.write(second.handles[0], b"through")
    assert os.read(read, 100) == b"through"
    os.close(second.handles[0])
    os.close(read)
    one.close()
    assert await other.hear() is None
    with pytest.raises(OSError, match="pipe"):
        await other.say("nobody")
    other.close()


async def test_many_words_wait_for_a_slow_listener_and_keep_their_order() -> None:
    one, other = map(Line, pair())

    async def say_all() -> None:
        for number in range(300):
            await one.say("word", number=number, text="x" * 10_000)

    saying = asyncio.create_task(say_all())
    await asyncio.sleep(0.05)
    assert not saying.done(), "it does not pile up"
    for number in range(300):
        word = await other.hear()
        assert word is not None
        assert word.data["number"] == number
    await saying
    one.close()
    other.close()
