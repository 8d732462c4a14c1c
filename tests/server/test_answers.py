"""JSON that is always written, and errors in OpenAI's shape."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.server.requests.answers import PlainJSON, error_response, unavailable


@given(st.text(st.characters(codec=None)))
def test_any_text_at_all_can_be_answered(text: str) -> None:
    answer = error_response(404, "NotFoundError", text, "model")
    assert json.loads(bytes(answer.body)) == {
        "error": {"message": text, "type": "NotFoundError", "param": "model", "code": 404}
    }
    assert answer.headers["content-length"] == str(len(answer.body))


def test_503_says_when_to_come_back() -> None:
    answer = unavailable("the engine is starting")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert b"the engine is starting" in bytes(answer.body)
    assert "retry-after" not in error_response(404, "NotFoundError", "x").headers


def test_what_json_has_no_word_for_is_never_sent() -> None:
    with pytest.raises(ValueError, match="JSON"):
        PlainJSON({"loss": float("nan")})
