"""Whether a second engine fits beside a running one: it needs about what that one holds."""

from __future__ import annotations

import contextlib
import csv
import subprocess
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

_SPARE = 1.05


def no_room_beside(processes: Collection[int]) -> str | None:
    """Why no second engine fits beside the one that these are; None when it does, as far as can be seen."""
    needed, free = sum(_memory_of(pid) for pid in processes), free_memory()
    if needed * _SPARE > free:
        return (
            f"the running engine holds {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free: "
            "stop it first (Ctrl+C, or SIGTERM), then start this one without --takeover"
        )
    return no_room_on_gpu(processes, _nvidia("compute-apps=pid,gpu_uuid,used_memory"), _nvidia("gpu=uuid,memory.free"))


def no_room_on_gpu(processes: Collection[int], used: Iterable[str], free: Iterable[str]) -> str | None:
    """The same on GPUs, from lines of nvidia-smi, in MiB: `pid, gpu, used` and `gpu, free`."""
    held: dict[str, int] = {}
    for pid, gpu, size in _rows(used, 3):
        if pid.isdigit() and size.isdigit() and int(pid) in processes:
            held[gpu] = held.get(gpu, 0) + int(size)
    for gpu, size in _rows(free, 2):
        if size.isdigit() and held.get(gpu, 0) > int(size):
            return (
                f"the running engine holds {held[gpu] / 1024:.1f} GiB of {gpu}, and {int(size) / 1024:.1f} GiB are "
                "free: two fit when both are started with less than half (-- --gpu-memory-utilization 0.45); else stop "
                "the running one first, then start this one without --takeover"
            )
    return None


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that a new process can have: of the machine, and of the control group (v2) that this one is in."""
    fields = dict(text.split(":", 1) for text in (proc / "meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        own = (proc / "self/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
        group = groups / own.lstrip("/")
        while group.is_relative_to(groups):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                limit = int((group / "memory.max").read_text())
                free = min(free, limit - int((group / "memory.current").read_text()) + _reclaimable(group))
            group = group.parent
    return max(0, free)


def _reclaimable(group: Path) -> int:
    """Files that are cached count to a group, and make way."""
    told: Mapping[str, str] = dict(text.split() for text in (group / "memory.stat").read_text().splitlines())
    return int(told.get("inactive_file", 0))


def _memory_of(pid: int) -> int:
    """Bytes of its own and of its share in what it has in common with others; 0 where it is gone, or not ours."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for text in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if text.startswith("Pss:"):
                return int(text.split()[1]) * 1024
    return 0


def _nvidia(query: str) -> list[str]:
    """Lines of CSV; none without a GPU."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _rows(lines: Iterable[str], width: int) -> list[list[str]]:
    found = [[word.strip() for word in row] for row in csv.reader(lines)]
    return [row for row in found if len(row) == width and all(row)]
