"""Two real servers, each with a vLLM and a home of its own, that share a bucket of a real S3 server."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.bucket import SERVICES, client, environment, s3_server
from tests.server.real import PROMPTS, Server, ask, serving, write_checkpoint
from tests.world import World

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
FLAGS = ("--max-loras", "2", "--max-lora-rank", "8", "--store", "s3://models/shared")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_server() as address:
        monkeypatch.setattr(sys, "path", [*sys.path, str(SERVICES)])
        monkeypatch.setenv("PYTHONPATH", str(SERVICES))
        for name, value in environment(address).items():
            monkeypatch.setenv(name, value)
        with client(address):
            yield address


def assert_answers(world: World, server: Server, model: str, adapter: int) -> None:
    with server.client() as http:
        for prompt in PROMPTS:
            assert ask(http, model, prompt).agrees_with(world.cold_answer(adapter, prompt)), model


def seconds_until(server: Server, step: int) -> float:
    began = time.monotonic()

    def answers() -> bool:
        with server.client() as http:
            return f"@step-{step}-" in (ask(http, "sql").revision or "")

    server.wait_until(answers)
    return time.monotonic() - began


def test_what_one_takes_in_the_other_answers_with_and_an_alias_is_the_same_on_both(
    world: World, tmp_path: Path, bucket: str
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    write_checkpoint(runs / "sql", world.adapters[0], 1)
    with (
        serving(world.base, tmp_path / "one", tmp_path / "one.log", "--watch", str(runs), *FLAGS) as one,
        serving(world.base, tmp_path / "other", tmp_path / "other.log", *FLAGS) as other,
    ):
        assert_answers(world, other, "sql", 0)  # it was ready, so it has what was there
        waited = []
        for step in (2, 3, 4):
            write_checkpoint(runs / "sql", world.adapters[step - 1], step)
            seconds_until(one, step)
            waited.append(seconds_until(other, step))
            for server in (one, other):
                assert_answers(world, server, "sql", step - 1)
        assert sorted(waited)[1] < 1.0, waited
        httpx.post(f"{other.url}/v1/adapters/sql/rollback", timeout=60).raise_for_status()
        seconds_until(one, 3)
        for server in (one, other):
            assert_answers(world, server, "sql", 2)
            assert_answers(world, server, "sql@step-1", 0)
    with serving(world.base, tmp_path / "other", tmp_path / "other.log", *FLAGS) as again:
        assert_answers(world, again, "sql", 2)
