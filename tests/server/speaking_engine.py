"""The engine without a model, answering with tokens and logprobs in vLLM's words: each letter is a token, its code the
id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.types import Receive, Send

from tests.server.fake_engine import FakeEngine

ROOM = 64  # tokens of a prompt and its answer


class SpeakingEngine(FakeEngine):
    """It answers as many letters of a fingerprint as it is asked for, then ends; the logprob of the letter at place n
    is -n. `together`: letters in one event of a stream. `breaks_after`: letters after which a stream has no more."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.together = 1
        self.breaks_after: int | None = None
        self.error = 0

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        if path != "/tokenize":
            return await super().call(method, path, body)
        tokens = [ord(letter) for letter in body["prompt"]]
        said = {"count": len(tokens), "max_model_len": ROOM, "tokens": tokens}
        return self.error or 200, json.dumps({} if self.error else said).encode()

    async def _say(self, request: dict[str, Any], model: str, receive: Receive, send: Send) -> None:
        said = "base" if model == self.limits.base else self.inside[model]
        prompt = request.get("prompt", "")
        if "hold" in request:
            await super()._say(request, model, receive, send)
        elif self.error:
            await _send(send, {"error": {"message": "the engine says no", "code": self.error}}, self.error)
        elif request.get("stream"):
            await self._stream(request, model, said, send)
        else:
            choices = [_choice(request, said[n:], prompt) for n in range(request.get("n", 1))]
            made = sum(len(choice["token_ids"]) for choice in choices)
            await _send(send, {"model": model, "choices": choices, "usage": _usage(prompt, made)})

    async def _stream(self, request: dict[str, Any], model: str, said: str, send: Send) -> None:
        whole = _choice(request, said, request.get("prompt", ""))
        ids, ends = whole["token_ids"], self.breaks_after or len(whole["token_ids"])
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(head)
        for begin in range(0, ends, self.together):
            end = min(begin + self.together, ends)
            last = end == len(ids)
            choice = _told(whole, begin, end) | ({} if last else {"finish_reason": None, "stop_reason": None})
            await _event(send, {"model": model, "choices": [choice]})
        if self.breaks_after is None:
            await _event(send, {"model": model, "choices": [], "usage": _usage(request.get("prompt", ""), len(ids))})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _choice(request: dict[str, Any], said: str, prompt: str) -> dict[str, Any]:
    most = request.get("max_tokens") or 16
    ends = len(said) < most
    text = said[:most]
    as_id = bool(request.get("return_tokens_as_token_ids"))
    letters = [*text, "</s>"] if ends else [*text]
    shown = [f"token_id:{_id(one)}" for one in letters] if as_id else letters
    told = [-float(place) for place in range(len(letters))]
    more = request.get("logprobs") or 0
    top = [{one: logprob, **_others(more, logprob)} for one, logprob in zip(shown, told, strict=True)]
    choice: dict[str, Any] = {
        "text": text,
        "token_ids": [_id(one) for one in letters],
        "logprobs": {"tokens": shown, "token_logprobs": told, "top_logprobs": top},
        "finish_reason": "stop" if ends else "length",
        "stop_reason": None,
    }
    if "prompt_logprobs" in request:
        ids = [ord(one) for one in prompt]
        known = [{str(id): {"logprob": -0.5, "rank": 1, "decoded_token": chr(id)}} for id in ids]
        choice |= {"prompt_token_ids": ids, "prompt_logprobs": [None, *known[1:]]}
    return choice


def _others(count: int, logprob: float) -> dict[str, float]:
    return {f"token_id:{ord('A') + place}": logprob - 1 - place for place in range(count)}


def _id(letter: str) -> int:
    return 2 if letter == "</s>" else ord(letter)


def _told(whole: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    columns = {name: values[begin:end] for name, values in whole["logprobs"].items()}
    return {**whole, "text": whole["text"][begin:end], "token_ids": whole["token_ids"][begin:end], "logprobs": columns}


def _usage(prompt: str, made: int) -> dict[str, int]:
    return {"prompt_tokens": len(prompt), "completion_tokens": made, "total_tokens": len(prompt) + made}


async def _event(send: Send, said: dict[str, Any]) -> None:
    """In two pieces: nothing says that an event comes in one."""
    body = b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"
    for part in _halves(body):
        await send({"type": "http.response.body", "body": part, "more_body": True})


def _halves(body: bytes) -> Sequence[bytes]:
    return body[: len(body) // 2], body[len(body) // 2 :]


async def _send(send: Send, said: dict[str, Any], status: int = 200) -> None:
    body = json.dumps(said, separators=(",", ":")).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
