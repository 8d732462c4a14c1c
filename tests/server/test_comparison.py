"""How the revisions that answer for one name compare, side by side."""

from __future__ import annotations

import asyncio
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lorakit.server.following.served import Served as Known
from lorakit.server.requests.answered import Answered, Shadowed
from lorakit.server.sharing import comparison as module
from lorakit.server.sharing.comparison import Comparison
from lorakit.server.sharing.texts import Agreement
from lorakit.store.catalog import Facts, Revision, Run
from lorakit.store.splits import Split
from tests.server.fake_engine import Served, serving
from tests.server.test_splitting import CANARY, HALVES, asked, put, set_split, until_there

pytestmark = pytest.mark.anyio


def revision(step: int, run: str = "sql") -> Revision:
    return Revision(step, run, "step", f"{step:08x}" * 8, Path(), Facts(step=step), 8, 1, "", 0.0)


def run_of(*steps: int, name: str = "sql", **more: Any) -> Run:
    return Run(name, {step: revision(step, name) for step in steps}, aliases={"": steps[-1]}, **more)


def over(*runs: Run) -> Comparison:
    known = SimpleNamespace(runs={run.name: run for run in runs}, observers=[], shadow_observers=[])
    return Comparison(cast(Known, known))


def answer(step: int, seconds: float = 0.1, *, model: str = "sql", status: int = 200, **more: Any) -> Answered:
    name = model.partition("@")[0]
    return Answered(model, "/v1/completions", status, seconds, revision(step, name), **more)


# numbers


def test_times_are_quantiles_of_good_answers_and_errors_a_share_of_all() -> None:
    run = run_of(500, 600, splits={"": Split({600: 0.1, 500: 0.9})})
    compared = over(run)
    times = [(number * 37 % 101) / 100 for number in range(101)]
    for seconds in times:
        compared.answered(answer(600, seconds, first_byte=seconds / 2, completion_tokens=int(seconds * 100)))
    for status in (500, 500, 400, 499, 503):
        compared.answered(answer(600, 99.0, status=status))
    canary, stable = compared.of(run)
    assert (canary["requests"], canary["errors"], canary["error_rate"]) == (106, 2, 2 / 106)
    assert canary["seconds"] == {"p50": statistics.median_low(times), "p95": sorted(times)[95]}
    assert canary["first_byte"] == {"p50": 0.25, "p95": sorted(times)[95] / 2}
    assert canary["generated"]["p50"] == 50 or canary["generated"]["p50"] == 51
    assert canary["agreement"] is None
    assert stable == {
        "revision": revision(500).name, "aliases": ["sql"], "share": 0.9, "shadow": False, "requests": 0, "errors": 0,
        "error_rate": None, "dropped": 0, "seconds": {"p50": None, "p95": None},
        "first_byte": {"p50": None, "p95": None}, "generated": {"mean": None, "p50": None}, "agreement": None,
    }  # fmt: skip


def test_a_shadow_says_how_often_and_how_far_it_agrees() -> None:
    run = run_of(600, 500, splits={"": Split({500: 1.0}, (600,))})
    compared = over(run)
    for equal, prefix in ((True, 1.0), (False, 0.5), (False, 0.0)):
        compared.shadowed(Shadowed("sql", revision(600), answer(600), Agreement(equal, prefix)))
    compared.shadowed(Shadowed("sql", revision(600), answer(600, status=500)))
    compared.shadowed(Shadowed("sql", revision(600)))
    stable, shadow = compared.of(run)
    assert (stable["share"], stable["shadow"], stable["requests"]) == (1.0, False, 0)
    assert (shadow["share"], shadow["shadow"], shadow["requests"], shadow["errors"]) == (None, True, 4, 1)
    assert shadow["agreement"] == {"compared": 3, "equal": 1 / 3, "prefix": 0.5}
    assert shadow["dropped"] == 1


def test_each_alias_counts_for_itself_and_what_names_one_revision_for_none() -> None:
    run = run_of(500, 600, splits={"": Split({600: 0.5, 500: 0.5}), "prod": Split({500: 0.1, 600: 0.9})})
    compared = over(run)
    for model in ("sql", "sql@prod", "sql@prod", "sql@step-600", "sql@latest", "mix(sql=1)", "nobody"):
        compared.answered(answer(600, model=model))
    rows = {(row["aliases"][0], row["revision"]): row["requests"] for row in compared.of(run)}
    assert rows == {
        ("sql", revision(600).name): 1, ("sql", revision(500).name): 0,
        ("prod", revision(500).name): 0, ("prod", revision(600).name): 2,
    }  # fmt: skip


def test_without_a_split_it_is_what_answered_lately_and_no_more_than_a_few() -> None:
    run = run_of(*range(1, 21))
    compared = over(run)
    for step in range(1, 21):
        compared.answered(answer(step))
        compared.answered(answer(1))
    rows = compared.of(run)
    assert len(rows) == module.LATELY
    assert revision(20).name in {row["revision"] for row in rows}
    assert {row["revision"]: row["requests"] for row in rows}[revision(1).name] == 21
    assert all(row["share"] is None and not row["shadow"] for row in rows)
    del run.revisions[20]
    assert revision(20).name not in {row["revision"] for row in compared.of(run)}


def test_what_is_remembered_stays_small_however_many_names_and_answers_there_are() -> None:
    runs = [run_of(1, name=f"run-{number}") for number in range(300)]
    split = run_of(1, 2, splits={"": Split({1: 0.5, 2: 0.5})})
    compared = over(split, *runs)
    for _ in range(module.WINDOW + 10):
        compared.answered(answer(1))
    for run in runs:
        compared.answered(answer(1, model=run.name))
    assert len(compared._names) <= module.MOST_NAMES + 1
    (row, _) = compared.of(split)
    assert row["requests"] == module.WINDOW + 10
    assert len(compared._names["sql"]["", 1].seconds) == module.WINDOW


# over HTTP


async def compared(served: Served) -> list[dict[str, Any]]:
    said = (await served.client.get("/v1/adapters/sql/comparison")).json()
    assert (said["object"], said["name"]) == ("comparison", "sql")
    found: list[dict[str, Any]] = said["revisions"]
    return found


async def test_the_shares_of_a_split_and_its_shadow_are_seen_side_by_side(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600, 700)
    async with serving(tmp_path, numbers) as served:
        names = await until_there(served, 500, 600, 700)
        assert await compared(served) == []
        await set_split(served, {**HALVES, "shadow": ["step-700"]})
        for _ in range(6):
            await served.ask("sql")
        await served.until(lambda: any_shadow(served, 6))
        rows = await compared(served)
        assert [(row["revision"], row["share"], row["requests"]) for row in rows] == [
            (names[600], 0.5, 3), (names[500], 0.5, 3), (names[700], None, 6),
        ]  # fmt: skip
        for row in rows:
            assert 0 < row["first_byte"]["p50"] <= row["seconds"]["p50"] <= row["seconds"]["p95"]
            assert row["generated"] == {"mean": 5, "p50": 5}
            assert (row["errors"], row["error_rate"]) == (0, 0)
        assert rows[2]["agreement"]["compared"] == 6
        assert rows[2]["agreement"]["equal"] == 0


async def any_shadow(served: Served, count: int) -> bool:
    return any(row["shadow"] and row["requests"] == count for row in await compared(served))


async def test_a_shadow_of_the_same_content_agrees_wholly(tmp_path: Path, numbers: Path) -> None:
    from tests.server.fake_engine import put_checkpoint

    put_checkpoint(tmp_path / "runs" / "sql", 500, seed=9)
    put_checkpoint(tmp_path / "runs" / "sql", 600, seed=9)
    async with serving(tmp_path, numbers) as served:
        await until_there(served, 500, 600)
        await set_split(served, {"revision": "step-500", "shadow": ["step-600"]})
        for more in ({}, {"stream": True}):
            await served.ask("sql", **more)
        await served.until(lambda: any_shadow(served, 2))
        assert (await compared(served))[1]["agreement"] == {"compared": 2, "equal": 1.0, "prefix": 1.0}


async def test_numbers_go_on_when_shares_change_and_begin_when_a_split_does(tmp_path: Path, numbers: Path) -> None:
    put(tmp_path, 500, 600)
    async with serving(tmp_path, numbers) as served:
        names = await until_there(served, 500, 600)
        await asked(served, 3)
        assert [(row["revision"], row["requests"], row["share"]) for row in await compared(served)] == [
            (names[600], 3, None)
        ]
        await set_split(served, HALVES)
        assert [row["requests"] for row in await compared(served)] == [0, 0]
        await asked(served, 10)
        await set_split(served, CANARY)
        assert [(row["requests"], row["share"]) for row in await compared(served)] == [(5, 0.05), (5, 0.95)]
        await set_split(served, {"revision": "step-500", "shadow": ["step-600"]})
        assert [(row["requests"], row["shadow"]) for row in await compared(served)] == [(5, False), (0, True)]
        await set_split(served, CANARY)
        await asked(served, 20)
        await set_split(served, {"revision": "step-600"})
        assert {row["revision"]: row["requests"] for row in await compared(served)} == {names[500]: 24, names[600]: 1}


async def test_what_an_unknown_name_has_is_not_found(tmp_path: Path, numbers: Path) -> None:
    async with serving(tmp_path, numbers) as served:
        answer = await served.client.get("/v1/adapters/nobody/comparison")
        assert answer.status_code == 404
        await asyncio.sleep(0)
