"""`lorakit sync` beside a plain vLLM that its clients ask themselves: checkpoints appear, rotate and roll back there,
under names that were never used before, and no answer is stale, mixed or missing."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.server.real import PROMPTS, Answer, Server, answer_of, ask, started, write_checkpoint
from tests.world import ADAPTERS, PLACES, World

pytestmark = pytest.mark.timeout(240)


@dataclass
class Beside:
    """`server` has lorakit's own routes; its clients ask the vLLM at `engine`."""

    server: Server
    engine: str
    watched: Path
    file: Path

    @property
    def names(self) -> dict[str, str]:
        names: dict[str, str] = json.loads(self.file.read_text())["names"] if self.file.exists() else {}
        return names

    def until(self, name: str, beginning: str) -> str:
        self.server.wait_until(lambda: self.names.get(name, "").startswith(beginning))
        return self.names[name]


@pytest.fixture
def beside(world: World, tmp_path: Path) -> Iterator[Beside]:
    (tmp_path / "runs").mkdir()
    file = tmp_path / "names.json"
    flags = ("--watch", str(tmp_path / "runs"), "--names", str(file), "--max-loras", str(PLACES), "--linger", "3")
    with started(tmp_path, "sync", world.plain, *flags) as server:
        yield Beside(server, world.plain, tmp_path / "runs", file)
        with server.client() as client:  # others need the places
            client.delete("/v1/adapters/sql").raise_for_status()
        server.wait_until(lambda: not revisions_in(world.plain))


def revisions_in(engine: str) -> list[str]:
    cards = httpx.get(f"{engine}/v1/models").json()["data"]
    return [card["id"] for card in cards if card["id"].startswith("sql@")]


def streamed(client: httpx.Client, model: str, prompt: str) -> Answer:
    asked = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1, "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200, response.read()
        said = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    parts = [answer_of(json.loads(part), None) for part in said]
    tokens = tuple(token for part in parts for token in part.tokens)
    return Answer(tokens, tuple(logprob for part in parts for logprob in part.logprobs), None)


@dataclass
class Clients:
    """Ask the vLLM, without a pause, for what the file says that `sql` means."""

    beside: Beside
    world: World
    ends: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str, Answer | Exception]] = field(default_factory=list)

    def run(self, number: int) -> None:
        turn = number
        with httpx.Client(base_url=self.beside.engine, timeout=60) as client:
            while not self.ends.is_set():
                turn += 1
                model, prompt = self.beside.names["sql"], PROMPTS[turn % len(PROMPTS)]
                got: Answer | Exception
                try:
                    got = streamed(client, model, prompt) if turn % 2 else ask(client, model, prompt)
                except Exception as error:
                    got = error
                self.asked.append((model, prompt, got))

    def check(self) -> None:
        for model, prompt, got in self.asked:
            assert not isinstance(got, Exception), f"{model}: {got}"
            step = re.match(r"sql@step-(\d+)-", model)
            assert step is not None
            assert got.agrees_with(self.world.cold_answer(int(step[1]) % ADAPTERS, prompt)), model
        assert len({model for model, _, _ in self.asked}) > PLACES


def test_checkpoints_appear_rotate_and_roll_back_under_load_and_nothing_is_stale(world: World, beside: Beside) -> None:
    write_checkpoint(beside.watched / "sql", world.adapters[1], 1)
    beside.until("sql", "sql@step-1-")
    clients = Clients(beside, world)
    threads = [threading.Thread(target=clients.run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        for step in range(2, PLACES + 3):
            write_checkpoint(beside.watched / "sql", world.adapters[step % ADAPTERS], step)
            shutil.rmtree(beside.watched / "sql" / f"checkpoint-{step - 1}")  # as a trainer rotates
            beside.until("sql", f"sql@step-{step}-")
        with beside.server.client() as client:
            client.post("/v1/adapters/sql/rollback").raise_for_status()
            beside.until("sql", f"sql@step-{step - 1}-")
            client.put("/v1/adapters/sql/aliases/sql", json={"revision": "latest"}).raise_for_status()
        beside.until("sql", f"sql@step-{step}-")
        time.sleep(1)  # asked for a while after the last move
    finally:
        clients.ends.set()
        for thread in threads:
            thread.join()
    clients.check()


def test_a_folder_that_is_written_over_is_another_name_and_the_first_answers_as_before(
    world: World, beside: Beside
) -> None:
    folder = write_checkpoint(beside.watched / "sql", world.adapters[2], 7)
    first = beside.until("sql", "sql@step-7-")
    shutil.rmtree(folder)
    write_checkpoint(beside.watched / "sql", world.adapters[3], 7)
    beside.server.wait_until(lambda: beside.names["sql"] != first)
    second = beside.names["sql"]
    with httpx.Client(base_url=beside.engine, timeout=60) as client:
        assert ask(client, second).agrees_with(world.cold_answer(3, PROMPTS[0]))
        assert ask(client, first).agrees_with(world.cold_answer(2, PROMPTS[0]))
