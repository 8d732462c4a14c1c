"""The name in an answer, however its body comes in parts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.server.requests.naming import named_answer


def played(parts: list[bytes], name: str, engine_name: str) -> tuple[list[Any], bytes]:
    """What a client gets of an answer that comes in these parts: all messages, and the body."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def play() -> None:
        through = named_answer(send, name, engine_name)
        length = (b"content-length", str(len(b"".join(parts))).encode())
        await through({"type": "http.response.start", "status": 200, "headers": [length] if len(parts) == 1 else []})
        for number, part in enumerate(parts, start=1):
            await through({"type": "http.response.body", "body": part, "more_body": number < len(parts)})

    _run(play())
    return sent, b"".join(message.get("body", b"") for message in sent[1:])


def _run(coroutine: Any) -> None:
    """What waits for nothing needs no event loop."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


TEXT = b'data: {"model":"a@1#2","x":"\\"model\\":\\"a@1#2\\""}\n\ndata: {"model":"a@1#2"}\n\n'


@given(st.lists(st.integers(0, len(TEXT)), max_size=6))
def test_a_name_that_is_cut_in_two_by_the_parts_of_a_body_is_still_found(cuts: list[int]) -> None:
    places = [0, *sorted(cuts), len(TEXT)]
    parts = [TEXT[start:end] for start, end in pairwise(places)]
    sent, body = played(parts, "a@1", "a@1#2")
    assert body == TEXT.replace(b'"model":"a@1#2"', b'"model":"a@1"')
    assert (b"x-lorakit-revision", b"a@1") in sent[0]["headers"]


def test_an_event_is_passed_on_as_a_whole_at_once() -> None:
    event = b'data: {"model":"a#2","choices":[]}\n\n'
    sent, _ = played([event, event], "a", "a#2")
    assert [message["body"] for message in sent[1:]] == [event.replace(b"a#2", b"a")] * 2


def test_the_length_of_an_answer_that_was_changed_is_its_own() -> None:
    sent, body = played([b'{"model":"a#2"}'], "a", "a#2")
    assert (b"content-length", str(len(body)).encode()) in sent[0]["headers"]


def test_an_answer_under_its_own_name_passes_through_as_it_is() -> None:
    parts = [b'{"mod', b'el":"a"}']
    sent, body = played(parts, "a", "a")
    assert [message["body"] for message in sent[1:]] == parts
    assert body == b'{"model":"a"}'
