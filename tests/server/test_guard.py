"""What a name follows to is left again when it answers worse than what the name meant before."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from lorakit.server.following.guard import WINDOW, Rate, failed, worse_beside, worse_than
from lorakit.server.requests.answered import Answered
from tests.server.fake_engine import FakeEngine, Served, fingerprint_of, put_checkpoint, serving

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("now", "before", "worse"), [
    ((5, 5), [], True), ((4, 4), [], False), ((1, 5), [], False), ((3, 5), [], True), ((0, 200), [], False),
    ((20, 200), [], False), ((40, 200), [], True), ((40, 200), [(40, 200)], False), ((40, 200), [(4, 200)], True),
    ((5, 5), [(5, 5)], False), ((60, 200), [(0, 200), (50, 200)], False), ((5, 5), [(0, 0)], True),
])  # fmt: skip
def test_it_is_worse_when_chance_can_not_explain_the_rise(
    now: tuple[int, int], before: list[tuple[int, int]], worse: bool
) -> None:
    assert (worse_than(Rate(*now), [Rate(*one) for one in before], 0.1) is not None) == worse


def test_the_share_behind_a_sample_is_wilsons_lower_bound() -> None:
    """Against values of the published formula, computed with another program (R's prop.test without correction)."""
    assert [round(Rate(*sample).at_least, 4) for sample in ((5, 5), (1, 10), (20, 200), (0, 50))] == [
        0.5655, 0.0179, 0.0657, 0.0,
    ]  # fmt: skip


def test_and_at_most_wilsons_upper_bound() -> None:
    assert [round(Rate(*sample).at_most, 4) for sample in ((0, 5), (1, 10), (20, 200), (5, 5), (0, 0))] == [
        0.4345, 0.4042, 0.1494, 1.0, 1.0,
    ]  # fmt: skip


def answers(pattern: str) -> dict[str, list[tuple[int, bool]]]:
    """Of revisions that are called by letters, in the order of their answers: a capital is one that failed."""
    found: dict[str, list[tuple[int, bool]]] = {}
    for place, letter in enumerate(pattern):
        found.setdefault(letter.lower(), []).append((place, letter.isupper()))
    return {name: given[-WINDOW:] for name, given in found.items()}


@pytest.mark.parametrize(("pattern", "whose", "worse"), [
    ("ab" * 20 + "Ab" * 5, "a", True),
    ("ab" * 20 + "Ab" * 4, "a", False),
    ("a" + "b" * 19, "a", False),
    (("a" + "b" * 19) * 5 + ("A" + "b" * 19) * 4, "a", True),  # 5%, and then all
    (("a" + "b" * 19) * 200 + ("A" + "b" * 19) * 5, "a", True),  # after it was well for long
    (("a" + "b" * 19) * 200 + ("A" + "b" * 19) * 3, "a", False),
    ("AB" * 50, "a", False),  # the engine fails
    (("a" + "b" * 19) * 50 + ("A" + "B" * 19) * 10, "b", False),
    (("a" + "b" * 19) * 50 + "B" * 15, "b", False),  # and the other was not asked yet
    (("a" + "b" * 19) * 50 + ("a" + "B" * 19) * 3, "b", True),  # the larger one fails
    (("a" + "b" * 19) * 50 + ("A" + "B" * 19) * 30 + ("a" + "b" * 19) * 200 + "A", "a", False),  # it was well again
    (("a" + "b" * 19) * 50 + ("A" + "B" * 19) * 30 + ("a" + "b" * 19) * 20 + "A", "a", False),
    ("AbcAbcAbcAbcAbc", "a", True),
    ("ABc" * 5, "a", False),
    ("ABc" * 14, "a", True),  # of three two fail, which takes longer to say
    ("ABccccccc" * 12, "a", True),
    ("A" * 50, "a", False),  # alone
    ("aaaaAbbbbb" * 40, "a", True),
    ("aaaaaaaaaAbbbbbbbbbb" * 20, "a", False),
])  # fmt: skip
def test_of_those_that_share_a_name_one_is_worse_when_it_fails_while_the_others_do_not(
    pattern: str, whose: str, worse: bool
) -> None:
    given = answers(pattern)
    beside = [theirs for name, theirs in given.items() if name != whose]
    assert (worse_beside(given[whose], beside, 0.1) is not None) == worse


@pytest.mark.parametrize("seed", range(20))
def test_as_many_errors_of_each_by_chance_take_none_out(seed: int) -> None:
    chance = random.Random(seed)
    letters = ["a" if chance.random() < 0.05 else "b" for _ in range(4000)]
    pattern = "".join(letter.upper() if chance.random() < 0.03 else letter for letter in letters)
    for end in range(100, len(pattern), 100):
        given = answers(pattern[:end])
        assert worse_beside(given.get("a", []), [given["b"]], 0.1) is None
        assert worse_beside(given["b"], [given.get("a", [])], 0.1) is None


@pytest.mark.parametrize(("status", "broke", "said"), [
    (200, False, False), (200, True, True), (500, False, True), (502, False, True), (503, False, None),
    (504, False, None), (400, False, None), (404, False, None), (499, False, None),
])  # fmt: skip
def test_what_an_answer_says_of_its_revision(status: int, broke: bool, said: bool | None) -> None:
    assert failed(Answered("sql", "/v1/completions", status, 0.1, broke=broke)) is said


async def follow_to(served: Served, folder: Path, step: int, **more: Any) -> str:
    run = folder / "runs" / "sql"
    weights = put_checkpoint(run, step)
    if more.pop("fails", False):
        served.engine.fails.add(fingerprint_of(weights))

    async def there() -> str | None:
        name = served.reconciler.resolve("sql")
        return name.name if name is not None and name.facts.step == step else None

    found: str = await served.until(there)
    return found


async def asked(served: Served, count: int, model: str = "sql") -> list[int]:
    return [(await served.ask(model)).status_code for _ in range(count)]


async def test_a_name_goes_back_from_what_fails_and_does_not_return_to_it(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        first = await served.revision_of("sql")
        assert set(await asked(served, 10)) == {200}
        bad = await follow_to(served, tmp_path, 200, fails=True)
        assert set(await asked(served, 5)) == {500}
        await served.until(lambda: served.reconciler.resolve("sql").name == first)  # type: ignore[union-attr]
        assert set(await asked(served, 5)) == {200}
        await served.reconciler.step()
        assert await served.revision_of("sql") == first
        assert served.reconciler.resolve("sql@step-200").name == bad  # type: ignore[union-attr]
        told = [event.data for event in served.reconciler.events._kept if event.kind == "alias"]
        assert told[-1]["why"] == "automatic rollback: 5 of its last 5 answers failed, 0% of those before"
        newer = await follow_to(served, tmp_path, 300)
        assert await served.revision_of("sql") == newer


async def test_what_finished_before_it_and_was_never_asked_is_not_tried_instead(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100)
    async with serving(tmp_path, numbers, debounce=0.3) as served:
        first = await served.revision_of("sql")
        put_checkpoint(run, 200)
        await follow_to(served, tmp_path, 300, fails=True)
        assert "step-200" in str(await served.revision_of("sql@step-200"))
        await asked(served, 5)
        await served.until(lambda: served.reconciler.resolve("sql").name == first)  # type: ignore[union-attr]
        await served.reconciler.step()
        assert await served.revision_of("sql") == first
        revisions = (await served.client.get("/v1/adapters/sql")).json()["revisions"]
        assert [str(one["reason"]).partition(" ")[0] for one in revisions] == ["None", "it", "5"]
        assert await follow_to(served, tmp_path, 400) == await served.revision_of("sql")


async def test_what_was_gone_back_from_is_not_followed_after_a_restart(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        first = await served.revision_of("sql")
        await follow_to(served, tmp_path, 200, fails=True)
        await asked(served, 5)
        await served.until(lambda: served.reconciler.resolve("sql").name == first)  # type: ignore[union-attr]
    async with serving(tmp_path, numbers) as served:
        await served.reconciler.step()
        assert await served.revision_of("sql") == first
        await served.client.put("/v1/adapters/sql/aliases/sql", json={"revision": "step-200"})  # a person knows better
    async with serving(tmp_path, numbers) as served:
        assert "step-200" in str(await served.revision_of("sql"))


async def test_one_whose_first_token_is_no_number_any_more_is_left_at_its_first_failure(
    tmp_path: Path, numbers: Path
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    async with serving(tmp_path, numbers) as served:
        first = await served.revision_of("sql")
        await follow_to(served, tmp_path, 200, fails=True)
        served.engine.broken |= served.engine.fails
        assert await asked(served, 1) == [500]
        await served.until(lambda: served.reconciler.resolve("sql").name == first)  # type: ignore[union-attr]


async def test_an_engine_that_fails_everything_moves_no_name(tmp_path: Path, numbers: Path) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    put_checkpoint(tmp_path / "runs" / "chat", 100, seed=7)
    async with serving(tmp_path, numbers) as served:
        await follow_to(served, tmp_path, 200)
        second = await served.revision_of("sql")
        served.engine.fails |= set(served.engine.inside.values())
        for _ in range(10):
            await asked(served, 1, "chat")
            await asked(served, 1)
        await asyncio.sleep(0.05)
        assert served.reconciler.resolve("sql").name == second  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["pinned", "never", "alone"])
async def test_it_stays_where_a_person_put_it_or_where_nothing_was_before(
    tmp_path: Path, numbers: Path, how: str
) -> None:
    put_checkpoint(tmp_path / "runs" / "sql", 100)
    more = {"max_error_rise": 1.0} if how == "never" else {}
    async with serving(tmp_path, numbers, **more) as served:
        name = await served.revision_of("sql")
        if how == "pinned":
            await follow_to(served, tmp_path, 200)
            await served.client.put("/v1/adapters/sql/aliases/sql", json={"revision": "step-100"})
        elif how == "never":
            name = await follow_to(served, tmp_path, 200)
        served.engine.fails |= set(served.engine.inside.values())
        assert set(await asked(served, 8)) == {500}
        await asyncio.sleep(0.05)
        assert served.reconciler.resolve("sql").name == name  # type: ignore[union-attr]


async def test_smoke_prompts_hold_a_name_back_until_a_checkpoint_passes(tmp_path: Path, numbers: Path) -> None:
    run = tmp_path / "runs" / "sql"
    good = fingerprint_of(put_checkpoint(run, 100))
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "x", "matches": "^({good}|SECOND)$"}}')
    async with serving(tmp_path, numbers, probe=str(tmp_path / "prompts.jsonl")) as served:
        first = await served.revision_of("sql")
        put_checkpoint(run, 200)

        def held() -> list[str]:
            return [event.data["reason"] for event in served.reconciler.events._kept if event.kind == "held"]

        (reason,) = await served.until(held)
        assert "smoke prompt of line 1" in reason
        await served.reconciler.step()
        assert await served.revision_of("sql") == first
        assert "step-200" in str(await served.revision_of("sql@latest"))
        assert len(held()) == 1
        await served.client.put("/v1/adapters/sql/aliases/sql", json={"revision": "step-200"})
        assert "step-200" in str(await served.revision_of("sql")), "what a person asks for is done"


async def test_an_engine_that_dies_under_the_smoke_prompts_says_nothing_of_the_adapter(
    tmp_path: Path, numbers: Path
) -> None:
    run = tmp_path / "runs" / "sql"
    put_checkpoint(run, 100)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}')
    engine = FakeEngine(numbers)
    async with serving(tmp_path, numbers, engine=engine, probe=str(tmp_path / "prompts.jsonl")) as served:
        first = await served.revision_of("sql")
        works = engine.call

        async def dies(*_: Any) -> tuple[int, bytes]:
            engine.dead = True
            return 500, b"EngineDeadError"

        engine.call = dies  # type: ignore[method-assign]
        put_checkpoint(run, 200)
        await served.until(lambda: engine.dead)
        engine.call, engine.dead = works, False  # type: ignore[method-assign]
        await served.until(lambda: served.reconciler.resolve("sql").name != first)  # type: ignore[union-attr]
