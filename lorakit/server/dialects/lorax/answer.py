"""What vLLM answered, as LoRAX would have said it: whole, token by token, or that it failed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.errors import LorakitError
from lorakit.server.dialects.lorax.request import Generate
from lorakit.server.dialects.lorax.vocabulary import Vocabulary

_AS_ID = "token_id:"  # how vLLM begins where an id stands for a text
_DATA = b"data: "
_END = b"[DONE]"


class Failed(LorakitError):
    """`kind` is LoRAX's `error_type`, by which its client knows what to raise."""

    def __init__(self, message: str, status: int, kind: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind

    def as_dict(self) -> dict[str, str]:
        return {"error": str(self), "error_type": self.kind}


def invalid(message: str) -> Failed:
    return Failed(message, 422, "validation")


def incomplete() -> Failed:
    return Failed("the answer ended before it was complete", 500, "incomplete_generation")


def failed(status: int, error: Any) -> Failed:
    """An error in OpenAI's shape; what has the fault of the request has 422, as there."""
    try:
        message = str(error["error"]["message"])
    except (LookupError, TypeError):
        message = f"it was answered with the status {status}"
    if status in (429, 503):
        return Failed(message, status, "overloaded")
    if status >= 500:
        return Failed(message, 424, "generation")
    return Failed(message, status if status in (401, 403) else 422, "validation")


@dataclass(frozen=True, slots=True)
class Token:
    """`alternatives` are None where none were asked for."""

    id: int
    text: str
    logprob: float | None
    special: bool = False
    alternatives: tuple[dict[str, Any], ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        told = {"id": self.id, "text": self.text, "logprob": self.logprob, "special": self.special}
        return told if self.alternatives is None else {**told, "alternative_tokens": list(self.alternatives)}


@dataclass(frozen=True, slots=True)
class Part:
    """What one choice of vLLM's says, of an answer or of one event of a stream. `finish` is empty where it goes on."""

    text: str
    tokens: tuple[Token, ...]
    finish: str


class Reader:
    """Reads what was asked for with `request`, of a base with this vocabulary."""

    def __init__(self, request: Generate, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._alternatives = request.parameters.return_k_alternatives

    def part(self, choice: Mapping[str, Any]) -> Part:
        """Raises LookupError, TypeError where it is no choice."""
        told = choice.get("logprobs") or {}
        if "text" in choice:
            text = choice["text"]
            columns = (told.get("tokens") or (), told.get("token_logprobs") or (), told.get("top_logprobs") or ())
            rows = list(zip(*columns, strict=True))
        else:
            text = (choice.get("message") or choice["delta"]).get("content") or ""
            content = told.get("content") or ()
            rows = [(one["token"], one["logprob"], _by_token(one["top_logprobs"])) for one in content]
        finish = _finish(choice)
        ids = choice.get("token_ids") or ()
        tokens = [self._token(id, *row) for id, row in zip(ids, rows, strict=True)]
        if tokens and finish == "eos_token":  # whatever is known of the vocabulary
            tokens[-1] = replace(tokens[-1], special=True)
        return Part(text, tuple(tokens), finish)

    def _token(self, id: int, text: str, logprob: float | None, top: Mapping[str, float] | None) -> Token:
        alternatives = None
        if self._alternatives:
            likely = sorted((top or {}).items(), key=lambda entry: -entry[1])[: self._alternatives]
            found = [(int(key.removeprefix(_AS_ID)), value) for key, value in likely]
            alternatives = tuple({"id": one, "text": self._text(one), "logprob": value} for one, value in found)
        shown = self._text(id) if self._alternatives else text
        return Token(id, shown, logprob, id in self._vocabulary.special, alternatives)

    def prefill(self, told: Sequence[Mapping[str, Any] | None], ids: Sequence[int]) -> tuple[Token, ...]:
        """The prompt's tokens; the first has no logprob."""
        said = [(one or {}).get(str(id)) for one, id in zip(told, ids, strict=True)]
        return tuple(
            Token(id, str(one["decoded_token"]), one["logprob"]) if one else Token(id, self._text(id), None)
            for id, one in zip(ids, said, strict=True)
        )

    def _text(self, id: int) -> str:
        return self._vocabulary.text(id) if self._vocabulary.reads else ""


def _by_token(top: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {one["token"]: one["logprob"] for one in top}


def _finish(choice: Mapping[str, Any]) -> str:
    reason = choice.get("finish_reason")
    if reason in (None, "length"):
        return reason or ""
    return "stop_sequence" if isinstance(choice.get("stop_reason"), str) else "eos_token"


# whole


def whole_answer(request: Generate, vocabulary: Vocabulary, answer: Any) -> dict[str, Any]:
    """LoRAX's answer from vLLM's: of several texts the one with the highest logprob per token, and the others with it.

    Raises:
        Failed: it is none, or not complete.
    """
    reader = Reader(request, vocabulary)
    try:
        choices = [(reader.part(choice), _prefill(reader, choice, answer)) for choice in answer["choices"]]
        best, *others = sorted(choices, key=lambda choice: -_mean_logprob(choice[0].tokens))
        prompt_tokens = answer["usage"]["prompt_tokens"]
    except (LookupError, TypeError, ValueError):
        raise incomplete() from None
    if not all(part.finish for part, _ in choices):
        raise incomplete()
    given = request.parameters
    prompt = request.inputs if given.return_full_text else ""
    if not given.wants_tokens:
        return {"generated_text": prompt + best[0].text}
    details = {
        **_sequence(*best, seed=given.seed),
        "prompt_tokens": prompt_tokens,
        "best_of_sequences": [
            {"generated_text": prompt + part.text, **_sequence(part, prefill, seed=None)} for part, prefill in others
        ]
        if given.best_of_many
        else None,
    }
    return {"generated_text": prompt + best[0].text, "details": details}


def _prefill(reader: Reader, choice: Mapping[str, Any], answer: Mapping[str, Any]) -> tuple[Token, ...]:
    """Completions tell it with each choice, chats once."""
    told = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
    ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
    return reader.prefill(told, ids) if told and ids else ()


def _sequence(part: Part, prefill: Sequence[Token], *, seed: int | None) -> dict[str, Any]:
    return {
        "finish_reason": part.finish,
        "generated_tokens": len(part.tokens),
        "seed": seed,
        "prefill": [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in prefill],
        "tokens": [token.as_dict() for token in part.tokens],
    }


def _mean_logprob(tokens: Sequence[Token]) -> float:
    known = [token.logprob for token in tokens if token.logprob is not None]
    return math.fsum(known) / len(known) if known else -math.inf


# token by token


class Stream:
    """LoRAX's events from the bytes of vLLM's, in whatever pieces they come. What the texts of its tokens that are not
    special give together is the text."""

    def __init__(self, request: Generate, vocabulary: Vocabulary) -> None:
        self._reader = Reader(request, vocabulary)
        self._request = request
        self._bytes = b""
        self._text = ""
        self._count = 0
        self._last: Token | None = None  # it waits for the numbers that go with it
        self._finish = ""
        self.ended = False

    def events(self, body: bytes) -> Iterator[dict[str, Any]]:
        """Those that are complete with this piece."""
        *lines, self._bytes = (self._bytes + body).split(b"\n")
        for line in lines:
            if line.startswith(_DATA) and not self.ended:
                yield from self._event(line[len(_DATA) :].strip())

    def close(self) -> Iterator[dict[str, Any]]:
        """What is left to say when no more comes."""
        if not self.ended:
            self.ended = True
            yield incomplete().as_dict()

    def _event(self, data: bytes) -> Iterator[dict[str, Any]]:
        try:
            said = None if data == _END else json.loads(data)
            if said is None:
                yield from self.close()
            elif "error" in said:
                self.ended = True
                yield failed(int(said["error"].get("code") or 500), said).as_dict()
            elif said["choices"]:
                yield from self._tokens(self._reader.part(said["choices"][0]))
            elif self._last is not None:
                self.ended = True
                yield self._end(said["usage"]["prompt_tokens"])
        except (LookupError, TypeError, ValueError):
            yield from self.close()

    def _tokens(self, part: Part) -> Iterator[dict[str, Any]]:
        tokens = list(_with_texts(part))
        self._text += part.text
        self._count += len(part.tokens)
        if part.finish:
            self._finish = part.finish
            self._last = tokens.pop() if tokens else Token(0, "", 0.0, special=True)
        yield from ({"token": token.as_dict(), "generated_text": None, "details": None} for token in tokens)

    def _end(self, prompt_tokens: int) -> dict[str, Any]:
        assert self._last is not None
        given = self._request.parameters
        prompt = self._request.inputs if given.return_full_text else ""
        details = {
            "finish_reason": self._finish, "prompt_tokens": prompt_tokens, "generated_tokens": self._count,
            "seed": given.seed,
        }  # fmt: skip
        return {
            "token": self._last.as_dict(),
            "generated_text": prompt + self._text,
            "details": details if given.details else None,
        }


def _with_texts(part: Part) -> Iterator[Token]:
    """The tokens of an event, whose texts give its text: a token by itself may read otherwise than among others."""
    plain = [token for token in part.tokens if not token.special]
    if "".join(token.text for token in plain) == part.text:
        yield from part.tokens
        return
    carrier = plain[0] if plain else part.tokens[0] if part.tokens else Token(0, "", 0.0)
    for token in part.tokens or (carrier,):
        if token is carrier:
            yield replace(token, text=part.text, special=False)
        else:
            yield token if token.special else replace(token, text="")
