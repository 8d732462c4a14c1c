"""What answers say, in each of the forms that they come in, and how far two say the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.server.sharing.texts import agreement_of, texts_in


def whole(**said: Any) -> bytes:
    return json.dumps(said).encode()


def streamed(*events: Any, named: bool = False) -> bytes:
    lines = [f"event: {event.get('type')}\n" * named + f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}


@pytest.mark.parametrize(("body", "texts"), [
    (whole(choices=[{"text": "one"}]), ("one",)),
    (whole(choices=[{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]), ("a", "b")),
    (whole(choices=[{"index": 0, "message": {"content": "hi"}}]), ("hi",)),
    (whole(choices=[{"index": 0, "message": {"content": None, "tool_calls": [CALL]}}]), ('look{"at": 1}',)),
    (streamed({"choices": [{"text": "o"}]}, {"choices": [{"text": "ne"}]}, {"choices": [], "usage": {}}), ("one",)),
    (streamed({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
              {"choices": [{"index": 1, "delta": {"content": "b"}}, {"index": 0, "delta": {"content": "a"}}]}),
     ("a", "b")),
    (whole(type="message", content=[{"type": "text", "text": "hi"},
                                    {"type": "tool_use", "name": "f", "input": {"a": 1}}]), ('hif{"a": 1}',)),
    (streamed({"type": "message_start", "message": {}},
              {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
              {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hi"}},
              {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{}"}},
              {"type": "message_stop"}, named=True), ("hi{}",)),
])  # fmt: skip
def test_the_text_of_each_choice_is_found_in_every_form(body: bytes, texts: tuple[str, ...]) -> None:
    assert texts_in(body) == texts


@pytest.mark.parametrize("body", [
    b"", b"no json", b"[1, 2]", b'{"choices": 1}', b'{"choices": [{"message": "a"}]}', b'{"error": {"message": "x"}}',
    b'data: {"choices": [{"text": "a"}', b'{"choices": [{"text": 7}]}',
])  # fmt: skip
def test_what_is_no_answer_says_nothing(body: bytes) -> None:
    assert texts_in(body) is None


@given(st.binary(max_size=200))
def test_nothing_that_an_engine_may_say_is_an_error(body: bytes) -> None:
    assert texts_in(body) is None or body


@pytest.mark.parametrize(("mine", "theirs", "equal", "prefix"), [
    (("abcd",), ("abcd",), True, 1.0), (("abcd",), ("abxx",), False, 0.5), (("ab",), ("abcd",), False, 0.5),
    (("",), ("",), True, 1.0), (("a",), ("",), False, 0.0), (("a", "b"), ("a", "c"), False, 0.5),
    (("a",), ("a", "b"), False, 0.5), ((), (), True, 1.0),
])  # fmt: skip
def test_two_answers_agree_as_far_as_they_begin_alike(
    mine: tuple[str, ...], theirs: tuple[str, ...], equal: bool, prefix: float
) -> None:
    found = agreement_of(mine, theirs)
    assert (found.equal, found.prefix) == (equal, prefix)


@given(st.lists(st.text()).map(tuple), st.lists(st.text()).map(tuple))
def test_agreement_is_the_same_from_both_sides(mine: tuple[str, ...], theirs: tuple[str, ...]) -> None:
    assert agreement_of(mine, theirs) == agreement_of(theirs, mine)
    assert agreement_of(mine, theirs).equal == (mine == theirs)
