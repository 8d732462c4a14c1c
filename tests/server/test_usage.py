"""What a stream used: asked for by the server, and kept from a client that did not ask; the oracle is the whole."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.server.requests.models import read_json
from lorakit.server.requests.usage import asking_for_usage, without_usage

TEXTS = st.text() | st.sampled_from(['"choices":[]', '"usage":{', "data: ", "\n\n", '","choices":[],"usage":{"'])


def event(said: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def passed_on(pieces: list[bytes]) -> bytes:
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    async def run() -> None:
        passing = without_usage(send)
        await passing({"type": "http.response.start", "status": 200, "headers": []})
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            await passing({"type": "http.response.body", "body": piece, "more_body": not last})

    asyncio.run(run())
    return b"".join(sent)


@given(st.lists(TEXTS, max_size=4), st.lists(st.integers(0, 400), max_size=6), st.booleans())
def test_of_a_stream_the_usage_alone_is_missing_however_it_is_cut(
    texts: list[str], cuts: list[int], done: bool
) -> None:
    said = [event({"id": "1", "choices": [{"text": text}], "usage": None}) for text in texts]
    usage = event({"id": "1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})
    end = [b"data: [DONE]\n\n"] if done else []
    whole = b"".join([*said, usage, *end])
    places = sorted({0, *(cut for cut in cuts if cut < len(whole)), len(whole)})
    pieces = [whole[start:stop] for start, stop in pairwise(places)]
    assert passed_on(pieces) == b"".join([*said, *end])


@given(st.binary(max_size=60))
def test_what_is_no_stream_passes_as_it_is(body: bytes) -> None:
    assert passed_on([body]) == body


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [("/v1/completions", {"stream": True}, {"include_usage": True}),
     ("/v1/chat/completions", {"stream": True, "stream_options": None}, {"include_usage": True}),
     ("/v1/completions", {"stream": True, "stream_options": {"x": 1}}, {"x": 1, "include_usage": True}),
     ("/v1/completions", {"stream": True, "stream_options": {"include_usage": False}}, {"include_usage": True}),
     ("/v1/completions", {"stream": True, "stream_options": {"include_usage": True}}, None),
     ("/v1/completions", {"stream": True, "stream_options": "what"}, None),
     ("/v1/completions", {"stream": False}, None), ("/v1/completions", {}, None),
     ("/v1/messages", {"stream": True}, None)],
)  # fmt: skip
def test_it_is_asked_for_where_a_stream_would_not_say_it(path: str, body: dict[str, Any], wanted: Any) -> None:
    found = asking_for_usage(path, read_json(json.dumps(body).encode()))
    assert found == ({} if wanted is None else {"stream_options": wanted})
