"""Every writer's own order, replayed: never finished before its files are, and always in the end."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.checkpoints.finished import look_at
from tests.checkpoints.writings import WAYS, WRITINGS, Disk, Way, Writing, pieces

WRITERS = sorted(WRITINGS)


def is_tensors(name: str) -> bool:
    return name.endswith(".safetensors")


def judge(disk: Disk, writing: Writing, turn: int) -> str:
    """The state, once it was seen that nothing is called finished which is not."""
    look = look_at(disk.folder)
    if look.state == "finished":
        turns = [
            all(disk.has(name, writing.bytes_of(name, each)) for name in writing.covered) for each in range(turn + 1)
        ]
        assert any(turns), look
        for name in writing.there:
            assert any(disk.has(name, writing.bytes_of(name, each)) for each in range(turn + 1)), (name, look)
    return look.state


def some_cuts(content: bytes) -> list[int]:
    """Every byte of short files; of longer ones those at both ends, and some between."""
    size = len(content)
    return sorted({*range(min(size, 10)), *range(10, size, 211), *range(max(0, size - 10), size)})


def alone(disk: Disk, writing: Writing, way: Way, turn: int) -> Iterator[str]:
    """One rank after the other, as far as they wait for each other."""
    others = [name for rank in writing.others for name in rank]
    for name in writing.first:
        if name == writing.barrier:
            for other in others:
                yield from pieces(disk, other, writing.bytes_of(other, turn), way, some_cuts(b"x" * 30))
        content = writing.bytes_of(name, turn)
        yield from pieces(disk, name, content, way, some_cuts(content))
    if writing.barrier is None:
        for other in others:
            yield from pieces(disk, other, writing.bytes_of(other, turn), way, [0, 10])


@pytest.mark.parametrize(
    ("name", "way"),
    [
        (name, way)
        for name in WRITERS
        for way in WAYS
        if way == "in place" or any(map(is_tensors, WRITINGS[name].first))
    ],
)
def test_no_prefix_of_files_and_bytes_is_finished_early_and_the_end_always_is(
    name: str, way: Way, tmp_path: Path
) -> None:
    writing = WRITINGS[name]
    disk = Disk(tmp_path / "run" / writing.place)
    for turn in (0, 1):  # the second time there is an old last file before anything is written
        for _ in alone(disk, writing, way, turn):
            judge(disk, writing, turn)
        assert judge(disk, writing, turn) == writing.ends, look_at(disk.folder)


@pytest.mark.parametrize("name", [name for name in WRITERS if WRITINGS[name].first != ("",)])
def test_what_is_taken_away_in_the_middle_is_no_error(name: str, tmp_path: Path) -> None:
    writing = WRITINGS[name]
    disk = Disk(tmp_path / "run" / writing.place)
    for _ in alone(disk, writing, "in place", 0):
        pass
    for _ in disk.remove():
        look = look_at(disk.folder)
        assert look.reason
    assert look_at(disk.folder).state == "incomplete"


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), way=st.sampled_from(WAYS))
@pytest.mark.parametrize("name", [name for name in WRITERS if WRITINGS[name].others])
def test_however_the_ranks_interleave_it_is_never_finished_early(name: str, seed: int, way: Way) -> None:
    writing, chance = WRITINGS[name], Random(seed)
    with tempfile.TemporaryDirectory() as parent:
        disk = Disk(Path(parent) / "run" / writing.place)
        for turn in (0, 1):
            for _ in interleaved(disk, writing, way, turn, chance):
                judge(disk, writing, turn)
            assert judge(disk, writing, turn) == writing.ends


def interleaved(disk: Disk, writing: Writing, way: Way, turn: int, chance: Random) -> Iterator[str]:
    """All ranks at once, each in its own order; the first waits for the others at its barrier."""

    def all_of(names: tuple[str, ...]) -> Iterator[str]:
        for name in names:
            content = writing.bytes_of(name, turn)
            cuts = sorted(chance.sample(range(len(content)), chance.randint(0, 2)))
            yield name
            yield from pieces(disk, name, content, way, cuts)

    first, others = all_of(writing.first), [all_of(names) for names in writing.others]
    waits = False
    while others or first is not None:
        rank = chance.choice(others if waits and others else [*others, *([first] if first else [])])
        done = next(rank, None)
        if done is not None:
            waits = waits or (rank is first and done == writing.barrier)
            yield done
        elif rank is first:
            first = None
        else:
            others.remove(rank)
