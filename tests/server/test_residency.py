"""Which adapters are in an engine: never too many, never taken away from a request, never under a name of before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import LorakitError
from lorakit.server.engines.engine import LoadFailed
from lorakit.server.following.residency import NoSlot, Residency
from lorakit.server.following.turns import Resident
from tests.server.fake_engine import FakeEngine, fingerprint_of, put_adapter

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("adapters")
    return {name: put_adapter(parent / name, seed) for seed, name in enumerate("abcde")}


class Room:
    """A residency over a fake engine, by one-letter names."""

    def __init__(
        self, base: Path, folders: dict[str, Path], slots: int, *, memory: int = 0, pinned: str = "",
        fair_wait: float = 0.0,
    ) -> None:  # fmt: skip
        self.engine = FakeEngine(base, slots=slots, memory=memory)
        self.kept = ""
        self.residency = Residency(
            self.engine, kept=lambda name: name in self.kept, pinned=lambda name: name in pinned, fair_wait=fair_wait
        )
        self.folders = folders

    async def bring(self, name: str, wait: float = 0.5, *, urgent: bool = False) -> None:
        await self.residency.ensure(name, self.folders[name], wait=wait, urgent=urgent)

    def use(self, name: str) -> Resident:
        resident = self.residency.use(name)
        assert resident is not None
        return resident

    @property
    def inside(self) -> str:
        return "".join(sorted(name[0] for name in self.engine.inside))


async def test_what_is_in_the_engine_is_not_loaded_again(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 2)
    await asyncio.gather(*(room.bring("a") for _ in range(20)))
    assert room.engine.loads == ["a"]


async def test_the_least_recently_used_idle_adapter_gives_its_slot(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 2)
    await room.bring("a")
    await room.bring("b")
    used = room.residency.use("a")
    assert used is not None
    room.residency.done(used)
    await room.bring("c")
    assert room.inside == "ac"


async def test_what_should_be_kept_goes_last_of_the_idle_ones(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 2)
    await room.bring("a")
    await room.bring("b")
    room.kept = "ac"
    await room.bring("c")
    assert room.inside == "ac"
    room.kept = "acd"
    await room.bring("d")
    assert room.inside == "cd"


async def test_a_busy_adapter_is_never_evicted(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 1)
    await room.bring("a")
    used = room.residency.use("a")
    assert used is not None
    with pytest.raises(NoSlot):
        await room.bring("b", wait=0.05)
    assert room.inside == "a"
    assert room.residency.use("a") is not None, "it answers again after nobody waits for its slot any more"


async def test_an_adapter_takes_no_new_requests_while_its_slot_is_waited_for(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 1)
    await room.bring("a")
    used = room.residency.use("a")
    assert used is not None
    waiting = asyncio.create_task(room.bring("b"))
    await asyncio.sleep(0.01)
    assert room.residency.use("a") is None
    room.residency.done(used)
    await waiting
    assert room.inside == "b"


async def test_the_slot_of_whichever_comes_to_rest_first_is_taken(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 2)
    await room.bring("a")
    await room.bring("b")
    long, short = room.residency.use("a"), room.residency.use("b")  # a is the least recently used
    assert long is not None
    assert short is not None
    waiting = asyncio.create_task(room.bring("c"))
    await asyncio.sleep(0.01)
    room.residency.done(short)
    await waiting
    assert room.inside == "ac"
    assert room.residency.use("a") is not None


async def test_an_adapter_comes_back_under_a_name_that_the_engine_never_heard(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 1)
    for name in "abab":
        await room.bring(name)
    assert len(set(room.engine.loads)) == 4
    resident = room.residency.find("b")
    assert resident is not None
    assert resident.engine_name in room.engine.inside


async def test_a_failed_load_leaves_the_slot_free_and_may_be_tried_again(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 1)
    room.engine.refuses.add(fingerprint_of(folders["a"]))
    with pytest.raises(LoadFailed, match="not loaded here"):
        await room.bring("a")
    assert room.residency.use("a") is None
    await room.bring("b")
    room.engine.refuses.clear()
    await room.bring("a")
    assert room.inside == "a"


async def test_an_adapter_whose_first_token_is_no_number_is_taken_out_again(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 1)
    room.engine.broken.add(fingerprint_of(folders["a"]))
    with pytest.raises(LoadFailed, match="nan"):
        await room.bring("a")
    assert room.inside == ""
    assert room.residency.use("a") is None


async def test_nothing_is_answered_by_an_adapter_that_is_still_being_proven(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 1)
    seen: list[bool] = []

    async def try_out(name: str) -> None:
        seen.append(room.residency.use("a") is None)

    room.engine.try_out = try_out  # type: ignore[method-assign]
    await room.bring("a")
    assert seen == [True]


async def test_an_engine_that_breaks_while_it_proves_keeps_no_slot_for_ever(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 1)
    works = room.engine.try_out

    async def breaks(name: str) -> None:
        raise OSError("gone")

    room.engine.try_out = breaks  # type: ignore[method-assign]
    with pytest.raises(OSError, match="gone"):
        await room.bring("a")
    room.engine.try_out = works  # type: ignore[method-assign]
    await room.bring("b")
    await room.bring("a")
    assert room.inside == "a"


async def test_leaving_waits_for_the_last_request_and_lets_others_load_meanwhile(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 2)
    await room.bring("a")
    used = room.residency.use("a")
    assert used is not None
    leaving = asyncio.create_task(room.residency.leave("a"))
    await asyncio.sleep(0)
    assert room.residency.use("a") is None
    await room.bring("b", wait=0.05)
    assert room.inside == "ab"
    room.residency.done(used)
    await leaving
    assert room.inside == "b"


async def test_what_was_to_leave_stays_when_it_is_wanted_again(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 1)
    await room.bring("a")
    used = room.residency.use("a")
    assert used is not None
    leaving = asyncio.create_task(room.residency.leave("a"))
    await asyncio.sleep(0)
    await room.bring("a", wait=0.05)
    room.residency.done(used)
    await leaving
    assert room.inside == "a"
    assert room.residency.use("a") is not None


async def test_a_slot_is_not_waited_for_longer_than_told(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 1)
    await room.bring("a")
    assert room.residency.use("a") is not None
    waiting = [asyncio.create_task(room.bring(name, wait=0.05)) for name in "bcde"]
    done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 1)
    assert all(isinstance(error, NoSlot) for error in done)


Step = st.tuples(st.sampled_from("abcde"), st.integers(0, 6), st.sampled_from(["ask", "ask", "ask", "leave"]))


@settings(max_examples=60)
@given(steps=st.lists(Step, max_size=25), slots=st.integers(1, 3), memory=st.integers(0, 4))
def test_whatever_is_asked_in_whatever_order_the_engine_gets_what_it_relies_on(
    numbers: Path, folders: dict[str, Path], steps: list[tuple[str, int, str]], slots: int, memory: int
) -> None:
    """The fake engine itself asserts: no name twice, no place too many, nothing removed that answers."""

    async def play() -> None:
        room = Room(numbers, folders, slots, memory=memory)

        async def ask(name: str, yields: int) -> None:
            while (resident := room.residency.use(name)) is None:
                await room.bring(name, wait=5)
            room.engine._answering[resident.engine_name] += 1
            assert room.engine.inside[resident.engine_name] == fingerprint_of(folders[name])
            assert sum(count > 0 for count in room.engine._answering.values()) <= slots
            for _ in range(yields):
                await asyncio.sleep(0)
            room.engine._answering[resident.engine_name] -= 1
            room.residency.done(resident)

        tasks = []
        for name, yields, what in steps:
            tasks.append(asyncio.create_task(ask(name, yields) if what == "ask" else room.residency.leave(name)))
            if yields % 2:
                await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*tasks), 10)
        assert len(room.engine.inside) <= max(slots, memory)

    asyncio.run(play())


async def test_an_engine_that_is_too_busy_to_try_an_adapter_out_keeps_nothing_of_it(
    numbers: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(numbers, folders, 2)
    with monkeypatch.context() as patched:
        patched.setattr(room.engine, "try_out", lambda _: asyncio.sleep(60))
        with pytest.raises(NoSlot, match="too busy to try 'a' out"):
            await room.bring("a", wait=0.02)
        await asyncio.sleep(0.03)
    assert room.inside == ""
    await room.bring("a")
    assert room.residency.use("a") is not None


# whose turn it is


async def held(room: Room, name: str) -> Resident:
    await room.bring(name)
    return room.use(name)


async def test_a_hot_adapter_keeps_its_slot_for_fair_wait_and_then_gives_it_to_who_waits(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 1, fair_wait=0.1)
    hot = [await held(room, "a")]
    waiting = asyncio.create_task(room.bring("b", wait=5))
    for _ in range(5):  # a request always in flight
        await asyncio.sleep(0.005)
        hot.append(room.use("a"))
        room.residency.done(hot.pop(0))
    assert not waiting.done()
    await asyncio.sleep(0.12)
    assert room.residency.use("a") is None, "another has waited for long enough"
    room.residency.done(hot.pop())
    await waiting
    assert room.inside == "b"


async def test_a_second_one_makes_place_when_the_first_is_at_a_long_answer(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 2, fair_wait=0.05)
    long, hot = await held(room, "a"), await held(room, "b")
    waiting = asyncio.create_task(room.bring("c", wait=5))
    await asyncio.sleep(0.07)
    assert room.residency.use("a") is None
    room.residency.done(room.use("b"))
    await asyncio.sleep(0.05)
    assert room.residency.use("b") is None
    room.residency.done(hot)
    await waiting
    assert room.inside == "ac"
    room.residency.done(long)


async def test_what_is_urgent_need_not_wait_for_its_turn(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 1, fair_wait=60)
    used = await held(room, "a")
    waiting = asyncio.create_task(room.bring("b", wait=5, urgent=True))
    await asyncio.sleep(0.01)
    assert room.residency.use("a") is None
    room.residency.done(used)
    await waiting
    assert room.inside == "b"


async def test_under_a_hot_adapter_each_of_many_others_has_its_turn(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 1, fair_wait=0.02)
    ends = asyncio.Event()

    async def ask(name: str) -> None:
        while (resident := room.residency.use(name)) is None:
            await room.bring(name, wait=10)
        await asyncio.sleep(0.002)
        room.residency.done(resident)

    async def hot() -> None:
        while not ends.is_set():
            await ask("a")

    hotting = [asyncio.create_task(hot()) for _ in range(3)]
    await asyncio.sleep(0.01)
    await asyncio.wait_for(asyncio.gather(*(ask(name) for name in "bcdebcde")), 10)
    ends.set()
    await asyncio.gather(*hotting)
    assert len(room.engine.loads) <= 12, "those who want the same come in together"


async def test_nobody_waits_behind_a_load_where_there_are_slots_enough(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 3)
    await room.bring("a")
    room.engine.load_seconds = 0.05
    loading = asyncio.create_task(room.bring("b"))
    await asyncio.sleep(0.01)
    room.residency.done(room.use("a"))
    await loading


async def test_a_client_that_goes_away_while_it_waits_leaves_nothing_waiting(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 1)
    used = await held(room, "a")
    waiting = [asyncio.create_task(room.bring("b", wait=5)) for _ in range(3)]
    await asyncio.sleep(0.01)
    assert room.residency.waiting == 3
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert room.residency.waiting == 0
    room.residency.done(room.use("a"))
    room.residency.done(used)
    await room.bring("c")
    assert "b" not in room.engine.loads


# three tiers


async def test_memory_holds_more_than_answer_at_once_and_nothing_is_loaded_twice(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 2, memory=4)
    for name in "abcdabcd":
        await room.bring(name)
        room.residency.done(room.use(name))
    assert room.engine.loads == list("abcd")


async def test_a_request_waits_for_a_slot_though_its_adapter_is_in_memory(
    numbers: Path, folders: dict[str, Path]
) -> None:
    room = Room(numbers, folders, 2, memory=4)
    for name in "abc":
        await room.bring(name)
    await asyncio.sleep(0.01)
    one, two = room.use("a"), room.use("b")
    assert room.residency.use("c") is None
    waiting = asyncio.create_task(room.bring("c", wait=5))
    await asyncio.sleep(0.01)
    room.residency.done(one)
    await waiting
    assert room.use("c").in_flight == 1
    room.residency.done(two)


async def test_memory_makes_place_from_the_least_recently_used(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 1, memory=3)
    for name in "abcad":
        await room.bring(name)
        room.residency.done(room.use(name))
    assert room.inside == "acd"


async def test_what_is_pinned_never_leaves(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 2, pinned="a")
    for name in "abcde":
        await room.bring(name)
        room.residency.done(room.use(name))
    assert room.inside == "ae"
    used = room.use("e")
    with pytest.raises(NoSlot):
        await room.bring("b", wait=0.05)
    room.residency.done(room.use("a"))
    room.residency.done(used)


# the same content under several names


async def test_two_names_of_one_content_are_one_adapter_in_the_engine(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 2)
    await room.bring("a")
    await room.residency.ensure("final", folders["a"], wait=1)
    assert room.engine.loads == ["a"]
    used = room.use("final")
    assert used is room.residency.find("a")
    await room.residency.leave("a")
    assert room.residency.use("a") is None
    assert room.inside == "a", "the other name still means it"
    leaving = asyncio.create_task(room.residency.leave("final"))
    await asyncio.sleep(0.01)
    assert not leaving.done()
    room.residency.done(used)
    await leaving
    assert room.inside == ""


async def test_two_names_that_ask_at_once_load_it_once(numbers: Path, folders: dict[str, Path]) -> None:
    room = Room(numbers, folders, 2)
    room.engine.load_seconds = 0.02
    names = ("a", "final", "a", "other")
    await asyncio.gather(*(room.residency.ensure(name, folders["a"], wait=1) for name in names))
    assert room.engine.loads == ["a"]
    assert {room.use(name).engine_name for name in names} == {"a"}


async def test_an_engine_that_does_not_let_go_is_said_and_what_waits_is_told(
    numbers: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(numbers, folders, 1)
    await room.bring("a")

    async def stuck(_: str) -> None:
        raise OSError("stuck")

    with monkeypatch.context() as patched:
        patched.setattr(room.engine, "remove", stuck)
        with pytest.raises(LorakitError, match="did not let go of 'a': stuck"):
            await room.residency.leave("a")
        with pytest.raises(OSError, match="stuck"):
            await room.bring("b")
    await room.bring("b")
    assert room.inside == "b"
