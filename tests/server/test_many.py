"""A thousand adapters behind eight slots, and much at once: each answer is of its own revision, none waits for ever."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from lorakit.merge.base import read_base
from lorakit.server.sight.events import Event
from lorakit.store.catalog import Facts
from lorakit.store.database import open_database
from lorakit.store.store import open_store
from lorakit.store.verify import verify_store
from tests.server.fake_engine import (
    WEIGHTS,
    FakeEngine,
    Served,
    fingerprint_of,
    overwrite,
    put_checkpoint,
    serving,
)

pytestmark = pytest.mark.anyio

COUNT, SLOTS = 1_000, 8


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory, numbers: Path) -> tuple[Path, dict[str, str]]:
    """A store of a thousand adapters, as a server leaves it, and what each answers."""
    folder, texts = tmp_path_factory.mktemp("thousand"), dict[str, str]()
    base, facts = read_base(numbers).identity, json.dumps(asdict(Facts(step=1)))
    with open_database(folder / "home") as database, database.change() as db:
        for number in range(COUNT):
            name, digest = f"user-{number}", hashlib.sha256(str(number).encode()).hexdigest()
            content = folder / "home" / "revisions" / digest
            content.mkdir()
            (content / WEIGHTS).write_bytes(number.to_bytes(4, "big"))
            texts[name] = fingerprint_of(content)
            db.execute("INSERT INTO runs (base, run) VALUES (?, ?)", (base, name))
            db.execute(
                "INSERT INTO revisions (id, base, run, kind, step, digest, created, uid, facts, rank, size, source)"
                " VALUES (?, ?, ?, 'step', 1, ?, 1.0, ?, ?, 2, 4, '/gone')",
                (number, base, name, digest, digest, facts),
            )
            db.execute("INSERT INTO finishes (revision, attempt, at) VALUES (?, 1, 1.0)", (number,))
            db.execute("INSERT INTO aliases VALUES (?, ?, '', ?)", (base, name, number))
    return folder, texts


async def answered(served: Served, texts: dict[str, str], name: str) -> None:
    answer = await served.ask(name)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == texts[name]
    assert answer.headers["x-lorakit-revision"].startswith(f"{name}@step-1-")


@pytest.mark.parametrize("memory", [0, 64])
async def test_each_of_a_thousand_answers_as_itself(
    thousand: tuple[Path, dict[str, str]], numbers: Path, memory: int
) -> None:
    folder, texts = thousand
    engine, chance = FakeEngine(numbers, slots=SLOTS, memory=memory), random.Random(1)
    # some are asked for all the time, most hardly ever
    wanted = [f"user-{int(COUNT * chance.random() ** 6)}" for _ in range(400)] + ([] if memory else list(texts))
    chance.shuffle(wanted)
    asked = set(wanted)

    async def client() -> None:
        while wanted:
            await answered(served, texts, wanted.pop())

    async with serving(folder, numbers, engine=engine, watch=()) as served:
        async with asyncio.timeout(120):
            await asyncio.gather(*(client() for _ in range(32)))
        assert len(engine.inside) == max(SLOTS, memory)
        assert served.reconciler.residency.counted.loads == len(engine.loads)
        assert {name.partition("@")[0] for name in engine.loads} >= asked
        assert all(resident.in_flight == 0 for resident in served.reconciler.residency.residents)


async def test_a_few_hot_ones_in_all_slots_do_not_starve_the_others(
    thousand: tuple[Path, dict[str, str]], numbers: Path
) -> None:
    folder, texts = thousand
    hot, done, ends = [f"user-{number}" for number in range(SLOTS)], Counter[str](), asyncio.Event()

    async def keep_asking(name: str) -> None:
        while not ends.is_set():
            await answered(served, texts, name)
            done[name] += 1

    async with serving(folder, numbers, slots=SLOTS, watch=(), fair_wait=0.05) as served:
        served.engine.answer_seconds = 0.003
        hotting = [asyncio.create_task(keep_asking(name)) for name in hot for _ in range(4)]
        await asyncio.sleep(0.2)
        others = [f"user-{number}" for number in range(100, 130)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(answered(served, texts, name) for name in others))
        before = dict(done)
        await served.until(lambda: all(done[name] > before.get(name, 0) for name in hot))
        ends.set()
        await asyncio.gather(*hotting)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_at_once_each_answer_is_wholly_of_the_revision_that_it_names(
    tmp_path: Path, numbers: Path, seed: int
) -> None:
    chance, texts, statuses, ends = random.Random(seed), dict[str, str](), Counter[int](), asyncio.Event()
    runs, steps = ("a", "b", "c"), Counter[str]()

    def write(run: str) -> None:
        steps[run] += chance.choice((1, 1, 1, -1)) or 1
        steps[run] = max(1, steps[run])
        folder = tmp_path / "runs" / run / f"checkpoint-{steps[run]}"
        if folder.is_dir():
            overwrite(folder, chance.randrange(10_000))
        else:
            put_checkpoint(folder.parent, steps[run], seed=chance.randrange(10_000))

    async def client(number: int) -> None:
        while not ends.is_set():
            answer = await served.ask(chance.choice((*runs, "a@latest", "b@latest")))
            statuses[answer.status_code] += 1
            await asyncio.sleep(0)  # a 404 takes no time at all
            if answer.status_code == 200:
                name = answer.headers["x-lorakit-revision"]
                assert answer.json()["choices"][0]["text"] == texts[name]

    async def administer() -> None:
        name = chance.choice(runs)
        match chance.randrange(4):
            case 0:
                await served.client.post(f"/v1/adapters/{name}/rollback")
            case 1:
                await served.client.put(f"/v1/adapters/{name}/aliases/{name}", json={"revision": "latest"})
            case 2:
                await served.client.put(f"/v1/adapters/{name}/aliases/prod", json={"revision": "latest"})
            case 3:
                await served.client.delete(f"/v1/adapters/{name}")

    def found(event: Event) -> None:
        if event.kind == "found":
            of_run = served.reconciler.store.runs()[event.data["adapter"]].revisions.values()
            (folder,) = [revision.folder for revision in of_run if revision.name == event.data["revision"]]
            texts[event.data["revision"]] = fingerprint_of(folder)

    for run in runs:
        write(run)
    async with serving(tmp_path, numbers, slots=2, keep_revisions=2, fair_wait=0.01, ready=False) as served:
        served.reconciler.events.listeners.append(found)
        await served.until_ready()
        served.engine.answer_seconds = 0.002
        clients = [asyncio.create_task(client(number)) for number in range(8)]
        for _ in range(25):
            write(chance.choice(runs))
            await asyncio.sleep(0.02)
            await administer()
        ends.set()
        await asyncio.gather(*clients)
        await served.reconciler.step()
        await asyncio.gather(*served.reconciler._leaving._under_way)
        assert statuses.keys() <= {200, 404}
        assert statuses[200] > 50
        assert not served.reconciler.residency.waiting
        assert all(resident.in_flight == 0 for resident in served.reconciler.residency.residents)
    home = tmp_path / "home"
    assert verify_store(home).wrong == ()
    with open_store(home, read_base(numbers).identity) as store:
        kept = {revision.digest for run in store.runs().values() for revision in run.revisions.values()}
    assert {folder.name for folder in (home / "revisions").iterdir()} == kept, "nothing is left behind"
