"""Log lines that a person reads, and that a program reads."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest

from lorakit.errors import UsageError
from lorakit.server.requests.answered import Answered
from lorakit.server.settings import from_environment
from lorakit.server.sight.logs import JsonLines, TextLines, engine_line, log, log_answered, log_to_stderr, own_line
from lorakit.server.sight.request_id import current_request
from lorakit.store.catalog import Facts, Revision
from tests.server.fake_engine import put_checkpoint, serving

SQL = Revision(1, "sql", "step", "3fa9c1d2" + "0" * 56, Path(), Facts(step=500), 8, 100, "", 0.0)


@pytest.fixture
def lines(request: pytest.FixtureRequest) -> Iterator[StringIO]:
    """What lorakit logs in one format."""
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield stream
    log.setLevel(before)
    log.removeHandler(handler)


as_json = pytest.mark.parametrize("lines", [JsonLines], indirect=True)
as_text = pytest.mark.parametrize("lines", [TextLines], indirect=True)


@as_json
def test_an_answer_is_one_json_object_with_all_that_is_known_of_it(lines: StringIO) -> None:
    token = current_request.set("r-1")
    log_answered(Answered("sql", "/v1/completions", 200, 0.25, SQL, "r-1", 0.1, 0.0, 12, 34, key="3fa9c1d2"))
    current_request.reset(token)
    (line,) = lines.getvalue().splitlines()
    said = json.loads(line)
    assert said.pop("time").endswith("Z")
    assert said.pop("message").startswith("200 /v1/completions sql (sql@step-500-3fa9c1d2) in 0.250 s")
    assert said == {
        "level": "info", "logger": "lorakit", "request_id": "r-1", "status": 200, "path": "/v1/completions",
        "model": "sql", "revision": "sql@step-500-3fa9c1d2", "seconds": 0.25, "first_byte": 0.1, "waited": 0.0,
        "prompt_tokens": 12, "completion_tokens": 34, "key": "3fa9c1d2",
    }  # fmt: skip


@as_text
def test_an_answer_is_one_line_of_text_with_its_request(lines: StringIO) -> None:
    token = current_request.set("r-1")
    log_answered(Answered("sql", "/v1/completions", 200, 0.25, SQL, "r-1", 0.1, 0.0, 12, 34))
    current_request.reset(token)
    log_answered(Answered("llama", "/v1/completions", 503, 0.25))
    log_answered(Answered("", "/v1/completions", 400, 0.25))
    assert lines.getvalue().splitlines() == [
        "lorakit: 200 /v1/completions sql (sql@step-500-3fa9c1d2) in 0.250 s, 12 + 34 tokens [r-1]",
        "lorakit: 503 /v1/completions llama in 0.250 s",
        "lorakit: 400 /v1/completions in 0.250 s",
    ]


@pytest.mark.parametrize("lines", [TextLines, JsonLines], indirect=True)
def test_a_name_that_holds_a_line_or_an_escape_makes_no_line_of_its_own(lines: StringIO) -> None:
    log_answered(Answered("a\nlorakit: all is well\x1b[2J\u202e\ud800" + "x" * 5000, "/v1/completions", 404, 0.1))
    (line,) = lines.getvalue().splitlines()
    assert line.isprintable()
    assert line.isascii()
    assert len(line) < 1000


@pytest.mark.parametrize(
    ("text", "level", "message"),
    [
        ("INFO 11-21 17:00:00 [core.py:1] up", "info", "INFO 11-21 17:00:00 [core.py:1] up"),
        ("(EngineCore pid=7) ERROR 11-21 x", "error", "(EngineCore pid=7) ERROR 11-21 x"),
        ("Traceback (most recent call last):", "info", "Traceback (most recent call last):"),
        ("{not json", "info", "{not json"),
        ("[1]", "info", "[1]"),
        ("", "info", ""),
    ],
)
def test_a_line_of_the_engines_becomes_an_object_in_a_log_of_objects(text: str, level: str, message: str) -> None:
    said = json.loads(engine_line(text, "json"))
    assert (said["level"], said["logger"], said["message"]) == (level, "engine", message)
    assert engine_line(text, "text") == text


def test_an_object_of_the_engines_process_is_passed_on_as_it_is() -> None:
    line = '{"level": "info", "message": "mine"}'
    assert engine_line(line, "json") == line == engine_line(line, "text")


def test_the_supervisor_speaks_in_the_same_format() -> None:
    assert own_line("stopping", "text") == "lorakit: stopping"
    assert json.loads(own_line("stopping", "json"))["message"] == "stopping"


@as_json
@pytest.mark.anyio
async def test_every_line_of_a_running_server_is_an_object_and_none_holds_a_prompt_or_a_key(
    tmp_path: Path, numbers: Path, lines: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_API_KEY", "sk-very-secret")
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    put_checkpoint(tmp_path / "runs" / "sql", 200, rank=32)
    headers = {"authorization": "Bearer sk-very-secret", "cookie": "session-of-mine"}
    async with serving(tmp_path, numbers, headers=headers) as served:
        await served.ask("sql", user="what-nobody-reads", suffix="prompt-of-mine")
        await served.ask("nobody-of-this-name")
        await served.client.get("/v1/models", headers={"authorization": "Bearer sk-wrong-one"})
    said = [json.loads(line) for line in lines.getvalue().splitlines()]
    events = [one["event"] for one in said if "event" in one]
    assert {"found", "loaded", "alias", "ready", "refused"} <= set(events)
    assert [one["status"] for one in said if "status" in one] == [200, 404]
    assert all(one["request_id"] for one in said if "status" in one)
    for secret in ("secret", "sk-wrong", "session-of-mine", "prompt-of-mine", "what-nobody-reads"):
        assert secret not in lines.getvalue()


def test_the_format_is_a_setting_and_another_word_is_refused() -> None:
    assert from_environment({}).log_format == "text"
    assert from_environment({"LORAKIT_LOG_FORMAT": "json"}).log_format == "json"
    with pytest.raises(UsageError, match="text, json"):
        from_environment({"LORAKIT_LOG_FORMAT": "xml"})


def test_whoever_reads_stderr_slowly_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    slow = os.fdopen(writer, "w")
    monkeypatch.setattr("sys.stderr", slow)
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    log_to_stderr()
    lines = [f"{number} {'x' * 1000}" for number in range(300)]  # a pipe holds 64 KiB
    for line in lines:
        log.info(line)
    read = ""
    while read.count("\n") < len(lines):
        read += os.read(reader, 1 << 16).decode()
    assert read.splitlines() == [f"lorakit: {line}" for line in lines]
