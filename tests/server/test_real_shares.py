"""A name that several revisions share, and a shadow of one, on real vLLM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.real import PROMPTS, answer_of, write_checkpoint
from tests.world import World

pytestmark = pytest.mark.timeout(240)

CANARY, STABLE = 3, 1  # which adapters answer


@pytest.fixture
def client(world: World) -> Iterator[httpx.Client]:
    """Of a server on which `shared` is step 100, shared with step 200 for a fifth of the requests."""
    run = world.watched / "shared"
    write_checkpoint(run, world.adapters[STABLE], 100)
    write_checkpoint(run, world.adapters[CANARY], 200)
    with world.server.client() as client:
        world.server.wait_until(lambda: len(world.server.adapter("shared")["revisions"]) == 2)
        shares = [{"revision": "step-200", "share": 0.2}, {"revision": "step-100", "share": 0.8}]
        put(client, {"shares": shares})
        yield client
        assert client.delete("/v1/adapters/shared").status_code == 200


def put(client: httpx.Client, meant: dict[str, Any]) -> None:
    answer = client.put("/v1/adapters/shared/aliases/shared", json=meant)
    assert answer.status_code == 200, answer.text


def ask(client: httpx.Client, number: int, **more: Any) -> tuple[int, httpx.Response]:
    body = {"model": "shared", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 1, "temperature": 0, **more}
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return number, answer


def asked(client: httpx.Client, count: int, **more: Any) -> Counter[str]:
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda number: ask(client, number, **more), range(count)))
    return Counter(answer.headers["x-lorakit-revision"].rpartition("-")[0] for _, answer in answers)


def test_each_has_its_share_and_every_answer_is_wholly_of_the_one_that_it_names(
    world: World, client: httpx.Client
) -> None:
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda number: ask(client, number, max_tokens=6, logprobs=1), range(150)))
    counts: Counter[int] = Counter()
    for number, answer in answers:
        found = answer_of(answer.json(), answer.headers["x-lorakit-revision"])
        adapter = CANARY if str(found.revision).startswith("shared@step-200-") else STABLE
        assert found.agrees_with(world.cold_answer(adapter, PROMPTS[number % len(PROMPTS)]))
        counts[adapter] += 1
    assert abs(counts[CANARY] - 30) <= 2


def test_a_user_meets_one_revision_and_shadows_agree_with_themselves_alone(world: World, client: httpx.Client) -> None:
    for user in range(10):
        assert len(asked(client, 4, user=f"user-{user}")) == 1
    write_checkpoint(world.watched / "shared", world.adapters[STABLE], 300)  # what step 100 is, too
    world.server.wait_until(lambda: len(world.server.adapter("shared")["revisions"]) == 3)
    put(client, {"revision": "step-100", "shadow": ["step-200", "step-300"]})
    for number in range(6):
        ask(client, number, max_tokens=6, stream=bool(number % 2))

        def answered(count: int = number + 1) -> Any:
            rows = client.get("/v1/adapters/shared/comparison").json()["revisions"]
            return rows if [row["requests"] + row["dropped"] for row in rows if row["shadow"]] == [count] * 2 else None

        rows = world.server.wait_until(answered)
    stable, other, same = rows
    assert [row["errors"] for row in rows] == [0, 0, 0]
    assert stable["seconds"]["p50"] > 0
    assert 1 <= stable["generated"]["mean"] <= 6
    assert same["requests"] > 0
    assert same["agreement"] == {"compared": same["requests"], "equal": 1.0, "prefix": 1.0}
    assert other["agreement"]["equal"] < 1


@pytest.mark.slow
def test_of_ten_thousand_requests_the_share_is_within_one_percent(client: httpx.Client) -> None:
    counts = asked(client, 10_000)
    assert counts.total() == 10_000
    assert abs(counts["shared@step-200"] - 2_000) <= 100
