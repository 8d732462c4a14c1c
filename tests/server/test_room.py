"""Whether a second engine fits: what the system says of memory, on paper."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.server.supervision.room import free_memory, no_room_beside, no_room_on_gpu

GIB = 2**30


def put_machine(folder: Path, available: int, group: str = "/a/b") -> tuple[Path, Path]:
    """/proc and /sys/fs/cgroup of a machine with so many bytes free."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available // 1024} kB\n")
    (folder / "proc" / "self" / "cgroup").write_text(f"0::{group}\n")
    groups = folder / "groups"
    (groups / group.lstrip("/")).mkdir(parents=True, exist_ok=True)
    return folder / "proc", groups


def limit(group: Path, limit: str, current: int, cached: int = 0) -> None:
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(f"anon {current - cached}\ninactive_file {cached}\n")


def test_what_is_free_is_the_least_of_the_machine_and_of_each_group_around(tmp_path: Path) -> None:
    proc, groups = put_machine(tmp_path, 10 * GIB)
    assert free_memory(proc, groups) == 10 * GIB
    limit(groups / "a/b", "max", 3 * GIB)
    assert free_memory(proc, groups) == 10 * GIB
    limit(groups / "a", str(8 * GIB), 6 * GIB, cached=GIB)
    assert free_memory(proc, groups) == 3 * GIB
    limit(groups / "a/b", str(4 * GIB), 4 * GIB)
    assert free_memory(proc, groups) == 0


def test_an_engine_that_holds_more_than_is_free_has_no_room_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert no_room_beside([os.getpid()]) is None
    monkeypatch.setattr("lorakit.server.supervision.room.free_memory", lambda: 1 << 20)
    assert "without --takeover" in str(no_room_beside([os.getpid()]))
    assert no_room_beside([2**22 + 1]) is None, "one that is gone holds nothing"


@pytest.mark.parametrize(
    ("free", "room"), [(["GPU-a, 30000", "GPU-b, 100"], True), (["GPU-a, 20000", "GPU-b, 80000"], False)]
)
def test_on_a_gpu_as_much_has_to_be_free_as_the_running_engine_holds(free: list[str], room: bool) -> None:
    used = ["7, GPU-a, 20000", "8, GPU-a, 4000", "9, GPU-b, 70000", "7, GPU-c, [N/A]", "[N/A], GPU-a, 9"]
    said = no_room_on_gpu([7, 8], used, free)
    assert (said is None) == room
    assert room or "--gpu-memory-utilization" in str(said)


def test_without_a_gpu_there_is_nothing_to_say_of_it() -> None:
    assert no_room_on_gpu([7], [], []) is None
