"""LoRAX's parameters as vLLM's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from lorakit.server.dialects.lorax.request import CHAT, COMPLETIONS, Generate, Invalid, as_openai


def asked(stream: bool = False, inputs: str = "hello", **parameters: Any) -> dict[str, Any]:
    request = Generate.model_validate({"inputs": inputs, "parameters": parameters})
    return dict(as_openai(request, "sql", 20, stream=stream).body)


def test_nothing_said_is_greedy_and_reads_no_default_of_the_base() -> None:
    body = asked()
    assert body == {
        "model": "sql", "prompt": "hello", "max_tokens": 20, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "ignore_eos": False,
    }  # fmt: skip
    assert Generate.model_validate({"inputs": "a", "parameters": None}) == Generate(inputs="a")


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({"do_sample": True}, 1.0), ({"temperature": 0.7}, 0.7), ({"top_k": 5}, 1.0), ({"top_p": 0.9}, 1.0),
        ({"temperature": 1.0}, 0.0), ({"temperature": 0.0, "do_sample": True, "top_k": 5}, 0.0),
        ({"do_sample": True, "temperature": 0.2}, 0.2), ({"repetition_penalty": 1.2, "seed": 7}, 0.0),
    ],
)  # fmt: skip
def test_it_samples_where_lorax_does(parameters: dict[str, Any], temperature: float) -> None:
    assert asked(**parameters)["temperature"] == temperature


def test_each_parameter_has_its_place() -> None:
    body = asked(
        do_sample=True, seed=7, top_k=5, top_p=0.9, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.3,
        stop=["\n", "user:"], truncate=12, ignore_eos_token=True, return_full_text=True, api_token="hf_secret",
    )  # fmt: skip
    said = {
        "seed": 7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.2,
        "presence_penalty": 0.3, "stop": ["\n", "user:"], "include_stop_str_in_output": True,
        "truncate_prompt_tokens": 12, "truncation_side": "left", "ignore_eos": True,
    }  # fmt: skip
    assert said.items() <= body.items()
    assert "hf_secret" not in json.dumps(body)


def test_tokens_are_asked_for_where_they_are_told() -> None:
    assert not {"logprobs", "return_token_ids"} & asked().keys()
    assert asked(details=True).items() >= {"logprobs": 0, "return_token_ids": True}.items()
    assert asked(decoder_input_details=True)["prompt_logprobs"] == 0
    assert asked(stream=True).items() >= {"logprobs": 0, "stream_options": {"include_usage": True}}.items()
    several = asked(details=True, return_k_alternatives=3)
    assert several.items() >= {"logprobs": 3, "return_tokens_as_token_ids": True}.items()
    best = asked(best_of=4, do_sample=True)
    assert best.items() >= {"n": 4, "logprobs": 0}.items()  # by which the best is chosen


def test_a_chat_template_is_the_chat_routes_matter() -> None:
    def put(inputs: str) -> Any:
        request = Generate.model_validate({"inputs": inputs, "parameters": {"apply_chat_template": True}})
        found = as_openai(request, "sql", None, stream=False)
        assert found.path == CHAT
        return found.body["messages"]

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert put(json.dumps(messages)) == messages
    for plain in ("hello", "[1, 2]", "[]", '{"role": "user"}', "[" * 100_000):
        assert put(plain) == [{"role": "user", "content": plain}]
    assert as_openai(Generate(inputs="a"), "sql", 1, stream=False).path == COMPLETIONS


@pytest.mark.parametrize("given", [{"a": 1}, '{"a": 1}'])
def test_json_is_made_to_a_schema(given: Any) -> None:
    said = asked(response_format={"type": "json_object", "schema": given})["response_format"]
    assert said["type"] == "json_schema"
    assert said["json_schema"]["schema"] == {"a": 1}
    assert asked(response_format={"type": "json_object"})["response_format"] == {"type": "json_object"}


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"typical_p": 0.5}, "typical"), ({"watermark": True}, "watermark"), ({"best_of": 2}, "sampling"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"), ({"top_p": 1.0}, "top_p"), ({"top_k": 0}, "top_k"),
        ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"seed": -1}, "seed"), ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"), ({"truncate": 0}, "truncate"), ({"adapter_source": "gs"}, "adapter_source"),
        ({"merged_adapters": {"ids": []}}, "ids"), ({"merged_adapters": {"ids": ["a"], "weights": [1, 2]}}, "length"),
        ({"merged_adapters": {"ids": ["a"], "merge_strategy": "slerp"}}, "merge_strategy"),
        ({"merged_adapters": {"ids": ["a"]}, "adapter_id": "b"}, "at most one"),
        ({"response_format": {"type": "json_object", "schema": "[]"}}, "schema"),
        ({"response_format": {"type": "json_object", "schema": "{"}}, "schema"),
    ],
)  # fmt: skip
def test_what_can_not_be_answered_as_lorax_would_is_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Generate.model_validate({"inputs": "a", "parameters": parameters})


def test_an_empty_prompt_is_none() -> None:
    with pytest.raises(ValidationError):
        Generate.model_validate({"inputs": ""})


def test_what_needs_the_whole_answer_is_not_streamed() -> None:
    for parameters in ({"best_of": 2, "do_sample": True}, {"decoder_input_details": True}):
        with pytest.raises(Invalid, match="streamed"):
            Generate.model_validate({"inputs": "a", "parameters": parameters}).refuse_in_stream()


numbers = st.none() | st.integers(-3, 3) | st.floats(allow_nan=True) | st.text(max_size=3)


@given(
    st.dictionaries(st.sampled_from(["temperature", "top_p", "top_k", "seed", "truncate", "best_of", "stop"]), numbers)
)
def test_a_body_for_vllm_is_always_json(parameters: dict[str, Any]) -> None:
    try:
        body = asked(**parameters)
    except ValidationError:
        return
    assert json.loads(json.dumps(body, allow_nan=False)) == body
