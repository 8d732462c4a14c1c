# ruff: noqa: F811  (fixtures of another folder's)
"""Several servers that share a bucket, each with a home and an engine of its own: what one does, all do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import Refused
from lorakit.server.following import mirror
from lorakit.store.remote import objects as objects_module
from lorakit.store.remote import runs as runs_module
from lorakit.store.remote.objects import Objects, Unreachable
from lorakit.store.remote.shared import SharedStore
from tests.server.fake_engine import FakeEngine, Served, fingerprint_of, put_adapter, put_checkpoint, serving
from tests.store.remote.conftest import ADDRESS, boto, bucket, proxy, real_s3, s3  # noqa: F401
from tests.store.remote.faulty import Faulty

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def server(folder: Path, base: Path, **more: Any) -> AsyncIterator[Served]:
    """In a folder of its own: `runs` is watched, and `home` the store."""
    os.makedirs(folder, exist_ok=True)
    async with serving(folder, base, store=ADDRESS, **more) as served:
        yield served


@pytest.fixture
async def two(tmp_path: Path, numbers: Path, bucket: Faulty) -> AsyncIterator[tuple[Served, Served]]:
    async with server(tmp_path / "one", numbers) as one, server(tmp_path / "other", numbers) as other:
        yield one, other


LOOK, ENSURE_CONDITIONS = mirror.LOOK, Objects.ensure_conditions


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers look often, and take it that the bucket is one that can be shared."""
    monkeypatch.setattr(mirror, "LOOK", 0.05)
    monkeypatch.setattr(Objects, "ensure_conditions", lambda self: None)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not answer is not asked again for long."""
    for patience in ("_SMALL", "_FILE"):
        monkeypatch.setattr(objects_module, patience, (1, 1, 1))


def told(served: Served, kind: str) -> list[str]:
    return [event.data["message"] for event in served.reconciler.events.kept if event.kind == kind]


def meaning(served: Served, name: str = "sql") -> Any:
    """All that requests can see of a run."""
    run = served.reconciler.runs.get(name)
    if run is None:
        return None
    names = {id: revision.name for id, revision in run.revisions.items()}
    splits = {
        alias: ({names[id]: share for id, share in split.shares.items()}, {names[id] for id in split.shadows})
        for alias, split in run.splits.items()
    }
    passed = {names[id]: reason for id, reason in served.reconciler.passed_over.items() if id in names}
    aliases = {alias: names[id] for alias, id in run.aliases.items()}
    return sorted(names.values()), [names[one.revision] for one in run.finishes], aliases, run.pinned, splits, passed


async def alike(one: Served, other: Served, name: str = "sql") -> None:
    await one.until(lambda: meaning(one, name) == meaning(other, name), 10)


async def seconds_until(served: Served, model: str, revision: str | None) -> float:
    began = time.monotonic()

    async def is_so() -> bool:
        return await served.revision_of(model) == revision

    await served.until(is_so, 10)
    return time.monotonic() - began


def means(served: Served, step: int, name: str = "sql") -> bool:
    found = meaning(served, name)
    return found is not None and f"@step-{step}-" in found[2].get("", "")


async def taken_in(served: Served, run: Path, step: int, **more: Any) -> str:
    """The name of the revision that a checkpoint became, when the run's name means it."""
    put_checkpoint(run, step, **more)
    await served.until(lambda: (await_ := meaning(served, run.name)) and f"@step-{step}-" in await_[2].get("", ""), 20)
    return str(await served.revision_of(run.name))


# what one does, the other does


async def test_a_checkpoint_that_one_takes_in_is_served_by_the_other_under_the_same_name_within_a_second(
    two: tuple[Served, Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LOOK", LOOK)
    one, other = two
    waited = []
    for step in (100, 200, 300):
        revision = await taken_in(one, tmp_path / "one" / "runs" / "sql", step)
        waited.append(await seconds_until(other, "sql", revision))
        assert (await other.ask("sql")).json()["choices"][0]["text"] == (await one.ask("sql")).json()["choices"][0][
            "text"
        ]
    assert sorted(waited)[1] < 1.0, waited
    await alike(one, other)
    assert any(event.data.get("why") == "another server" for event in other.reconciler.events.kept)


async def test_an_alias_a_rollback_and_a_pin_by_one_are_seen_by_the_other(
    two: tuple[Served, Served], tmp_path: Path
) -> None:
    one, other = two
    run = tmp_path / "one" / "runs" / "sql"
    first, second = [await taken_in(one, run, step) for step in (1, 2)]
    await seconds_until(other, "sql", second)
    await other.client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-1"})
    assert await seconds_until(one, "sql@prod", first) < 2.0
    assert (await other.client.post("/v1/adapters/sql/rollback")).status_code == 200
    assert await seconds_until(one, "sql", first) < 2.0
    put_checkpoint(run, 3)  # which the name does not follow any more
    await one.until(lambda: len(meaning(one)[0]) == len(meaning(other)[0]) == 3)
    await asyncio.sleep(0.3)
    assert await one.revision_of("sql") == await other.revision_of("sql") == first
    await one.client.put("/v1/adapters/sql/aliases/sql", json={"revision": "latest"})
    await other.until(lambda: "@step-3-" in meaning(other)[2][""], 5)
    await alike(one, other)


async def test_a_split_by_one_is_the_others_and_asks_the_same_revision_for_the_same_user(
    two: tuple[Served, Served], tmp_path: Path
) -> None:
    one, other = two
    for step in (1, 2):
        await taken_in(one, tmp_path / "one" / "runs" / "sql", step)
    shares = [{"revision": f"step-{step}", "share": 0.5} for step in (1, 2)]
    answer = await one.client.put("/v1/adapters/sql/aliases/canary", json={"shares": shares, "seed": 3})
    assert answer.status_code == 200
    await other.until(lambda: meaning(other) == meaning(one) and meaning(one)[4], 5)
    for user in range(8):
        answers = [await served.ask("sql@canary", user=f"user-{user}") for served in two]
        assert len({answer.headers["x-lorakit-revision"] for answer in answers}) == 1
    await other.client.put("/v1/adapters/sql/aliases/canary", json={"revision": "step-2"})
    await one.until(lambda: meaning(one)[4] == {}, 5)


async def test_what_one_unloads_ends_its_requests_on_the_other_before_it_leaves(
    two: tuple[Served, Served], tmp_path: Path
) -> None:
    one, other = two
    revision = await taken_in(one, tmp_path / "one" / "runs" / "sql", 1)
    await seconds_until(other, "sql", revision)
    long = asyncio.create_task(other.ask("sql", hold="long"))
    await other.until(lambda: other.engine.asked and other.engine.asked[-1].get("hold"))
    assert (await one.client.delete("/v1/adapters/sql")).status_code == 200
    await seconds_until(other, "sql", None)
    assert other.engine.inside
    other.engine.gate("long").set()
    assert (await long).status_code == 200
    await other.until(lambda: not other.engine.inside)
    await other.until(lambda: not list((tmp_path / "other" / "home" / "revisions").iterdir()))
    assert told(other, "gone") == ["sql is no longer served"]


@pytest.mark.slow
async def test_what_retention_takes_from_one_leaves_the_other(tmp_path: Path, numbers: Path, bucket: Faulty) -> None:
    keep = {"keep_revisions": 2}
    async with server(tmp_path / "one", numbers, **keep) as one, server(tmp_path / "other", numbers, **keep) as other:
        for step in range(1, 6):
            await taken_in(one, tmp_path / "one" / "runs" / "sql", step)
        await one.until(lambda: meaning(one) == meaning(other) and len(meaning(one)[0]) == 2, 10)
        await other.until(lambda: len(list((tmp_path / "other" / "home" / "revisions").iterdir())) == 2)


@pytest.mark.slow
async def test_two_that_watch_one_folder_serve_it_once(tmp_path: Path, numbers: Path, bucket: Faulty) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    watch = {"watch": (str(runs),)}
    async with server(tmp_path / "one", numbers, **watch) as one, server(tmp_path / "other", numbers, **watch) as other:
        for step in range(1, 6):
            put_checkpoint(runs / "sql", step)
            await asyncio.sleep(0.05)
        await one.until(lambda: means(one, 5) and means(other, 5), 20)
        await alike(one, other)
        assert len(meaning(one)[0]) == len(meaning(one)[1]) == 5


# decisions


async def test_what_one_engine_refuses_no_server_moves_to(two: tuple[Served, Served], tmp_path: Path) -> None:
    one, other = two
    run = tmp_path / "one" / "runs" / "sql"
    good = await taken_in(one, run, 1)
    await seconds_until(other, "sql", good)
    beside = put_adapter(tmp_path / "bad", 2)
    other.engine.refuses.add(fingerprint_of(beside))
    await taken_in(one, run, 2)
    await one.until(lambda: means(other, 2), 10)
    assert (await other.ask("sql")).status_code == 404  # it is loaded there by whoever asks first
    await one.until(lambda: len(meaning(one)[5]) == len(meaning(other)[5]) == 1, 10)
    await one.until(lambda: means(one, 1) and means(other, 1), 10)
    await alike(one, other)
    await asyncio.sleep(0.4)  # and none moves it to and fro
    assert await one.revision_of("sql") == await other.revision_of("sql") == good
    moves = len(told(one, "alias"))
    await asyncio.sleep(0.4)
    assert len(told(one, "alias")) == moves


@pytest.mark.slow
async def test_what_fails_the_smoke_prompts_of_one_server_no_server_stays_at(
    tmp_path: Path, numbers: Path, bucket: Faulty
) -> None:
    right = fingerprint_of(put_adapter(tmp_path / "right", 1))
    (tmp_path / "smoke.jsonl").write_text(json.dumps({"prompt": "a", "expect": right}))
    probe = {"probe": str(tmp_path / "smoke.jsonl")}
    async with server(tmp_path / "one", numbers, **probe) as one, server(tmp_path / "other", numbers) as other:
        run = tmp_path / "one" / "runs" / "sql"
        await taken_in(one, run, 1)
        await one.until(lambda: means(other, 1))
        put_checkpoint(run, 2)
        await one.until(lambda: len(meaning(one)[5]) == 1 and meaning(one) == meaning(other), 10)
        await asyncio.sleep(0.4)
        assert means(one, 1)
        assert means(other, 1)
        assert "does not hold" in str(meaning(other)[5])


async def test_a_name_that_one_takes_back_from_what_fails_goes_back_on_the_other(
    two: tuple[Served, Served], tmp_path: Path
) -> None:
    one, other = two
    run = tmp_path / "one" / "runs" / "sql"
    good = await taken_in(one, run, 1)
    for _ in range(20):
        await one.ask("sql")
    bad = await taken_in(one, run, 2)
    await seconds_until(other, "sql", bad)
    one.engine.fails.add(fingerprint_of(run / "checkpoint-2"))
    for _ in range(12):
        await one.ask("sql")
    await one.until(lambda: means(one, 1), 10)
    assert await seconds_until(other, "sql", good) < 2.0
    await alike(one, other)
    assert bad in meaning(other)[5]


async def test_one_alias_that_both_move_all_the_time_ends_alike_and_no_answer_is_missing(
    two: tuple[Served, Served], tmp_path: Path
) -> None:
    one, other = two
    for step in (1, 2, 3):
        await taken_in(one, tmp_path / "one" / "runs" / "sql", step)
    await alike(one, other)
    statuses: list[int] = []

    async def move(served: Served, steps: list[int]) -> None:
        for number in range(12):
            target = {"revision": f"step-{steps[number % len(steps)]}"}
            statuses.append((await served.client.put("/v1/adapters/sql/aliases/sql", json=target)).status_code)

    async def ask(served: Served) -> None:
        for _ in range(60):
            statuses.append((await served.ask("sql")).status_code)
            await asyncio.sleep(0.005)

    await asyncio.gather(move(one, [1, 2]), move(other, [3, 1]), ask(one), ask(other))
    assert set(statuses) == {200}
    await alike(one, other)
    moves = one.reconciler.store._database.rows("SELECT count(*) FROM moves WHERE alias = ''")[0][0]
    assert moves >= 24


# what fails


@pytest.mark.usefixtures("impatient")
async def test_while_the_bucket_is_away_what_is_served_is_served_and_changes_wait(
    two: tuple[Served, Served],
    tmp_path: Path,
    bucket: Faulty,
) -> None:
    one, other = two
    run = tmp_path / "one" / "runs" / "sql"
    first = await taken_in(one, run, 1)
    await seconds_until(other, "sql", first)
    bucket.refuse = lambda method, path: 503
    await one.until(lambda: told(one, "failed"), 30)
    put_checkpoint(run, 2)
    answer = await one.client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-1"})
    assert answer.status_code == 503
    assert "does not answer" in answer.json()["error"]["message"]
    assert await one.revision_of("sql") == await other.revision_of("sql") == first
    assert "@step-2" not in str(meaning(one))
    await one.until(lambda: any("does not answer" in waiting.reason for waiting in one.reconciler.waiting.values()), 10)
    assert len(told(one, "failed")) == 1
    bucket.heal()
    await one.until(lambda: "@step-2-" in meaning(one)[2][""] and meaning(one) == meaning(other), 30)
    assert len(told(one, "reached")) == 1


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_starts_while_the_bucket_is_away_answers_from_its_own_and_is_ready_when_it_is_back(
    tmp_path: Path,
    numbers: Path,
    bucket: Faulty,
) -> None:
    async with server(tmp_path / "one", numbers) as one, server(tmp_path / "other", numbers) as other:
        first = await taken_in(one, tmp_path / "one" / "runs" / "sql", 1)
        await seconds_until(other, "sql", first)
        second = await taken_in(one, tmp_path / "one" / "runs" / "sql", 2)
        await other.client.put("/v1/adapters/sql/aliases/sql", json={"revision": "step-1"})
        await seconds_until(one, "sql", first)
    bucket.refuse = lambda method, path: 503
    async with server(tmp_path / "other", numbers, ready=False) as again:
        assert await again.revision_of("sql") == first
        await asyncio.sleep(0.5)
        answer = await again.client.get("/ready")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the shared store was not looked at yet")
        bucket.heal()
        await again.until_ready()
        await seconds_until(again, "sql@step-2", second)  # which no alias means


async def test_a_server_that_was_away_has_what_aliases_mean_by_now_before_it_is_ready(
    tmp_path: Path,
    numbers: Path,
    bucket: Faulty,
) -> None:
    async with server(tmp_path / "one", numbers) as one:
        async with server(tmp_path / "other", numbers) as other:
            first = await taken_in(one, tmp_path / "one" / "runs" / "sql", 1)
            await seconds_until(other, "sql", first)
        second = await taken_in(one, tmp_path / "one" / "runs" / "sql", 2)
        engine = FakeEngine(numbers)
        async with server(tmp_path / "other", numbers, engine=engine) as again:  # which waits until it is ready
            assert await again.revision_of("sql") == second
            assert any(second in name for name in engine.loads)


@pytest.mark.slow
async def test_a_server_that_dies_between_its_files_and_the_alias_leaves_the_others_where_they_were(
    tmp_path: Path,
    numbers: Path,
    bucket: Faulty,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with server(tmp_path / "other", numbers) as other:
        async with server(tmp_path / "one", numbers) as one:
            first = await taken_in(one, tmp_path / "one" / "runs" / "sql", 1)
            await seconds_until(other, "sql", first)
            with monkeypatch.context() as patch:
                patch.setattr(one.reconciler.store.shared, "change", _dies)  # type: ignore[attr-defined]
                put_checkpoint(tmp_path / "one" / "runs" / "sql", 2)
                await one.until(lambda: any("/revisions/" in path for _, path in bucket.asked[-20:]), 10)
                await one.until(lambda: one.reconciler.waiting)
        assert await other.revision_of("sql") == first
        async with server(tmp_path / "one", numbers) as one:
            second = await one.revision_of("sql")
            assert second is not None
            assert "@step-2-" in second
            assert await seconds_until(other, "sql", second) < 2.0
            await alike(one, other)


def _dies(*_: Any) -> Any:
    raise RuntimeError("the machine is gone")


async def test_files_that_were_replaced_are_never_served_and_that_is_told(
    two: tuple[Served, Served],
    tmp_path: Path,
    s3: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = two
    run = tmp_path / "one" / "runs" / "sql"
    first = await taken_in(one, run, 1)
    await seconds_until(other, "sql", first)
    evil = (put_adapter(tmp_path / "evil", 666) / "adapter_model.safetensors").read_bytes()
    send = Objects.send

    def replacing(self: Objects, file: Path, name: str) -> None:
        send(self, file, name)
        if name.endswith(".safetensors"):
            s3.put_object(Bucket="models", Key=f"lorakit/{name}", Body=evil)

    monkeypatch.setattr(Objects, "send", replacing)
    second = await taken_in(one, run, 2)
    await other.until(lambda: told(other, "refused"), 10)
    assert "not what it is called by" in told(other, "refused")[0]
    assert second in told(other, "refused")[0]
    assert await other.revision_of("sql") == first
    assert await one.revision_of("sql") == second
    assert len(told(other, "refused")) == 1


async def test_while_some_files_do_not_come_names_are_ready_and_what_came_is_served(
    tmp_path: Path, numbers: Path, bucket: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(tmp_path / "one", numbers) as one:
        run = tmp_path / "one" / "runs" / "sql"
        first, second, third = [await taken_in(one, run, step) for step in (1, 2, 3)]
        slow, bring, wait = second.rsplit("-", 1)[1], SharedStore.bring, threading.Event()
        fails = first.rsplit("-", 1)[1]

        def brought(self: SharedStore, digest: str, check: Any) -> None:
            if digest.startswith(fails):
                raise RuntimeError("nobody thought of that")
            if digest.startswith(slow):
                wait.wait(20)
            bring(self, digest, check)

        monkeypatch.setattr(SharedStore, "bring", brought)
        async with server(tmp_path / "other", numbers) as other:  # which waits until it is ready
            assert await other.revision_of("sql") == third
            assert not wait.is_set()
            wait.set()
            assert await seconds_until(other, "sql@step-2", second) < 5.0
            assert any("nobody thought of that" in message for message in told(other, "failed"))


async def test_an_older_run_that_is_put_back_in_the_bucket_is_taken_over_and_told(
    two: tuple[Served, Served], tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "LOOK", 0.1)
    one, other = two
    run = tmp_path / "one" / "runs" / "sql"
    first = await taken_in(one, run, 1)
    await seconds_until(other, "sql", first)
    assert (await one.client.put("/v1/adapters/sql/aliases/sql", json={"revision": "step-1"})).status_code == 200
    await other.until(lambda: meaning(other)[3])
    await alike(one, other)
    key = next(each["Key"] for each in s3.list_objects_v2(Bucket="models")["Contents"] if "/runs/" in each["Key"])
    old = s3.get_object(Bucket="models", Key=key)["Body"].read()
    assert (await one.client.put("/v1/adapters/sql/aliases/prod", json={"revision": "step-1"})).status_code == 200
    assert await seconds_until(other, "sql@prod", first) < 5.0
    s3.put_object(Bucket="models", Key=key, Body=old)
    for served in two:
        assert await seconds_until(served, "sql@prod", None) < 5.0
        assert any("older in the bucket" in message for message in told(served, "failed"))


async def test_a_server_is_not_ready_before_what_names_mean_could_be_asked_for(
    tmp_path: Path, numbers: Path, bucket: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(tmp_path / "one", numbers) as one:
        first = await taken_in(one, tmp_path / "one" / "runs" / "sql", 1)
        bring, away = SharedStore.bring, iter([True])

        def brought(self: SharedStore, digest: str, check: Any) -> None:
            if next(away, False):
                raise Unreachable("the bucket does not answer")
            bring(self, digest, check)

        monkeypatch.setattr(SharedStore, "bring", brought)
        async with server(tmp_path / "other", numbers) as other:  # which waits until it is ready
            assert await other.revision_of("sql") == first


async def test_a_revision_of_a_rank_that_this_server_does_not_have_is_refused_here_alone(
    tmp_path: Path,
    numbers: Path,
    bucket: Faulty,
) -> None:
    small = FakeEngine(numbers, max_rank=2)
    async with server(tmp_path / "one", numbers) as one, server(tmp_path / "two", numbers, engine=small) as two:
        first = await taken_in(one, tmp_path / "one" / "runs" / "sql", 1)
        await seconds_until(two, "sql", first)
        second = await taken_in(one, tmp_path / "one" / "runs" / "sql", 2, rank=4)
        await two.until(lambda: told(two, "refused"), 10)
        assert "--max-lora-rank 2" in told(two, "refused")[0]
        await asyncio.sleep(0.4)
        assert (await one.revision_of("sql"), await two.revision_of("sql")) == (second, first)


async def test_a_bucket_that_can_not_be_shared_is_refused_at_start(
    tmp_path: Path,
    numbers: Path,
    bucket: Faulty,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Objects, "ensure_conditions", ENSURE_CONDITIONS)
    bucket.refuse = lambda method, path: 501 if method == "PUT" else None
    with pytest.raises(Refused, match="no conditional writes"):
        async with server(tmp_path / "one", numbers):
            pass


@pytest.mark.slow
async def test_mixes_are_made_on_each_server_of_what_all_have(two: tuple[Served, Served], tmp_path: Path) -> None:
    one, other = two
    for name in ("sql", "chat"):
        await taken_in(one, tmp_path / "one" / "runs" / name, 1, seed=len(name))
    mix = "mix(sql=0.5,chat=0.5)"
    mixed = await one.revision_of(mix)
    await alike(one, other)
    await other.until(lambda: meaning(other, "chat"))
    assert await other.revision_of(mix) == mixed
    store = other.reconciler.store
    assert isinstance(store, SharedStore)
    assert sorted(store.shared.names) == ["chat", "sql"]
