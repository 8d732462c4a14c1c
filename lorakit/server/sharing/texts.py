"""What an answer says, whole or streamed, and how far two answers say the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Texts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two answers to the same request: whether their texts are equal, and for which share of the longer one they
    begin alike, at the mean of their choices."""

    equal: bool
    prefix: float


def agreement_of(mine: Texts, theirs: Texts) -> Agreement:
    pairs = list(zip_longest(mine, theirs, fillvalue=""))
    alike = [_begun(*pair) / longest if (longest := max(map(len, pair))) else 1.0 for pair in pairs]
    return Agreement(mine == theirs, sum(alike) / len(alike) if alike else 1.0)


def _begun(one: str, other: str) -> int:
    """How many letters they have in common from their beginning."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
                min(len(one), len(other)))  # fmt: skip


def texts_in(body: bytes) -> Texts | None:
    """The text of each choice in an answer of OpenAI's or Anthropic's kind, the calls of tools in it; None where it
    can't be read."""
    texts: dict[int, list[str]] = {}
    try:
        for said in _events(body) if body.startswith((b"data:", b"event:")) else [json.loads(body)]:
            for index, text in _pieces(said):
                texts.setdefault(index, []).append(text)
        return tuple("".join(texts[index]) for index in sorted(texts)) if texts else None
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None


def _events(body: bytes) -> Iterator[Any]:
    for line in body.split(b"\n"):
        data = line.removeprefix(b"data:").strip() if line.startswith(b"data:") else b""
        if data and data != b"[DONE]":
            yield json.loads(data)


def _pieces(said: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """What one event, or a whole answer, adds to which choice."""
    for choice in said.get("choices") or ():
        yield choice.get("index", 0), choice["text"] if "text" in choice else _of_chat(choice)
    if said.get("type") == "message":
        yield 0, "".join(map(_of_block, said["content"]))
    elif said.get("type") == "content_block_start":
        yield 0, _of_block(said["content_block"])
    elif said.get("type") == "content_block_delta":
        delta = said["delta"]
        yield 0, delta.get("text") or delta.get("partial_json") or ""


def _of_chat(choice: Mapping[str, Any]) -> str:
    message = choice.get("message") or choice.get("delta") or {}
    return (message.get("content") or "") + "".join(_of_calls(message.get("tool_calls") or ()))


def _of_calls(calls: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for call in calls:
        function = call.get("function") or {}
        yield (function.get("name") or "") + (function.get("arguments") or "")


def _of_block(block: Mapping[str, Any]) -> str:
    called = block.get("name", "") + json.dumps(block["input"]) if block.get("input") else block.get("name", "")
    return str(block.get("text") or called)
