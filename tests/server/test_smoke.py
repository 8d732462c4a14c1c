"""Smoke prompts: read strictly, asked of the engine, and judged by what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import NotFound, UsageError
from lorakit.server.following.smoke import read_smokes, what_fails

pytestmark = pytest.mark.anyio


def smokes(folder: Path, *lines: Any) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


class Talker:
    """An engine that says what it was told to."""

    def __init__(self, answer: Any, status: int = 200) -> None:
        self.answer, self.status = answer, status
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        self.asked.append((path, body))
        return self.status, self.answer if isinstance(self.answer, bytes) else json.dumps(self.answer).encode()


def completion(text: str, *logprobs: float | None) -> dict[str, Any]:
    return {"choices": [{"text": text, "logprobs": {"token_logprobs": list(logprobs)}}]}


async def judged(folder: Path, answer: Any, status: int = 200, **smoke: Any) -> str | None:
    engine: Any = Talker(answer, status)
    return await what_fails(engine, "sql@step-5", read_smokes(smokes(folder, {"prompt": "hi", **smoke})))


async def test_each_prompt_is_asked_of_the_revision_greedily_and_with_logprobs(tmp_path: Path) -> None:
    file = smokes(tmp_path, {"prompt": "1+1="}, "", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3})
    engine: Any = Talker({"choices": [{"text": "2", "message": {"content": "y"}}]})
    assert await what_fails(engine, "sql@step-5", read_smokes(file)) is None
    assert [path for path, _ in engine.asked] == ["/v1/completions", "/v1/chat/completions"]
    assert [(body["model"], body["temperature"], body["max_tokens"]) for _, body in engine.asked] == [
        ("sql@step-5", 0, 16), ("sql@step-5", 0, 3),
    ]  # fmt: skip
    assert [body["logprobs"] for _, body in engine.asked] == [1, True]


async def test_what_an_answer_has_to_hold_or_to_match(tmp_path: Path) -> None:
    answer = completion(" SELECT 1;", -0.1)
    assert await judged(tmp_path, answer, expect="SELECT") is None
    assert await judged(tmp_path, answer, matches="^ select \\d(?i:;)") is not None
    assert await judged(tmp_path, answer, matches="(?i)select \\d;") is None
    assert "line 1: its answer ' SELECT 1;' does not hold 'INSERT'" in str(
        await judged(tmp_path, answer, expect="INSERT")
    )


@pytest.mark.parametrize("logprobs", [(float("nan"),), (-1.0, float("-inf")), (None,)])
async def test_logprobs_that_are_not_finite_never_pass(tmp_path: Path, logprobs: Any) -> None:
    assert "not finite" in str(await judged(tmp_path, completion("SELECT", *logprobs), expect="SELECT"))


async def test_a_chats_logprobs_count_as_well(tmp_path: Path) -> None:
    content = {"content": [{"logprob": float("nan")}]}
    assert "not finite" in str(
        await judged(tmp_path, {"choices": [{"message": {"content": "x"}, "logprobs": content}]})
    )


async def test_an_error_or_what_is_no_answer_does_not_pass(tmp_path: Path) -> None:
    assert "answered 500: out of range" in str(await judged(tmp_path, b"out of range", 500))
    for odd in (b"no JSON", {"choices": []}, {"choices": [{}]}, []):
        assert "can't be read" in str(await judged(tmp_path, odd))


@pytest.mark.parametrize(("line", "said"), [
    ("{", "line 1: it is no JSON"), ("[]", "either"), ("{}", "either"), ({"prompt": "x", "messages": []}, "either"),
    ({"prompt": 5}, "has to be text"), ({"prompt": ""}, "neither empty"), ({"messages": "x"}, "a list"),
    ({"prompt": "x", "expects": "y"}, "unknown key 'expects'"), ({"prompt": "x", "expect": 5}, "have to be text"),
    ({"prompt": "x", "matches": "("}, "no regular expression"), ({"prompt": "x", "max_tokens": 0}, "above 0"),
    ({"prompt": "x", "max_tokens": True}, "above 0"), ("", "holds no smoke prompts"), ("[" * 100_000, "no JSON"),
])  # fmt: skip
def test_a_line_that_is_none_is_said(tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_smokes(smokes(tmp_path, line))


def test_a_file_that_is_not_there_or_no_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no file"):
        read_smokes(tmp_path / "nowhere")
    (tmp_path / "odd").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="can't be read"):
        read_smokes(tmp_path / "odd")
