"""A run that another server changed, taken over into what is served: here the changes are made in the store by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.store.splits import Split
from tests.server.fake_engine import put_checkpoint
from tests.server.test_reconciler import Room, room

pytestmark = pytest.mark.anyio


async def served(r: Room, *steps: int) -> dict[int, int]:
    """The ids of checkpoints of `sql` by their steps, the last of which the name means."""
    for step in steps:
        put_checkpoint(r.runs / "sql", step)
        await r.step()
    return {one.facts.step or 0: one.id for one in r.reconciler.runs["sql"].revisions.values()}


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to that")


async def test_the_run_stays_the_same_object_and_all_of_it_is_new(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers) as r:
        ids = await served(r, 1, 2)
        run, store = r.reconciler.runs["sql"], r.reconciler.store

        def change() -> None:
            store.move_alias("sql", "", ids[1], "set", pinned=True)
            split = Split({ids[1]: 0.5, ids[2]: 0.5}, (), 3)
            store.move_alias("sql", "half", ids[1], "split: so", passed_over={}, split=split)

        await r.reconciler.catch_up("sql", change)
        assert r.reconciler.runs["sql"] is run
        assert (run.pinned, run.aliases[""], run.splits["half"].seed) == (True, ids[1], 3)
        assert r.meant("sql") == "step-1"
        assert any("sql is now sql@step-1" in message for message in r.told("alias"))
        assert any("sql@half" in message for message in r.told("split"))
        await r.step()
        assert r.meant("sql") == "step-1"


async def test_what_was_passed_over_elsewhere_is_here_and_what_is_not_any_more_is_not(
    tmp_path: Path, numbers: Path
) -> None:
    async with room(tmp_path, numbers) as r:
        ids = await served(r, 1, 2)
        store = r.reconciler.store
        await r.reconciler.catch_up(
            "sql", lambda: store.move_alias("sql", "", ids[1], "automatic", passed_over={ids[2]: "it fails"})
        )
        await r.step()
        assert r.meant("sql") == "step-1"
        assert r.reconciler.passed_over == {ids[2]: "it fails"}
        await r.reconciler.catch_up("sql", lambda: store.move_alias("sql", "", ids[2], "set"))
        assert r.reconciler.passed_over == {}
        assert r.meant("sql") == "step-2"


async def test_revisions_that_are_gone_leave_the_engine_after_their_last_request(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers) as r:
        ids = await served(r, 1, 2)
        old = r.reconciler.runs["sql"].revisions[ids[1]]
        await r.reconciler.bring_in(old)
        resident = r.reconciler.residency.use(old.name)
        assert resident is not None
        await r.reconciler.catch_up("sql", lambda: _ignore(r.reconciler.store.remove([ids[1]])))
        assert r.meant("sql@step-1") is None
        await asyncio.sleep(0.05)
        assert old.name in r.engine.inside
        r.reconciler.residency.done(resident)
        await until(lambda: old.name not in r.engine.inside and not old.folder.exists())
        assert r.meant("sql") == "step-2"


async def test_a_run_that_is_forgotten_is_gone_and_one_that_comes_is_served(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers) as r:
        await served(r, 1)
        await r.reconciler.catch_up("sql", lambda: _ignore(r.reconciler.store.forget("sql")))
        assert r.meant("sql") is None
        assert "sql" not in r.reconciler.runs
        await r.reconciler.catch_up("nothing", lambda: None)
        assert r.told("gone") == ["sql is no longer served"]
        await until(lambda: not r.engine.inside and not list((tmp_path / "home" / "revisions").iterdir()))


async def test_what_another_server_points_at_is_answered_before_this_one_tried_it(
    tmp_path: Path, numbers: Path
) -> None:
    async with room(tmp_path, numbers) as r:
        ids = await served(r, 1, 2)
        revision = r.reconciler.runs["sql"].revisions[ids[1]]
        r.reconciler.found(revision, {})
        assert r.meant("sql@step-1") is None
        await r.reconciler.catch_up("sql", lambda: r.reconciler.store.move_alias("sql", "prod", ids[1], "set"))
        assert r.meant("sql@prod") == r.meant("sql@step-1") == "step-1"


async def test_what_was_refused_here_and_another_server_points_at_is_tried_again(tmp_path: Path, numbers: Path) -> None:
    async with room(tmp_path, numbers) as r:
        ids = await served(r, 1, 2)
        r.reconciler._failed[ids[1]] = "no memory"
        assert r.meant("sql@step-1") is None
        await r.reconciler.catch_up("sql", lambda: r.reconciler.store.move_alias("sql", "prod", ids[1], "set"))
        assert r.meant("sql@prod") == "step-1"


def _ignore(_: object) -> None: ...
