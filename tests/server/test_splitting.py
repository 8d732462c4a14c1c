"""A name that several revisions share: who answers whom, from the moment it is set, through restarts, to its end."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorakit.server.access import keyring as module
from lorakit.server.requests.answered import Shadowed
from lorakit.store.keys import Allowance, KeyStore
from tests.server.fake_engine import FakeEngine, Served, fingerprint_of, put_checkpoint, serving
from tests.server.speaking_engine import SpeakingEngine
from tests.server.test_gateway import assert_openai_error

pytestmark = pytest.mark.anyio

OTHER = 500
CANARY = {"shares": [{"revision": "step-600", "share": 0.05}, {"revision": "step-500", "share": 0.95}]}
HALVES = {"shares": [{"revision": "step-600", "share": 0.5}, {"revision": "step-500", "share": 0.5}]}


def put(folder: Path, *steps: int) -> dict[int, str]:
    """Checkpoints of `sql`, and the fingerprints of their weights."""
    return {step: fingerprint_of(put_checkpoint(folder / "runs" / "sql", step)) for step in steps}


async def until_there(served: Served, *steps: int) -> dict[int, str]:
    """The names of the revisions."""

    def names() -> dict[int, str]:
        run = served.reconciler.runs.get("sql")
        found = {one.facts.step: one.name for one in run.revisions.values()} if run is not None else {}
        return {step: found[step] for step in steps} if set(steps) <= found.keys() else {}  # type: ignore[index]

    found: dict[int, str] = await served.until(names)
    return found


async def set_split(served: Served, body: dict[str, Any], alias: str = "sql") -> httpx.Response:
    answer = await served.client.put(f"/v1/adapters/sql/aliases/{alias}", json=body)
    assert answer.status_code == 200, answer.text
    return answer


@asynccontextmanager
async def sharing(
    folder: Path, base: Path, body: dict[str, Any], *steps: int, **more: Any
) -> AsyncIterator[tuple[Served, dict[int, str]]]:
    """A server on which these steps, or else 500 and 600, share the name `sql` as `body` says; and their revisions."""
    async with serving(folder, base, **more) as served:
        names = await until_there(served, *(steps or (500, 600)))
        await set_split(served, body)
        yield served, names


async def asked(served: Served, count: int, model: str = "sql", **more: Any) -> Counter[str]:
    """Which revisions answered so many requests, some at once."""
    counts: Counter[str] = Counter()
    for begin in range(0, count, 50):
        asked = [served.ask(model, **more) for _ in range(begin, min(begin + 50, count))]
        counts.update(answer.headers["x-lorakit-revision"] for answer in await asyncio.gather(*asked))
    return counts


def told(served: Served, kind: str) -> list[dict[str, Any]]:
    return [event.data for event in served.reconciler.events.kept if event.kind == kind]


# shares


async def test_requests_from_nobody_are_shared_exactly(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, CANARY) as (served, names):
        counts = await asked(served, 400)
        assert abs(counts[names[600]] - 20) <= 2
        assert counts.total() == counts[names[500]] + counts[names[600]] == 400


@pytest.mark.slow
async def test_of_ten_thousand_requests_the_share_is_within_one_percent(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, CANARY) as (served, names):
        assert abs((await asked(served, 10_000))[names[600]] - 500) <= 10
        users = [served.ask("sql", user=f"u{number}") for number in range(10_000)]
        counts: Counter[str] = Counter()
        for begin in range(0, len(users), 50):
            answers = await asyncio.gather(*users[begin : begin + 50])
            counts.update(answer.headers["x-lorakit-revision"] for answer in answers)
        assert abs(counts[names[600]] - 500) <= 100


async def test_a_user_always_meets_the_same_revision_and_a_larger_share_takes_none_back(
    tmp_path: Path, numbers: Path
) -> None:
    put(tmp_path, 500, 600)
    users = [f"u{number}" for number in range(60)]

    async def met(served: Served) -> dict[str, str]:
        answers = await asyncio.gather(*(served.ask("sql", user=user) for user in users))
        return {user: answer.headers["x-lorakit-revision"] for user, answer in zip(users, answers, strict=True)}

    async with sharing(tmp_path, numbers, {**HALVES, "seed": 3}) as (served, names):
        before = await met(served)
        assert set(before.values()) == set(names.values())
        assert await met(served) == before
    async with serving(tmp_path, numbers) as served:
        assert await met(served) == before, "after a restart"
        await set_split(served, {"shares": [{"revision": "step-600", "share": 0.8},
                                            {"revision": "step-500", "share": 0.2}]})  # fmt: skip
        after = await met(served)
        assert all(after[user] == names[600] for user in users if before[user] == names[600])
        assert after != before


async def test_anthropics_clients_name_their_user_elsewhere_and_it_counts_the_same(
    tmp_path: Path, numbers: Path
) -> None:
    put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, HALVES) as (served, _):
        for user in range(10):
            answer = await served.ask("sql", user=f"u{user}")
            body = {"model": "sql", "messages": [], "metadata": {"user_id": f"u{user}"}}
            other = await served.client.post("/v1/messages", json=body)
            assert other.headers["x-lorakit-revision"] == answer.headers["x-lorakit-revision"]


async def test_a_key_meets_one_revision_where_no_user_is_named(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_API_KEY", "the server's")
    monkeypatch.setattr(module, "LOOK", 0.02)
    put(tmp_path, 500, 600)
    store = KeyStore(tmp_path / "home")
    texts = [store.create(Allowance())[0] for _ in range(8)]
    store.close()
    async with sharing(tmp_path, numbers, HALVES, headers={"Authorization": "Bearer the server's"}) as (served, _):
        assert len(await asked(served, 10)) == 2, "the server's own key is everybody's"

        async def met(text: str) -> set[str]:
            headers = {"Authorization": f"Bearer {text}"}
            answers = [
                await served.client.post("/v1/completions", json={"model": "sql"}, headers=headers) for _ in range(5)
            ]
            return {answer.headers["x-lorakit-revision"] for answer in answers}

        found = [await met(text) for text in texts]
        assert all(len(one) == 1 for one in found)
        assert len(set[str]().union(*found)) == 2


async def test_an_alias_is_shared_by_itself_and_what_names_one_revision_means_that(
    tmp_path: Path, numbers: Path
) -> None:
    put(tmp_path, 500, 600)
    async with serving(tmp_path, numbers, max_mix_error=1.0) as served:
        names = await until_there(served, 500, 600)
        await set_split(served, HALVES, "prod")
        assert set(await asked(served, 10, "sql@prod")) == set(names.values())
        assert set(await asked(served, 4)) == {names[600]}
        assert set(await asked(served, 4, "sql@step-500")) == {names[500]}
        await set_split(served, CANARY)
        mix = await served.ask("mix(sql=1)")
        same = await served.ask("mix(sql@step-500=1)")
        assert mix.headers["x-lorakit-revision"] == same.headers["x-lorakit-revision"], "a mix is of the main one"


async def test_loraxs_clients_meet_its_revisions_and_its_shadow_too(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600, 700)
    body, engine = {**HALVES, "shadow": ["step-700"]}, SpeakingEngine(numbers)
    async with sharing(tmp_path, numbers, body, 500, 600, 700, engine=engine) as (served, names):
        found: list[Shadowed] = []
        served.reconciler.shadow_observers.append(found.append)
        said = {"inputs": "a", "parameters": {"adapter_id": "sql", "max_new_tokens": 4}}
        answers = [await served.client.post("/generate", json=said) for _ in range(4)]
        assert {answer.headers["x-lorakit-revision"] for answer in answers} == {names[500], names[600]}
        await served.until(lambda: len(found) == 4)
        assert {one.revision.name for one in found} == {names[700]}
        assert all(one.agreement is not None for one in found)


# what is told of it


async def test_it_is_told_where_names_are_told_with_its_main_revision_as_what_it_means(
    tmp_path: Path, numbers: Path
) -> None:
    put(tmp_path, 500, 600, 700)
    async with serving(tmp_path, numbers) as served:
        names = await until_there(served, 500, 600, 700)
        assert (await served.client.get("/v1/adapters/sql")).json()["splits"] == {}
        said = (await set_split(served, {**CANARY, "shadow": ["sql@step-700"], "seed": 7})).json()
        meant = {
            "shares": [{"revision": names[600], "share": 0.05}, {"revision": names[500], "share": 0.95}],
            "shadow": [names[700]], "seed": 7,
        }  # fmt: skip
        assert said["splits"] == {"sql": meant}
        assert said["revision"] == said["aliases"]["sql"] == names[500]
        assert said["follow"] == "manual"
        cards = {card["id"]: card for card in (await served.client.get("/v1/models")).json()["data"]}
        assert cards["sql"]["root"] == names[500]
        (event,) = told(served, "split")
        assert {key: event[key] for key in ("alias", "adapter", "revision", *meant)} == {
            "alias": "sql", "adapter": "sql", "revision": names[500], **meant,
        }  # fmt: skip
        text = (await served.client.get("/metrics")).text
        assert f'lorakit_split_share{{alias="sql",revision="{names[600]}"}} 0.05' in text
        assert 'lorakit_alias_switches_total{alias="sql",why="split"} 1.0' in text


async def test_of_equal_shares_the_last_is_the_main_one(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    async with serving(tmp_path, numbers) as served:
        names = await until_there(served, 500, 600)
        assert (await set_split(served, HALVES)).json()["revision"] == names[500]


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({}, 400, "either"), ({"revision": "step-500", **HALVES}, 400, "either"),
    ({"shares": [{"revision": "step-500", "share": 1}]}, 400, "shares"),
    ({"shares": [{"revision": "step-500", "share": 0.5}, {"revision": "step-600", "share": 0.4}]}, 400, "0.9 together"),
    ({"shares": [{"revision": "step-500", "share": 1}, {"revision": "step-600", "share": 0}]}, 400, "share"),
    ({"shares": [{"revision": "step-500", "share": 0.5}, {"revision": "sql@step-500", "share": 0.5}]}, 400, "twice"),
    ({"shares": [{"revision": "step-500", "share": 0.5}, {"revision": "step-7", "share": 0.5}]}, 404, "step-7"),
    ({"shares": [{"revision": "step-500", "share": 0.5}, {"revision": "chat@latest", "share": 0.5}]}, 404, "chat"),
    ({"shares": [{"revision": "step-500", "share": "half"}, {"revision": "step-600", "share": 0.5}]}, 400, "share"),
    ({**HALVES, "shadow": ["step-500"]}, 400, "twice"), ({**HALVES, "shadow": ["step-8"]}, 404, "step-8"),
    ({**HALVES, "shadow": ["a", "b", "c", "d"]}, 400, "shadow"), ({**HALVES, "seed": -1}, 400, "seed"),
    ({**HALVES, "seed": 1.5}, 400, "seed"), ({**HALVES, "more": 1}, 400, "more"),
]  # fmt: skip


async def test_what_can_not_be_is_refused_and_changes_nothing(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    put_checkpoint(tmp_path / "runs" / "chat", 100, seed=3)
    async with serving(tmp_path, numbers) as served:
        await until_there(served, 500, 600)
        before = (await served.client.get("/v1/adapters/sql")).json()
        for body, status, words in REFUSED:
            answer = await served.client.put("/v1/adapters/sql/aliases/sql", json=body)
            assert_openai_error(answer, status)
            assert words in answer.json()["error"]["message"]
        for alias in ("latest", "step-5", "a b"):
            assert_openai_error(await served.client.put(f"/v1/adapters/sql/aliases/{alias}", json=HALVES), 400)
        after = (await served.client.get("/v1/adapters/sql")).json()
        assert (after["splits"], after["aliases"], after["follow"]) == ({}, before["aliases"], before["follow"])


# from and to


async def test_nothing_is_shared_before_each_revision_was_tried_out(tmp_path: Path, numbers: Path) -> None:
    weights = put(tmp_path, 500, 600, 700)
    engine = FakeEngine(numbers)
    async with serving(tmp_path, numbers, engine=engine) as served:
        names = await until_there(served, 500, 600, 700)
        engine.broken.add(weights[500])
        for body in (CANARY, {"revision": "step-700", "shadow": ["step-500"]}):
            assert_openai_error(await served.client.put("/v1/adapters/sql/aliases/sql", json=body), 400, 404)
        assert set(await asked(served, 6)) == {names[700]}


async def test_to_name_one_revision_promotes_it_and_latest_lets_the_name_follow_again(
    tmp_path: Path, numbers: Path
) -> None:
    put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, CANARY) as (served, names):
        put(tmp_path, 700)
        names |= await until_there(served, 700)
        await served.reconciler.step()
        assert set(await asked(served, 40)) == {names[500], names[600]}, "it stays with them"
        said = (await set_split(served, {"revision": "step-600"})).json()
        assert (said["splits"], said["revision"]) == ({}, names[600])
        assert set(await asked(served, 10)) == {names[600]}
        await set_split(served, CANARY)
        await set_split(served, {"revision": "latest"})
        put(tmp_path, 800)
        await served.until(lambda: served.reconciler.resolve("sql").facts.step == 800)  # type: ignore[union-attr]


async def test_a_rollback_ends_it_with_all_at_the_main_one_and_a_second_goes_on_from_there(
    tmp_path: Path, numbers: Path
) -> None:
    put(tmp_path, 500)
    async with serving(tmp_path, numbers) as served:
        await until_there(served, 500)
        put(tmp_path, 600)
        names = await until_there(served, 500, 600)
        await served.until(lambda: served.reconciler.resolve("sql").facts.step == 600)  # type: ignore[union-attr]
        await set_split(served, {"shares": list(reversed(CANARY["shares"]))})
        await set_split(served, {"shares": [{"revision": "step-500", "share": 0.1},
                                            {"revision": "step-600", "share": 0.9}]})  # fmt: skip
        for step in (600, 500):
            known = (await served.client.get("/v1/adapters/sql")).json()
            assert known["previous"] == names[step]
            rolled = (await served.client.post("/v1/adapters/sql/rollback")).json()
            assert (rolled["revision"], rolled["splits"]) == (names[step], {})
            assert set(await asked(served, 20)) == {names[step]}


async def test_its_revisions_outlive_retention_and_those_that_have_no_part_go(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 100, 200, 300)
    async with serving(tmp_path, numbers, keep_revisions=1) as served:
        names = await until_there(served, 300)
        put(tmp_path, 400, 500)
        await served.until(lambda: "sql" in served.reconciler.runs)
        names = await until_there(served, 500)
        run = served.reconciler.runs["sql"]
        kept = sorted(one.facts.step or 0 for one in run.revisions.values())[0]
        body = {"shares": [{"revision": f"step-{kept}", "share": 0.1}, {"revision": "step-500", "share": 0.9}]}
        await set_split(served, body)
        put(tmp_path, 600, 700, 800, 900)
        names |= await until_there(served, 900)
        await served.until(lambda: len(run.revisions) <= 4)
        assert names[500] in {one.name for one in run.revisions.values()}
        assert any(one.facts.step == kept for one in run.revisions.values())
        assert len(await asked(served, 20)) == 2


async def test_requests_in_flight_stay_with_their_revision_when_shares_change(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, HALVES) as (served, names):
        held = [asyncio.create_task(served.ask("sql", hold="open")) for _ in range(4)]
        await served.until(lambda: len(served.engine.asked) == 4)
        await set_split(served, {"revision": "step-500"})
        assert set(await asked(served, 5)) == {names[500]}
        served.engine.gate("open").set()
        answers = [(await one).headers["x-lorakit-revision"] for one in held]
        assert Counter(answers) == {names[500]: 2, names[600]: 2}


async def test_with_one_slot_for_two_revisions_each_has_its_share_all_the_same(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, HALVES, slots=1, fair_wait=0.01) as (served, names):
        counts = await asked(served, 40)
        assert abs(counts[names[600]] - 20) <= 2


# what fails


async def fail(served: Served, fingerprint: str) -> str:
    """Have a revision fail from now on, and ask until it is asked no more: the reason."""
    served.engine.fails.add(fingerprint)
    before = len(told(served, "rollback"))

    async def taken_out() -> bool:
        await served.ask("sql")
        return len(told(served, "rollback")) > before

    await served.until(taken_out)
    reason: str = told(served, "rollback")[-1]["reason"]
    return reason


async def test_a_revision_made_to_fail_is_taken_out_within_ten_seconds_and_passed_over(
    tmp_path: Path, numbers: Path
) -> None:
    weights = put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, CANARY) as (served, names):
        await asked(served, 100)
        async with asyncio.timeout(10):
            assert "answers failed, 0% of the others'" in await fail(served, weights[600])
        assert served.reconciler.runs["sql"].splits == {}
        assert set(await asked(served, 50)) == {names[500]}
        known = (await served.client.get("/v1/adapters/sql")).json()
        assert (known["revision"], known["splits"], known["follow"]) == (names[500], {}, "manual")
        passed = {one["id"]: one["passed_over"] for one in known["revisions"]}
        assert "answers failed, 0% of the others'" in passed[names[600]]
        (event,) = told(served, "rollback")
        assert (event["alias"], event["revision"], event["to"]) == ("sql", names[600], names[500])
        assert told(served, "alias")[-1]["why"].startswith("automatic rollback: ")
        text = (await served.client.get("/metrics")).text
        assert 'lorakit_rollbacks_total{alias="sql"} 1.0' in text
        await set_split(served, CANARY)
        assert (await served.client.get("/v1/adapters/sql")).json()["splits"], "a person knows better"


async def test_one_that_was_well_for_long_is_taken_out_as_soon(tmp_path: Path, numbers: Path) -> None:
    weights = put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, HALVES) as (served, _):
        await asked(served, 450)
        assert re.match(r"(\d+) of its last \1 answers failed", await fail(served, weights[600]))


async def test_errors_now_and_then_take_nothing_out(tmp_path: Path, numbers: Path) -> None:
    weights = put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, HALVES) as (served, _):
        await asked(served, 60)
        for _ in range(4):
            served.engine.fails = {weights[600]}
            await asked_whatever(served, 4)
            served.engine.fails = set()
            await asked(served, 60)
        await asyncio.sleep(0.02)
        assert served.reconciler.runs["sql"].splits


async def asked_whatever(served: Served, count: int) -> None:
    for _ in range(count):
        await served.ask("sql")


async def test_one_whose_first_token_is_no_number_any_more_is_taken_out_at_its_first_failure(
    tmp_path: Path, numbers: Path
) -> None:
    weights = put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, CANARY) as (served, names):
        served.engine.broken.add(weights[600])
        assert "first token" in await fail(served, weights[600])
        assert set(await asked(served, 20)) == {names[500]}


async def test_if_the_main_one_fails_its_share_goes_to_the_largest_other(tmp_path: Path, numbers: Path) -> None:
    weights = put(tmp_path, 500, 600, 700)
    async with serving(tmp_path, numbers) as served:
        names = await until_there(served, 500, 600, 700)
        shares = [("step-500", 0.6), ("step-600", 0.1), ("step-700", 0.3)]
        await set_split(served, {"shares": [{"revision": revision, "share": share} for revision, share in shares]})
        await asked(served, 50)
        await fail(served, weights[500])
        known = (await served.client.get("/v1/adapters/sql")).json()
        (left,) = known["splits"].values()
        assert {one["revision"]: round(one["share"], 9) for one in left["shares"]} == {names[600]: 0.1, names[700]: 0.9}
        assert known["revision"] == names[700]
        assert 'lorakit_rollbacks_total{alias="sql"} 1.0' in (await served.client.get("/metrics")).text
        await fail(served, weights[600])
        assert set(await asked(served, 10)) == {names[700]}


async def test_an_engine_that_fails_everything_and_the_last_that_is_left_are_taken_out_of_nothing(
    tmp_path: Path, numbers: Path
) -> None:
    put(tmp_path, 500, 600)
    async with serving(tmp_path, numbers) as served:
        await until_there(served, 500, 600)
        for meant in (HALVES, CANARY):
            said = (await set_split(served, meant)).json()["splits"]
            await asked(served, 60)
            served.engine.fails = set(served.engine.inside.values())
            for _ in range(60):
                await served.ask("sql")
            await asyncio.sleep(0.05)
            assert (await served.client.get("/v1/adapters/sql")).json()["splits"] == said
            served.engine.fails = set()


async def test_what_the_engine_refuses_later_is_taken_out_too_and_nobody_waits_for_it(
    tmp_path: Path, numbers: Path
) -> None:
    weights = put(tmp_path, 500, 600)
    async with sharing(tmp_path, numbers, HALVES):
        pass
    engine = FakeEngine(numbers)
    engine.refuses.add(weights[600])
    async with serving(tmp_path, numbers, engine=engine) as served:
        names = await until_there(served, 500, 600)
        assert set(await asked(served, 10)) == {names[500]}
        await served.until(lambda: not served.reconciler.runs["sql"].splits)
        assert "the engine refuses it" in told(served, "rollback")[0]["reason"]


# restarts


async def test_it_outlives_its_server(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600, 700)
    async with serving(tmp_path, numbers) as served:
        await until_there(served, 500, 600, 700)
        said = (await set_split(served, {**CANARY, "shadow": ["step-700"], "seed": 11})).json()["splits"]
    async with serving(tmp_path, numbers) as served:
        assert (await served.client.get("/v1/adapters/sql")).json()["splits"] == said
        assert len(await asked(served, 40)) == 2


KILLED = """
import asyncio, sys
from pathlib import Path
from tests.server.test_splitting import HALVES, sharing

async def main(folder, base):
    async with sharing(folder, base, {**HALVES, "seed": 5}) as (served, _):
        users = [(await served.ask("sql", user=f"u{n}")).headers["x-lorakit-revision"] for n in range(20)]
        print(" ".join(users), flush=True)
        await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
"""


async def test_a_server_that_is_killed_leaves_each_user_where_it_was(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    process = subprocess.Popen(  # noqa: ASYNC220 - it is only asked once
        [sys.executable, "-c", KILLED, str(tmp_path), str(numbers)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        before = (await asyncio.to_thread(process.stdout.readline)).split()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert len(set(before)) == 2
    async with serving(tmp_path, numbers) as served:
        after = [(await served.ask("sql", user=f"u{n}")).headers["x-lorakit-revision"] for n in range(20)]
    assert after == before


async def change(served: Served, chance: random.Random) -> None:
    """Something that happens to a name: whatever it is, it may be refused."""
    steps = chance.sample([500, 600, 700, 800], 4)
    several, shadows = chance.randint(1, 3), chance.randint(0, 1)
    parts = [chance.randint(1, 9) for _ in range(several)]
    shares = [{"revision": f"step-{step}", "share": part / sum(parts)}
              for step, part in zip(steps, parts, strict=False)]  # fmt: skip
    meant = {"shares": shares} if several > 1 else {"revision": f"step-{steps[0]}"}
    shadow = {"shadow": [f"step-{steps[3]}"]} if shadows else {}
    alias = chance.choice(["sql", "prod"])
    match chance.randint(0, 5):
        case 0:
            await served.client.post("/v1/adapters/sql/rollback")
        case 1:
            run = served.reconciler.runs["sql"]
            await served.reconciler.splitting.take_out(chance.choice(list(run.revisions.values())), "it fails")
        case _:
            await served.client.put(f"/v1/adapters/sql/aliases/{alias}", json={**meant, **shadow})


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_happens_to_it_the_store_has_what_is_served(tmp_path: Path, numbers: Path, seed: int) -> None:
    put(tmp_path, 500, 600, 700, 800)
    chance, split = random.Random(seed), 0
    for _ in range(2):
        async with serving(tmp_path, numbers) as served:
            await until_there(served, 500, 600, 700, 800)
            for _ in range(15):
                await change(served, chance)
                now, stored = served.reconciler.runs["sql"], served.reconciler.store.runs()["sql"]
                assert (now.splits, now.aliases, now.pinned) == (stored.splits, stored.aliases, stored.pinned)
                assert served.reconciler.passed_over == served.reconciler.store.passed_over()
                split += len(now.splits)
                for name, one in now.splits.items():
                    assert sum(one.shares.values()) == pytest.approx(1)
                    assert now.aliases[name] == one.main
                    assert not one.is_plain
                answer = (await served.ask("sql")).headers["x-lorakit-revision"]
                means = now.splits[""].shares if "" in now.splits else [now.aliases[""]]
                assert answer in {now.revisions[id].name for id in means}
    assert split > 10


# keys


async def test_a_key_meets_the_shares_of_its_own_names_and_learns_of_no_others(
    tmp_path: Path, numbers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_API_KEY", "root")
    monkeypatch.setattr(module, "LOOK", 0.02)
    put(tmp_path, 500, 600)
    put_checkpoint(tmp_path / "runs" / "chat", 100, seed=3)
    store = KeyStore(tmp_path / "home")
    mine, _ = store.create(Allowance(("sql",)))
    others, _ = store.create(Allowance(("chat",), admin=True))
    store.close()
    async with sharing(tmp_path, numbers, HALVES, headers={"Authorization": "Bearer root"}) as (served, names):

        async def get(key: str, path: str) -> httpx.Response:
            return await served.client.get(path, headers={"Authorization": f"Bearer {key}"})

        headers = {"Authorization": f"Bearer {mine}"}
        met = {
            (await served.client.post("/v1/completions", json={"model": "sql", "user": f"u{number}"}, headers=headers))
            .headers["x-lorakit-revision"] for number in range(20)
        }  # fmt: skip
        assert met == set(names.values())
        assert len((await get(mine, "/v1/adapters/sql/comparison")).json()["revisions"]) == 2
        foreign, missing = [await get(others, f"/v1/adapters/{name}/comparison") for name in ("sql", "nql")]
        assert_openai_error(foreign, 404)
        assert foreign.text.replace("sql", "nql") == missing.text
        put_to = await served.client.put(
            "/v1/adapters/sql/aliases/sql", json=HALVES, headers={"Authorization": f"Bearer {others}"}
        )
        assert_openai_error(put_to, 404)
