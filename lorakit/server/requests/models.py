"""What a request asks for: its body, read and parsed once, and where in it the model is named.

What is handed on is the client's own text, in which nothing but the model has changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import Receive, Scope

from lorakit.errors import LorakitError
from lorakit.server.requests.exchange import header

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
# The two forms that clients write; what else a parser might read a name from is refused.
_DISPOSITION = re.compile(
    rb'form-data; ?name=(?:"([^"\\\r\n]*)"|([A-Za-z0-9_.-]+))(?:; ?filename\*?=(?:"[^"\\\r\n]*"|[^;"\r\n]*))*', re.I
)
_CHARSET = rb"(?: *; *charset=[A-Za-z0-9-]+)?"
_BOUNDARY = re.compile(
    rb"multipart/form-data" + _CHARSET + rb' *; *boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))' + _CHARSET, re.I
)


class TooLarge(LorakitError):
    """A body has more bytes than this server reads."""


class BadBody(LorakitError):
    """A body is not what this route takes."""


class NoObject(BadBody):
    """JSON, but no object: nothing that could name a model."""


class NoModel(BadBody):
    """A body names no model where it has to."""


class ClientLeft(LorakitError):
    """The client went away before all of its body was there."""


class Asked(Protocol):
    """A body. `model` is what it names: None for nothing."""

    @property
    def model(self) -> Any: ...

    @property
    def said(self) -> Mapping[str, Any]: ...

    def naming(self, members: Mapping[str, Any]) -> bytes:
        """The body with these members, and the rest as it was; a form has none but `model`."""


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body.

    Raises:
        TooLarge: it has more than `limit` bytes; what it says of itself is enough.
        ClientLeft: it is not all there.
    """
    said = header(scope, b"content-length")
    size, parts = int(said) if said.isdigit() else 0, []
    left = limit
    while size <= limit and left >= 0:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft("the client went away before all of its body was there")
        parts.append(message.get("body", b""))
        left -= len(parts[-1])
        if not message.get("more_body", False) and left >= 0:
            return b"".join(parts)
    raise TooLarge(f"the body is larger than {limit} bytes, which is the most that this server reads (--max-body)")


def is_json(scope: Scope) -> bool:
    return _content_type(scope) == b"application/json"


def is_form(scope: Scope) -> bool:
    return _content_type(scope) == b"multipart/form-data"


def _content_type(scope: Scope) -> bytes:
    return header(scope, b"content-type").partition(b";")[0].strip().lower()


# JSON


@dataclass(frozen=True, slots=True)
class JSONBody:
    """An object, its text, and where in it the values of each of its members stand."""

    said: Mapping[str, Any]
    text: str
    places: Mapping[str, tuple[tuple[int, int], ...]]

    @property
    def model(self) -> Any:
        return self.said.get("model")

    def naming(self, members: Mapping[str, Any]) -> bytes:
        changes: list[tuple[int, int, str]] = []
        for name, value in members.items():
            written = json.dumps(value)
            if places := self.places.get(name):
                changes += [(start, end, written) for start, end in places]
            else:
                at = self.text.index("{") + 1
                changes.append((at, at, f"{json.dumps(name)}:{written}{',' if self.said else ''}"))
        parts, position = [], 0
        for start, end, written in sorted(changes):
            parts += [self.text[position:start], written]
            position = end
        return "".join([*parts, self.text[position:]]).encode("utf-8", "surrogatepass")


def read_json(body: bytes) -> JSONBody:
    """Raises BadBody where it is no JSON, and of those NoObject where it is another value."""
    said: dict[str, Any] = {}
    places: dict[str, tuple[tuple[int, int], ...]] = {}
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        for name, value, start, end in _members(text):
            said[name] = value  # as every reader does: of a name that stands twice, the last counts
            places[name] = (*places.get(name, ()), (start, end))
    except RecursionError:
        raise BadBody("the body nests too deeply") from None
    except ValueError:  # of the text's encoding, too
        raise BadBody("the body is no JSON") from None
    return JSONBody(said, text, places)


def _members(text: str) -> Iterator[tuple[str, Any, int, int]]:
    """The members of an object, each with its value's place. The values are read by the standard library."""
    position = _skipped(text, 0)
    if text[position : position + 1] != "{":
        _DECODER.decode(text)
        raise NoObject("the body has to be a JSON object with a string `model`")
    position = _skipped(text, position + 1)
    if text[position : position + 1] != "}":
        while True:
            name, position = _DECODER.raw_decode(text, position)
            if not isinstance(name, str):
                raise ValueError("a name has to be a string")
            position = _after(text, position, ":")
            value, end = _DECODER.raw_decode(text, position)
            yield name, value, position, end
            position = _skipped(text, end)
            if text[position : position + 1] == "}":
                break
            position = _after(text, position, ",")
    if _skipped(text, position + 1) != len(text):
        raise ValueError("there is more behind the object")


def _skipped(text: str, position: int) -> int:
    """Past white space."""
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _after(text: str, position: int, sign: str) -> int:
    position = _skipped(text, position)
    if text[position : position + 1] != sign:
        raise ValueError(f"'{sign}' is missing")
    return _skipped(text, position + 1)


# forms, as audio comes in


@dataclass(frozen=True, slots=True)
class FormBody:
    """A form; `place` is where its model's name stands."""

    body: bytes
    model: str | None
    place: tuple[int, int]
    said: Mapping[str, Any]

    def naming(self, members: Mapping[str, Any]) -> bytes:
        if self.model is None:
            return self.body
        start, end = self.place
        written: str = members["model"]
        return self.body[:start] + written.encode() + self.body[end:]


def read_form(scope: Scope, body: bytes) -> FormBody:
    """Raises BadBody where it can't be read, or could be read in two ways."""
    match = _BOUNDARY.fullmatch(header(scope, b"content-type").strip())
    if match is None:
        raise BadBody("the form names no boundary, or two")
    found = [place for name, place in _fields(body, b"--" + (match[1] or match[2])) if name == b"model"]
    if len(found) > 1:
        raise BadBody("the form names more than one model")
    if not found:
        return FormBody(body, None, (0, 0), {})
    start, end = found[0]
    return FormBody(body, body[start:end].decode("utf-8", "replace"), (start, end), {})


def _fields(body: bytes, delimiter: bytes) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Each field's name, and where its value stands."""
    if not body.startswith(delimiter + b"\r\n"):
        raise BadBody("the form does not begin with its boundary")
    position = len(delimiter)
    while body[position : position + 2] == b"\r\n":
        head = body.find(b"\r\n\r\n", position)
        end = body.find(b"\r\n" + delimiter, head + 4)
        if head < 0 or end < 0:
            raise BadBody("the form breaks off")
        yield _name(body[position + 2 : head]), (head + 4, end)
        position = end + 2 + len(delimiter)
    if body[position : position + 2] != b"--":
        raise BadBody("the form breaks off")


def _name(headers: bytes) -> bytes:
    lines = [line.partition(b":") for line in headers.split(b"\r\n")]
    told = [value.strip() for name, _, value in lines if name.strip().lower() == b"content-disposition"]
    match = _DISPOSITION.fullmatch(told[0]) if len(told) == 1 else None
    if match is None or any(line[:1] in (b" ", b"\t") for line in headers.split(b"\r\n")):
        raise BadBody("a field of the form has no name that can be read for sure")
    return match[1] if match[1] is not None else match[2]
