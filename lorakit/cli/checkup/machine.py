"""What the system allows: cores, memory, files, and how many folders can be watched."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lorakit.cli.checkup.finding import Finding
from lorakit.files.folders import free_bytes

WATCHES = 8192  # folders of runs and checkpoints, each of which takes one
INSTANCES = 8  # that are left for others
FILES = 4096  # a connection takes one, and so does each shard of a model
SHARED = 1 << 30  # bytes that the processes of an engine on a GPU hand one another


def machine(*, gpu: bool) -> Iterator[Finding]:
    from lorakit.server.supervision.room import free_memory

    yield of_memory(free_memory(), total_memory())
    yield of_shared_memory(free_bytes(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None, gpu=gpu)
    yield of_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield of_inotify(*inotify_limits(), inotify_used())


def of_memory(free: int, total: int) -> Finding:
    return Finding("memory", "ok", f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


def of_shared_memory(free: int | None, *, gpu: bool) -> Finding:
    """Bytes; None where there is no /dev/shm."""
    what = "there is none" if free is None else f"{free / 2**30:.1f} GiB free in /dev/shm"
    if free is not None and (free >= SHARED or not gpu):
        return Finding("shared memory", "ok", what)
    why = "the processes of an engine hand one another tensors there"
    return Finding("shared memory", "warning", what, why, "in a container: docker run --shm-size 8g, or --ipc host")


def of_open_files(soft: int, hard: int) -> Finding:
    unlimited = resource.RLIM_INFINITY
    what = f"{_limit(soft)} at once, {_limit(hard)} where a program asks for them"
    if soft == unlimited or (soft >= 1024 and (hard == unlimited or hard >= FILES)):
        return Finding("open files", "ok", what)
    why = "each connection takes one: a busy server runs out of them"
    return Finding("open files", "warning", what, why, "ulimit -n 65536, LimitNOFILE=65536 in a unit of systemd")


def of_inotify(watches: int | None, instances: int | None, used: int) -> Finding:
    """`used` are instances of this user, as far as can be seen."""
    if watches is None or instances is None:
        why = "checkpoints are found by looking twice a second, rather than at once"
        return Finding("inotify", "warning", "there is none", why, "nothing is wrong with that")
    what = f"{watches} folders and files, {instances} watchers, {used} in use"
    if watches < WATCHES:
        cure = "sysctl fs.inotify.max_user_watches=524288"
    elif instances - used < INSTANCES:
        cure = "sysctl fs.inotify.max_user_instances=1024"
    else:
        return Finding("inotify", "ok", what)
    why = "of many runs not all can be watched: what is new there is found by looking twice a second"
    return Finding("inotify", "warning", what, why, cure)


def _limit(count: int) -> str:
    return "any number" if count == resource.RLIM_INFINITY else str(count)


# looking it up


def usable_cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """That this process may use: of the machine, and of its control group (v2)."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = (groups / "cpu.max").read_text().split()
        cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


def total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def inotify_limits(proc: Path = Path("/proc/sys/fs/inotify")) -> tuple[int | None, int | None]:
    """Watches and instances of one user; None where there are none."""
    found: list[int | None] = []
    for name in ("max_user_watches", "max_user_instances"):
        try:
            found.append(int((proc / name).read_text()))
        except (OSError, ValueError):
            found.append(None)
    return found[0], found[1]


def inotify_used(proc: Path = Path("/proc")) -> int:
    """Instances of this user's processes."""
    count = 0
    for folder in proc.glob("[0-9]*/fd"):
        with suppress(OSError):
            if folder.stat().st_uid == os.geteuid():
                count += sum(_target(entry.path) == "anon_inode:inotify" for entry in os.scandir(folder))
    return count


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""
