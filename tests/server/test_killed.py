"""A server that is killed between any two lines that touch the store: the next one converges to what should be."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from lorakit.store.store import open_store
from lorakit.store.verify import verify_store
from tests.server.fake_engine import put_checkpoint
from tests.server.test_reconciler import Room, room
from tests.store.interrupted import STRIDE, kills

Act = Callable[[Room], Awaitable[object]]
EVERY = 4 if STRIDE == 1 else 40
LOSS = {100: 0.1, 200: 0.9, 300: 0.5, 400: 0.5}


async def served(folder: Path, base: Path, home: Path, act: Act | None = None) -> dict[str, str | None]:
    """What the names mean after one look of a server, and after `act`."""
    async with room(folder, base, home=str(home), keep_revisions=2) as r:
        await r.step()
        if act is not None:
            await act(r)
            await asyncio.sleep(0.02)  # what is left for later is done by then
        return {name: r.meant(name) for name in ("sql", "sql@latest", "sql@best", "sql@prod")}


def at_any_line(folder: Path, base: Path, act: Act, *, steps: tuple[int, ...] = ()) -> list[dict[str, str | None]]:
    """What the next server says after each kill of one that did that, and found these steps; each begins anew, on a
    store where 100 and 200 are served. What it says when it is not killed comes last."""
    start, home = folder / "start", folder / "home"
    for step in (100, 200):
        put_checkpoint(folder / "runs" / "sql", step, eval_loss=LOSS[step])
        asyncio.run(served(folder, base, start))
    for step in steps:
        put_checkpoint(folder / "runs" / "sql", step, eval_loss=LOSS[step])
    found = []
    shutil.copytree(start, home)
    for _ in kills(lambda: asyncio.run(served(folder, base, home, act)), every=EVERY, within="lorakit/store"):
        found.append(asyncio.run(served(folder, base, home)))
        check(home, base)
        shutil.rmtree(home)
        shutil.copytree(start, home)
    found.append(asyncio.run(served(folder, base, home)))
    check(home, base)
    return found


def check(home: Path, base: Path) -> None:
    """The files are those that are known, and the aliases what the journal says."""
    assert verify_store(home).wrong == ()
    assert not list((home / "tmp").iterdir())
    with open_store(home, str(base)) as store:
        for run in store.runs().values():
            assert all(revision.folder.is_dir() for revision in run.revisions.values())
            for alias, id in run.aliases.items():
                last = "SELECT revision FROM moves WHERE run = ? AND alias = ? ORDER BY id DESC LIMIT 1"
                assert store._database.rows(last, (run.name, alias)) == [(id,)]


async def nothing(_: Room) -> None: ...


async def roll_back(r: Room) -> None:
    await r.reconciler.rollback("sql")


async def point(r: Room) -> None:
    await r.reconciler.set_alias("sql", "prod", "step-100")


async def unload(r: Room) -> None:
    await r.reconciler.unload("sql")


def test_a_load_that_is_killed_anywhere_is_done_by_the_next_server(tmp_path: Path, numbers: Path) -> None:
    """Taken in, moved to, and what is not kept let go."""
    found = at_any_line(tmp_path, numbers, nothing, steps=(300, 400))
    assert len(found) > 3
    assert all(one == {"sql": "step-400", "sql@latest": "step-400", "sql@best": "step-100", "sql@prod": None}
               for one in found)  # fmt: skip


def test_a_rollback_that_is_killed_anywhere_was_made_and_stays_or_was_not(tmp_path: Path, numbers: Path) -> None:
    found = [one["sql"] for one in at_any_line(tmp_path, numbers, roll_back)]
    assert set(found) == {"step-100", "step-200"}
    assert found[-1] == "step-100"


def test_an_alias_that_is_moved_by_a_killed_server_points_somewhere_or_nowhere(tmp_path: Path, numbers: Path) -> None:
    found = [one["sql@prod"] for one in at_any_line(tmp_path, numbers, point)]
    assert set(found) == {"step-100", None}
    assert found[-1] == "step-100"


def test_an_unload_that_is_killed_anywhere_forgets_all_or_nothing(tmp_path: Path, numbers: Path) -> None:
    found = at_any_line(tmp_path, numbers, unload)
    for one in found:
        assert one["sql"] in ("step-200", None)
        assert (one["sql"] is None) == (one["sql@best"] is None)
    assert found[-1]["sql"] is None
