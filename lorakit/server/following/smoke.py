"""Smoke prompts: what a new revision has to answer before a name moves to it.

A file of JSON objects, one a line:
    {"prompt": "1+1=", "expect": "2"}
    {"messages": [{"role": "user", "content": "hi"}], "matches": "(?i)hello|hi", "max_tokens": 32}
`expect` is text that the answer has to hold, `matches` a regular expression that has to be found in it. Without either,
it has to be an answer whose logprobs are finite, as is asked of all of them. 16 tokens are asked for, the likeliest.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import NotFound, UsageError
from lorakit.server.engines.engine import Answering

KEYS = ("prompt", "messages", "expect", "matches", "max_tokens")
MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Smoke:
    """`asked` is the prompt of a completion, or the messages of a chat; `line` says where it stands."""

    line: int
    asked: str | Sequence[Any]
    expect: str | None = None
    matches: re.Pattern[str] | None = None
    max_tokens: int = MAX_TOKENS

    def request(self, model: str) -> tuple[str, dict[str, Any]]:
        """A path, and what to post there."""
        body: dict[str, Any] = {"model": model, "max_tokens": self.max_tokens, "temperature": 0}
        if isinstance(self.asked, str):
            return "/v1/completions", {**body, "prompt": self.asked, "logprobs": 1}
        return "/v1/chat/completions", {**body, "messages": self.asked, "logprobs": True}


def read_smokes(file: Path) -> tuple[Smoke, ...]:
    """The smoke prompts of a file.

    Raises:
        NotFound: there is no such file.
        UsageError: a line is none; says which.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise NotFound(f"there is no file '{file}' of smoke prompts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{file}' can't be read: {error}") from None
    smokes = tuple(_smoke(file, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not smokes:
        raise UsageError(f"'{file}' holds no smoke prompts: write one JSON object with a \"prompt\" a line")
    return smokes


def _smoke(file: Path, number: int, line: str) -> Smoke:
    where = f"'{file}', line {number}"
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: it is no JSON: {error}") from None
    if not isinstance(said, dict) or ("prompt" in said) == ("messages" in said):
        raise UsageError(f'{where}: it has to be a JSON object with either "prompt" or "messages"')
    for key in said:
        if key not in KEYS:
            raise UsageError(f"{where}: unknown key '{key}'; there are {', '.join(KEYS)}")
    asked, expect, matches = said.get("prompt", said.get("messages")), said.get("expect"), said.get("matches")
    tokens = said.get("max_tokens", MAX_TOKENS)
    if not isinstance(asked, str if "prompt" in said else list) or not asked:
        raise UsageError(f'{where}: "prompt" has to be text, "messages" a list, and neither empty')
    if not all(value is None or isinstance(value, str) for value in (expect, matches)):
        raise UsageError(f'{where}: "expect" and "matches" have to be text')
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise UsageError(f'{where}: "max_tokens" has to be a whole number above 0')
    try:
        pattern = None if matches is None else re.compile(matches)
    except re.error as error:
        raise UsageError(f'{where}: "matches" is no regular expression: {error}') from None
    return Smoke(number, asked, expect, pattern, tokens)


async def what_fails(engine: Answering, model: str, smokes: Sequence[Smoke]) -> str | None:
    """Why an adapter in the engine does not pass; None when it does."""
    for smoke in smokes:
        path, body = smoke.request(model)
        status, answer = await engine.call("POST", path, body)
        if (wrong := _wrong(smoke, status, answer)) is not None:
            return f"smoke prompt of line {smoke.line}: {wrong}"
    return None


def _wrong(smoke: Smoke, status: int, answer: bytes) -> str | None:
    if status != 200:
        return f"it is answered {status}: {answer.decode(errors='replace')[:200]}"
    try:
        choice = json.loads(answer)["choices"][0]
        text, logprobs = _text_of(choice), _logprobs_of(choice)
    except (ValueError, LookupError, TypeError) as error:
        return f"its answer can't be read ({error})"
    if not all(value is not None and math.isfinite(value) for value in logprobs):
        return "its answer has logprobs that are not finite"
    if smoke.expect is not None and smoke.expect not in text:
        return f"its answer {_short(text)} does not hold {smoke.expect!a}"
    if smoke.matches is not None and not smoke.matches.search(text):
        return f"its answer {_short(text)} does not match {smoke.matches.pattern!a}"
    return None


def _text_of(choice: Mapping[str, Any]) -> str:
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text if isinstance(text, str) else ""


def _logprobs_of(choice: Mapping[str, Any]) -> list[float | None]:
    """None where the engine says none."""
    said = choice.get("logprobs") or {}
    if "content" in said:
        return [token["logprob"] for token in said["content"] or ()]
    return list(said.get("token_logprobs") or ())


def _short(text: str) -> str:
    return ascii(text if len(text) <= 80 else f"{text[:80]}…")
