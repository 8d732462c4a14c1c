"""Which adapters are in an engine: never too many, never taken away from a request, never under a name of before."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.server.engine import LoadFailed
from lorakit.server.residency import NoSlot, Residency
from tests.server.fake_engine import FakeEngine, fingerprint_of, put_adapter

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("adapters")
    return {name: put_adapter(parent / name, seed) for seed, name in enumerate("abcde")}


class Room:
    """A residency over a fake engine, by one-letter names."""

    def __init__(self, base: Path, folders: dict[str, Path], slots: int) -> None:
        self.engine = FakeEngine(base, slots=slots)
        self.residency = Residency(self.engine)
        self.folders = folders

    async def bring(self, name: str, keep: tuple[str, ...] = (), wait: float = 0.5, prove: bool = True) -> None:
        await self.residency.ensure(name, self.folders[name], keep=keep, wait=wait, prove=prove)

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
    await room.bring("c", keep=("a", "c"))
    assert room.inside == "ac"
    await room.bring("d", keep=("a", "c", "d"))
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
@given(steps=st.lists(Step, max_size=25), slots=st.integers(1, 3))
def test_whatever_is_asked_in_whatever_order_the_engine_gets_what_it_relies_on(
    numbers: Path, folders: dict[str, Path], steps: list[tuple[str, int, str]], slots: int
) -> None:
    """The fake engine itself asserts: no name twice, no slot too many, nothing removed that answers."""

    async def play() -> None:
        room = Room(numbers, folders, slots)

        async def ask(name: str, yields: int) -> None:
            while (resident := room.residency.use(name)) is None:
                await room.bring(name, wait=5)
            room.engine._answering[resident.engine_name] += 1
            assert room.engine.inside[resident.engine_name] == fingerprint_of(folders[name])
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
        assert len(room.engine.inside) <= slots

    asyncio.run(play())


async def test_an_engine_that_is_too_busy_to_try_an_adapter_out_keeps_nothing_of_it(
    numbers: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(numbers, folders, 2)
    with monkeypatch.context() as patched:
        patched.setattr(room.engine, "try_out", lambda _: asyncio.sleep(60))
        with pytest.raises(NoSlot, match="too busy to try 'a' out"):
            await room.bring("a", wait=0.02)
    assert room.inside == ""
    await room.bring("a")
    assert room.residency.use("a") is not None
