"""A request's body: what it names, and that nothing else of it changes. The oracles are json and python-multipart."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from lorakit.server.requests.models import (
    BadBody,
    ClientLeft,
    NoObject,
    TooLarge,
    is_form,
    is_json,
    read_body,
    read_form,
    read_json,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("model"),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("model"), inner),
    max_leaves=12,
)
SPACE = st.text(" \t\r\n", max_size=3)


@st.composite
def objects(draw: st.DrawFn) -> str:
    """An object's text with whatever white space, and names that may stand twice."""
    members = draw(st.lists(st.tuples(st.text() | st.just("model"), VALUES), max_size=5))
    written = [
        f"{draw(SPACE)}{json.dumps(name, ensure_ascii=draw(st.booleans()))}{draw(SPACE)}:{draw(SPACE)}"
        f"{json.dumps(value, ensure_ascii=draw(st.booleans()))}{draw(SPACE)}"
        for name, value in members
    ]
    return f"{draw(SPACE)}{{{draw(SPACE) if not written else ''}{','.join(written)}}}{draw(SPACE)}"


def members_of(body: bytes) -> Any:
    """All that stands in a body, in order, what stands twice twice."""
    return json.loads(body, object_pairs_hook=tuple)


@given(objects(), st.text())
@settings(max_examples=300, deadline=None)
def test_a_body_says_what_json_reads_from_it_and_only_the_model_changes(text: str, model: str) -> None:
    body = text.encode("utf-8", "surrogatepass")
    asked = read_json(body)
    assert repr(asked.said) == repr(json.loads(body))
    before = members_of(body)
    expected = tuple((name, model if name == "model" else value) for name, value in before)
    if all(name != "model" for name, _ in before):
        expected = (("model", model), *before)
    assert repr(members_of(asked.naming({"model": model}))) == repr(expected)


@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,model \\u0065123etrun', max_size=30).map(str.encode))
@settings(max_examples=500, deadline=None)
def test_what_json_can_not_read_is_refused_and_the_rest_is_not(body: bytes) -> None:
    try:
        expected = json.loads(body)
    except (ValueError, RecursionError):
        with pytest.raises(BadBody):
            read_json(body)
        return
    if isinstance(expected, dict):
        assert repr(read_json(body).said) == repr(expected)
    else:
        with pytest.raises(NoObject):
            read_json(body)


def test_a_number_no_reader_would_keep_and_an_image_reach_the_engine_byte_for_byte() -> None:
    body = b'{"model": "sql", "seed": 123456789012345678901234567890, "top_p": 0.10000000000000000001, "image": "A/"}'
    assert read_json(body).naming({"model": "x"}) == body.replace(b'"sql"', b'"x"')


def test_a_model_that_is_named_twice_is_the_last_and_both_are_replaced() -> None:
    asked = read_json(b'{"model": "a", "mod\\u0065l": "b", "deep": {"model": "c"}}')
    assert asked.model == "b"
    assert asked.naming({"model": "x"}) == b'{"model": "x", "mod\\u0065l": "x", "deep": {"model": "c"}}'


@pytest.mark.parametrize(("text", "kind"), [("{" + '"a":[' * 5000, BadBody), ("[" * 100_000, BadBody), ("1", NoObject)])
def test_what_nests_without_an_end_is_refused(text: str, kind: type[BadBody]) -> None:
    with pytest.raises(kind):
        read_json(text.encode())


# forms


def form(*fields: tuple[str, bytes], boundary: str = "----b", kind: str = "multipart/form-data") -> tuple[Any, bytes]:
    parts = [f"--{boundary}\r\n{head}\r\n\r\n".encode() + value + b"\r\n" for head, value in fields]
    content_type = f"{kind}; boundary={boundary}".encode()
    return {"headers": [(b"content-type", content_type)]}, b"".join(parts) + f"--{boundary}--\r\n".encode()


def field(name: str) -> str:
    return f'Content-Disposition: form-data; name="{name}"'


def read_by_starlette(scope: Any, body: bytes) -> list[tuple[str, str]]:
    """As the routes of vLLM do."""

    async def read() -> list[tuple[str, str]]:
        receive = receiving({"type": "http.request", "body": body})
        return [
            (name, str(value))
            for name, value in (await Request({"type": "http", **scope}, receive).form()).multi_items()
        ]

    return asyncio.run(read())


@given(
    st.lists(st.tuples(st.sampled_from(["prompt", "language", "x"]), st.text(max_size=30)), max_size=4),
    st.integers(0, 4), st.sampled_from(["sql", "sql@best", "é"]),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_of_a_form_only_the_model_changes(others: list[tuple[str, str]], at: int, model: str) -> None:
    fields = [(field(name), value.encode()) for name, value in others]
    fields.insert(at, (field("model"), model.encode()))
    scope, body = form(*fields)
    asked = read_form(scope, body)
    assert asked.model == model
    before = read_by_starlette(scope, body)
    assert ("model", model) in before
    after = read_by_starlette(scope, asked.naming({"model": "renamed"}))
    assert after == [(name, "renamed" if name == "model" else value) for name, value in before]


def test_audio_passes_through_and_a_form_without_a_model_stays_as_it_is() -> None:
    audio = (f'{field("file")}; filename="a b.wav"\r\nContent-Type: audio/wav', bytes(range(256)) * 9)
    scope, body = form(audio, (field("model"), b"sql"))
    assert read_form(scope, body).naming({"model": "other"}) == body.replace(b"\r\n\r\nsql", b"\r\n\r\nother")
    scope, body = form(audio)
    assert read_form(scope, body).model is None
    assert read_form(scope, body).naming({"model": "base"}) == body


@pytest.mark.parametrize(
    "head",
    ["Content-Disposition: form-data; name*=utf-8''model", 'Content-Disposition: form-data; name="x"; name="model"',
     'Content-Disposition: form-data; name="mod\\el"', "X-Other: form-data; name=model", "",
     'Content-Disposition: form-data;\r\n name="model"', 'Content-Disposition: attachment; name="model"',
     f'{field("x")}\r\n{field("model")}', 'Content-Disposition: form-data; name="x"; filename="\\"; name=\\"model"'],
)  # fmt: skip
def test_a_field_whose_name_two_readers_could_read_in_two_ways_is_refused(head: str) -> None:
    scope, body = form((head, b"/etc"), (field("model"), b"sql"))
    with pytest.raises(BadBody):
        read_form(scope, body)


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"", b"multipart/form-data; boundary=b"), (b"--b\r\n", b"multipart/form-data; boundary=b"),
     (b"--b--", b"multipart/form-data"), (b"x\r\n--b--", b"multipart/form-data; boundary=b"),
     (b"--b\r\nContent-Disposition: form-data; name=model\r\n\r\nsql", b"multipart/form-data; boundary=b")],
)  # fmt: skip
def test_a_form_that_breaks_off_is_refused(body: bytes, kind: bytes) -> None:
    with pytest.raises(BadBody):
        read_form({"headers": [(b"content-type", kind)]}, body)


def test_two_models_in_a_form_are_refused() -> None:
    with pytest.raises(BadBody, match="more than one model"):
        read_form(*form((field("model"), b"a"), (field("model"), b"b")))


# reading


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def receiving(*messages: dict[str, Any]) -> Any:
    left = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(left)

    return receive


@pytest.mark.anyio
async def test_a_body_comes_in_parts_and_may_be_as_large_as_the_limit() -> None:
    parts = receiving(
        {"type": "http.request", "body": b"12", "more_body": True}, {"type": "http.request", "body": b"3"}
    )
    assert await read_body({"headers": []}, parts, 3) == b"123"


@pytest.mark.anyio
async def test_a_body_that_says_it_is_too_large_is_not_read_at_all() -> None:
    with pytest.raises(TooLarge, match="--max-body"):
        await read_body({"headers": [(b"content-length", b"4")]}, receiving(), 3)


@pytest.mark.anyio
async def test_a_body_that_lies_about_its_length_is_refused_where_it_goes_beyond() -> None:
    parts = receiving({"type": "http.request", "body": b"1234", "more_body": True})
    with pytest.raises(TooLarge):
        await read_body({"headers": [(b"content-length", b"2")]}, parts, 3)


@pytest.mark.anyio
async def test_a_client_that_leaves_in_the_middle_is_noticed() -> None:
    parts = receiving({"type": "http.request", "body": b"1", "more_body": True}, {"type": "http.disconnect"})
    with pytest.raises(ClientLeft):
        await read_body({"headers": []}, parts, 3)


def test_content_types_are_read_as_http_means_them() -> None:
    for kind in (b"application/json", b"Application/JSON ; charset=utf-8"):
        assert is_json({"headers": [(b"content-type", kind)]})
    assert not is_json({"headers": []})
    assert is_form({"headers": [(b"content-type", b"multipart/form-data; boundary=x")]})
