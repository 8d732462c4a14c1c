"""`lorakit sync`: what it says of an engine, and of what it can't do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.commands import lorakit
from tests.server.fake_vllm import FakeVllm, answering

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def vllm(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    monkeypatch.setenv("LORAKIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LORAKIT_ENGINE_KEY", raising=False)
    return FakeVllm(base, slots=3, removes=True)


@pytest.fixture
def url(vllm: FakeVllm) -> Iterator[str]:
    with answering(vllm) as there:
        yield there


def test_a_dry_run_says_what_the_engine_offers_and_gives_it_nothing(capsys: Capture, vllm: FakeVllm, url: str) -> None:
    vllm.put("theirs", "/elsewhere", "theirs")
    told = json.loads(lorakit(capsys, "sync", url, "--dry-run", "--json").out)
    assert told == {"engine": "vllm 0.32.0", "base": "base", "slots": 3, "removes": True, "there": ["theirs"]}
    ended = lorakit(capsys, "sync", url, "--dry-run", "--max-loras", 2)
    assert ended.out == "vllm 0.32.0, base 'base': 2 adapters at once, which it can let go of; 1 are there\n"
    assert list(vllm.named) == ["theirs"]


def test_what_can_not_be_used_is_said_before_anything_is_changed(
    capsys: Capture, vllm: FakeVllm, url: str, tmp_path: Path
) -> None:
    for said, code, words in (
        (["127.0.0.1:8001"], 2, "http://HOST:PORT"),
        ([url, "--watch", str(tmp_path / "nowhere")], 3, "no folder"),
        ([url, "--names", str(tmp_path / "nowhere" / "names.json")], 3, "--names"),
        ([url, "--host", "0.0.0.0"], 4, "API key"),
    ):
        ended = lorakit(capsys, "sync", *said, "--dry-run")
        assert (ended.code, ended.out) == (code, "")
        assert words in ended.err
    vllm.key = "secret"
    ended = lorakit(capsys, "sync", url, "--dry-run")
    assert (ended.code, "LORAKIT_ENGINE_KEY" in ended.err) == (1, True)


def test_where_nothing_answers_a_dry_run_says_so(capsys: Capture, vllm: FakeVllm) -> None:
    ended = lorakit(capsys, "sync", "http://127.0.0.1:9", "--dry-run", "--json")
    assert ended.code == 1
    assert "does not answer" in json.loads(ended.out)["error"]["message"]
