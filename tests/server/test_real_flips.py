"""A name moves from one revision to the next while clients stream: each answer is wholly of one, as PEFT has it.

And what plain vLLM does when an adapter is loaded in place of another.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.server.peft_oracle import PeftOracle
from tests.server.real import Server, plain_vllm, write_checkpoint
from tests.world import World

CLIENTS = 32
PROMPTS = (tuple(range(40, 176)), tuple(range(60, 70)))  # one of more than a block of the prefix cache
LENGTH = 48  # tokens of an answer, which takes longer than a move


@dataclass(frozen=True)
class Streamed:
    """One answer, `begun` and `ended` as time.monotonic; `models` are all names that it gave itself."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    revision: str
    models: frozenset[str]
    begun: float
    ended: float


async def stream(client: httpx.AsyncClient, model: str, prompt: tuple[int, ...]) -> Streamed:
    asked = {
        "model": model, "prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "logprobs": 0, "stream": True,
        "return_tokens_as_token_ids": True, "ignore_eos": True,
    }  # fmt: skip
    tokens: list[int] = []
    logprobs: list[float] = []
    models: set[str] = set()
    begun = time.monotonic()
    async with client.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                said = json.loads(line[6:])
                models.add(said["model"])
                found = said["choices"][0]["logprobs"]
                tokens += [int(token.removeprefix("token_id:")) for token in found["tokens"]]
                logprobs += found["token_logprobs"]
    assert len(tokens) == LENGTH, "it broke off"
    revision = response.headers.get("x-lorakit-revision", "")
    return Streamed(prompt, tuple(tokens), tuple(logprobs), revision, frozenset(models), begun, time.monotonic())


async def streams_while(
    url: str, model: str, moves: Callable[[httpx.AsyncClient], Awaitable[None]]
) -> list[Streamed | Exception]:
    """What the clients got, or what went wrong, while `moves` ran."""
    seen: list[Streamed | Exception] = []
    ends = asyncio.Event()

    async def keep_streaming(number: int) -> None:
        while not ends.is_set():
            try:
                seen.append(await stream(client, model, PROMPTS[number % len(PROMPTS)]))
            except Exception as error:  # every failure is a finding
                seen.append(error)

    limits = httpx.Limits(max_connections=CLIENTS + 4)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        tasks = [asyncio.create_task(keep_streaming(number)) for number in range(CLIENTS)]
        try:
            await moves(client)
        finally:
            ends.set()
            await asyncio.gather(*tasks)
    return seen


@dataclass(frozen=True)
class Move:
    """From when a name may mean a revision, and from when it means no other any more."""

    revision: str
    asked: float
    done: float


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("seconds", "every"), [pytest.param(60.0, 1.0, marks=pytest.mark.slow), (8.0, 0.8)], ids=["a_minute", "short"]
)
def test_a_name_that_moves_under_streams_mixes_no_answer_and_fails_none(
    world: World, seconds: float, every: float
) -> None:
    run = "flips" if every == 1.0 else "flip"
    revisions: dict[str, int] = {}
    for step, adapter in enumerate(range(4), start=1):  # more than there are slots
        write_checkpoint(world.watched / run, world.adapters[adapter], step)
        named = world.server.wait_until(lambda step=step: _at_step(world, run, step))
        revisions[named] = adapter
    seen = streamed_while_it_moves(
        world.server, run, revisions, PeftOracle(world.base, world.adapters[:4]), seconds, every
    )
    assert {answer.revision for answer in seen} == set(revisions)


def streamed_while_it_moves(
    server: Server, run: str, revisions: Mapping[str, int], oracle: PeftOracle, seconds: float, every: float
) -> list[Streamed]:
    """What the clients of an alias of a run got while that moved on from one revision to the next: nothing failed, each
    answer is wholly of one, and of one that the alias meant. `revisions`: the oracle's adapter of each."""
    moves: list[Move] = []

    async def move_on(client: httpx.AsyncClient) -> None:
        ends = time.monotonic() + seconds
        while time.monotonic() < ends or len(moves) <= 2 * len(revisions):  # on a slow machine a move takes longer
            revision = list(revisions)[len(moves) % len(revisions)]
            asked = time.monotonic()
            answer = await client.put(f"/v1/adapters/{run}/aliases/now", json={"revision": revision})
            assert answer.status_code == 200, answer.text
            moves.append(Move(revision, asked, time.monotonic()))
            await asyncio.sleep(max(every / 2, asked + every - time.monotonic()))

    with server.client() as client:
        first = list(revisions)[-1]
        client.put(f"/v1/adapters/{run}/aliases/now", json={"revision": first}).raise_for_status()
    moves.append(Move(first, 0.0, 0.0))
    seen = wholly_of_one(asyncio.run(streams_while(server.url, f"{run}@now", move_on)), revisions, oracle)
    assert len(seen) > CLIENTS
    for answer in seen:
        assert answer.revision in meant_between(moves, answer.begun, answer.ended)
    return seen


def wholly_of_one(
    seen: Sequence[Streamed | Exception], revisions: Mapping[str, int], oracle: PeftOracle
) -> list[Streamed]:
    """The same answers: none failed, and each is of the one revision that it says, to its last token."""
    found = []
    for answer in seen:
        assert isinstance(answer, Streamed), f"{type(answer).__name__}: {answer}"
        assert answer.models == {answer.revision}
        adapter = revisions[answer.revision]
        assert oracle.agreement(adapter, answer.prompt, answer.tokens, answer.logprobs) == LENGTH
        found.append(answer)
    return found


def _at_step(world: World, run: str, step: int) -> str | None:
    name = world.server.adapter(run)["revision"]
    return str(name) if name and name.startswith(f"{run}@step-{step}-") else None


def meant_between(moves: Sequence[Move], begun: float, ended: float) -> set[str]:
    """What a name may have meant to a request that came in between two moments: for the next one, a move counts."""
    settled = [move for move in moves if move.done <= begun]
    return {settled[-1].revision, *(move.revision for move in moves if move.done > begun and move.asked < ended)}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_same_on_vllms_own_reload_in_place_mixes_answers(world: World, tmp_path: Path) -> None:
    """An answer that is underway goes on with the new weights, over keys and values that the old ones made."""

    def loading(adapter: int, *, inplace: bool) -> dict[str, str | bool]:
        return {"lora_name": "flip", "lora_path": str(world.adapters[adapter]), "load_inplace": inplace}

    async def reload(client: httpx.AsyncClient) -> None:
        for move in range(1, 21):
            await asyncio.sleep(1.0)
            asked = loading(move % 2, inplace=True)
            (await client.post("/v1/load_lora_adapter", json=asked)).raise_for_status()

    with plain_vllm(world.base, tmp_path / "plain.log", max_loras=2, max_rank=8) as plain:
        plain.post("/v1/load_lora_adapter", json=loading(0, inplace=False)).raise_for_status()
        seen = asyncio.run(streams_while(str(plain.base_url), "flip", reload))
    oracle = PeftOracle(world.base, world.adapters[:2])
    kinds: Counter[str] = Counter()
    for answer in seen:
        assert isinstance(answer, Streamed), f"{type(answer).__name__}: {answer}"
        agrees = [oracle.agreement(adapter, answer.prompt, answer.tokens, answer.logprobs) for adapter in range(2)]
        kinds["whole" if LENGTH in agrees else "mixed" if max(agrees) > 0 else "of neither"] += 1
    assert kinds["whole"] > 0, "the oracle knows the answers that no reload touched"
    assert kinds["mixed"] > 0, "answers that begin as one adapter and do not go on as it"
