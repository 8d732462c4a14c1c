"""vLLM's answers in LoRAX's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.server.dialects.lorax.answer import Failed, Stream, failed, whole_answer
from lorakit.server.dialects.lorax.request import Generate
from lorakit.server.dialects.lorax.vocabulary import Vocabulary
from tests.server.test_lorax_vocabulary import byte_level

PLAIN = Vocabulary({2: "</s>"})


def request(inputs: str = "ask: ", **parameters: Any) -> Generate:
    return Generate.model_validate({"inputs": inputs, "parameters": {"details": True, **parameters}})


def choice(text: str, ids: list[int], tokens: list[str], finish: str | None = "length", **more: Any) -> dict[str, Any]:
    logprobs = [-float(place) for place in range(len(ids))]
    top = [{token: value} for token, value in zip(tokens, logprobs, strict=True)]
    told = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top}
    said = {"text": text, "token_ids": ids, "logprobs": told, "finish_reason": finish, "stop_reason": None}
    return {**said, **more}


def answer(*choices: dict[str, Any]) -> dict[str, Any]:
    return {"choices": list(choices), "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


def test_a_whole_answer_tells_its_text_and_each_token() -> None:
    told = whole_answer(request(seed=3), PLAIN, answer(choice("ab", [7, 8, 2], ["a", "b", "</s>"], "stop")))
    assert told["generated_text"] == "ab"
    assert told["details"] == {
        "finish_reason": "eos_token", "prompt_tokens": 5, "generated_tokens": 3, "seed": 3, "prefill": [],
        "tokens": [
            {"id": 7, "text": "a", "logprob": 0.0, "special": False},
            {"id": 8, "text": "b", "logprob": -1.0, "special": False},
            {"id": 2, "text": "</s>", "logprob": -2.0, "special": True},
        ],
        "best_of_sequences": None,
    }  # fmt: skip


def test_without_details_there_is_the_text_alone() -> None:
    plain = {"text": "ab", "logprobs": None, "token_ids": None, "finish_reason": "length"}
    assert whole_answer(request(details=False), PLAIN, answer(plain)) == {"generated_text": "ab"}
    full = whole_answer(request(details=False, return_full_text=True), PLAIN, answer(plain))
    assert full == {"generated_text": "ask: ab"}


@pytest.mark.parametrize(
    ("finish", "stop", "told"),
    [("length", None, "length"), ("stop", None, "eos_token"), ("stop", 2, "eos_token"), ("stop", "b", "stop_sequence")],
)
def test_why_it_ended_is_told(finish: str, stop: Any, told: str) -> None:
    said = answer(choice("ab", [7, 8], ["a", "b"], finish, stop_reason=stop))
    assert whole_answer(request(), PLAIN, said)["details"]["finish_reason"] == told


def test_of_several_the_one_with_the_highest_logprob_a_token_is_the_answer() -> None:
    short, long = choice("a", [7], ["a"]), choice("bcd", [8, 9, 10], ["b", "c", "d"])
    long["logprobs"]["token_logprobs"] = [-0.3, -0.3, -0.3]
    short["logprobs"]["token_logprobs"] = [-0.5]
    told = whole_answer(request(best_of=2, do_sample=True, return_full_text=True), PLAIN, answer(short, long))
    assert told["generated_text"] == "ask: bcd"
    assert told["details"]["generated_tokens"] == 3
    (other,) = told["details"]["best_of_sequences"]
    assert other["generated_text"] == "ask: a"
    assert [token["id"] for token in other["tokens"]] == [7]


def test_the_prompts_tokens_are_told() -> None:
    known = [None, {"9": {"logprob": -0.5, "rank": 1, "decoded_token": "k"}}]
    said = choice("a", [7], ["a"], prompt_token_ids=[2, 9], prompt_logprobs=known)
    told = whole_answer(request(decoder_input_details=True), PLAIN, answer(said))
    assert told["details"]["prefill"][1] == {"id": 9, "text": "k", "logprob": -0.5}
    assert told["details"]["prefill"][0]["logprob"] is None


def test_alternatives_are_the_likeliest_with_their_ids(tmp_path: Path) -> None:
    vocabulary = byte_level(tmp_path)
    a, b, c = (vocabulary.tokenizer.token_to_id(letter) for letter in "abc")
    said = choice("a", [a], [f"token_id:{a}"])
    # what was chosen is told as well where it is none of them
    said["logprobs"]["top_logprobs"] = [{f"token_id:{a}": -3.0, f"token_id:{b}": -1.0, f"token_id:{c}": -2.0}]
    (token,) = whole_answer(request(return_k_alternatives=2), vocabulary, answer(said))["details"]["tokens"]
    assert token["text"] == "a"
    assert token["alternative_tokens"] == [
        {"id": b, "text": "b", "logprob": -1.0}, {"id": c, "text": "c", "logprob": -2.0}
    ]  # fmt: skip


def test_a_chat_is_told_as_a_completion() -> None:
    content = [{"token": "a", "logprob": -0.5, "top_logprobs": []}]
    said = {"message": {"content": "a"}, "logprobs": {"content": content}, "token_ids": [7], "finish_reason": "length"}
    told = whole_answer(request(apply_chat_template=True), PLAIN, answer(said))
    assert told["generated_text"] == "a"
    assert told["details"]["tokens"] == [{"id": 7, "text": "a", "logprob": -0.5, "special": False}]


@pytest.mark.parametrize(
    "said",
    [
        {}, {"choices": []}, answer(), {"choices": [{}], "usage": {}}, answer(choice("a", [7], ["a"], None)),
        {**answer(choice("a", [7], ["a"])), "usage": None}, answer(choice("a", [7, 8], ["a", "b"], logprobs=None)),
    ],
)  # fmt: skip
def test_what_is_no_whole_answer_is_an_incomplete_one(said: Any) -> None:
    with pytest.raises(Failed) as caught:
        whole_answer(request(), PLAIN, said)
    assert (caught.value.status, caught.value.kind) == (500, "incomplete_generation")


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (400, (422, "validation")), (404, (422, "validation")), (413, (422, "validation")), (422, (422, "validation")),
        (429, (429, "overloaded")), (503, (503, "overloaded")), (500, (424, "generation")), (504, (424, "generation")),
        (403, (403, "validation")),
    ],
)  # fmt: skip
def test_an_error_has_lorax_kind(status: int, told: tuple[int, str]) -> None:
    error = failed(status, {"error": {"message": "no", "code": status}})
    assert (error.status, error.kind) == told
    assert str(error) == "no"
    assert str(failed(status, [])) == f"it was answered with the status {status}"


# streams


def sse(*said: Any) -> bytes:
    return b"".join(b"data: " + json.dumps(one).encode() + b"\n\n" for one in said) + b"data: [DONE]\n\n"


USAGE = {"choices": [], "usage": {"prompt_tokens": 5}}


def events(stream: Stream, body: bytes, size: int | None = None) -> list[dict[str, Any]]:
    parts = [body[at : at + size] for at in range(0, len(body), size)] if size else [body]
    return [event for part in parts for event in stream.events(part)] + list(stream.close())


def one(text: str, ids: list[int], tokens: list[str], finish: str | None = None) -> dict[str, Any]:
    return {"choices": [choice(text, ids, tokens, finish)]}


def test_a_stream_tells_each_token_and_with_the_last_all_of_it() -> None:
    body = sse(one("a", [7], ["a"]), one("b", [8], ["b"]), one("", [2], ["</s>"], "stop"), USAGE)
    for size in (None, 1, 7, 100):
        told = events(Stream(request(return_full_text=True), PLAIN), body, size)
        assert [event["token"]["text"] for event in told] == ["a", "b", "</s>"]
        assert [event["token"]["special"] for event in told] == [False, False, True]
        assert [event["generated_text"] for event in told] == [None, None, "ask: ab"]
        assert told[-1]["details"] == {
            "finish_reason": "eos_token", "prompt_tokens": 5, "generated_tokens": 3, "seed": None
        }  # fmt: skip
        assert told[0]["details"] is None


def test_tokens_that_come_together_are_told_one_by_one() -> None:
    told = events(Stream(request(), PLAIN), sse(one("ab", [7, 8], ["a", "b"], "length"), USAGE))
    assert [event["token"]["text"] for event in told] == ["a", "b"]
    assert [event["token"]["id"] for event in told] == [7, 8]
    assert told[-1]["generated_text"] == "ab"


tokens = st.lists(st.tuples(st.sampled_from([2, 7, 8]), st.text(max_size=2)), max_size=3)


@given(st.lists(st.tuples(st.text(max_size=3), tokens), min_size=1, max_size=5))
def test_what_is_not_special_gives_the_text_however_the_tokens_read(said: list[Any]) -> None:
    chunks = [one(text, [id for id, _ in tokens], [read for _, read in tokens]) for text, tokens in said]
    chunks.append(one("", [7], ["z"], "length"))
    told = events(Stream(request(), PLAIN), sse(*chunks, USAGE))
    texts = "".join(event["token"]["text"] for event in told if not event["token"]["special"])
    assert texts == "".join(text for text, _ in said) == told[-1]["generated_text"]


@pytest.mark.parametrize(
    "rest", [b"", b"data: [DONE]\n\n", b"data: {\n\n", b'data: {"choices": [{}]}\n\n', b"data: 1\n\n"]
)
def test_a_stream_that_breaks_off_says_so(rest: bytes) -> None:
    begun = sse(one("a", [7], ["a"])).removesuffix(b"data: [DONE]\n\n")
    *told, last = events(Stream(request(), PLAIN), begun + rest)
    assert [event["token"]["text"] for event in told] == ["a"]
    assert last["error_type"] == "incomplete_generation"


def test_an_error_in_a_stream_is_told_in_it() -> None:
    body = sse(one("a", [7], ["a"]), {"error": {"message": "it ended", "code": 500}}, one("b", [8], ["b"]))
    told = events(Stream(request(), PLAIN), body)
    assert told[1:] == [{"error": "it ended", "error_type": "generation"}]
