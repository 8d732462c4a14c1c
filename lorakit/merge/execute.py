"""Carry out a plan: shards are laid out in full, and filled at their offsets by a few threads.

What is held in memory at any moment is a block of rows and one module's factors a thread, whatever the model's size.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorakit.files.folders import copy_range, write_all
from lorakit.merge.plan import CopyTensor, MergePlan, PlannedShard

Progress = Callable[[int, int], None]

COPY_BLOCK = 1 << 25  # bytes
MOST_WORKERS = 8


class Stopped(Exception):
    """Another thread failed, or the person interrupted."""


class Meter:
    """Counts bytes from several threads, and is where they learn that they should stop."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.done = 0
        self.stopped = False
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        if self.stopped:
            raise Stopped
        with self._lock:
            self.done += count
            if self._progress is not None:
                self._progress(self.done, self.total)


@dataclass(slots=True)
class _OpenShard:
    plan: PlannedShard
    source: int
    target: int
    tasks: list[Future[None]] = field(default_factory=list)


def execute(plan: MergePlan, folder: Path, *, device: str = "auto", progress: Progress | None = None) -> str:
    """Write every shard of the plan into `folder`, and say on which device it was computed.

    Raises:
        UsageError: this machine has no such device.
        InvalidFile: a source became shorter meanwhile.
        Refused: a value is too large for float16.
    """
    meter = Meter(plan.nbytes, progress)
    with ExitStack() as stack:
        shards = [_open(stack, shard, folder, meter) for shard in plan.shards]
        pool = stack.enter_context(ThreadPoolExecutor(worker_count(), thread_name_prefix="merge"))
        syncer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sync"))
        unfinished: list[Future[None]] = []
        stack.callback(_stop, meter, unfinished)
        # Copying needs no torch, so it goes on while torch is imported here.
        for shard in shards:
            shard.tasks += [pool.submit(_copy, run, shard, meter) for run in runs(shard.plan.copied)]
            unfinished += shard.tasks
        if any(shard.plan.computed for shard in shards):
            with _no_collection():
                from lorakit.merge.blocks import Adder, exact_arithmetic, usable_device

            device = usable_device(device)
            threads = stack.enter_context(exact_arithmetic(device))
            adder = Adder(device, threads, meter.add)
            for shard in shards:
                adding = [
                    pool.submit(adder.write, tensor, shard.source, shard.target) for tensor in shard.plan.computed
                ]
                shard.tasks += adding
                unfinished += adding
        unfinished += [syncer.submit(_sync, shard) for shard in shards]
        _wait_for(unfinished)
    return device


@contextmanager
def _no_collection() -> Iterator[None]:
    """Importing torch makes so many objects, all of them to stay, that looking for garbage is a tenth of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def worker_count() -> int:
    """A thread a core that this process may use."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def runs(copied: Iterable[CopyTensor]) -> Iterator[tuple[int, int, int]]:
    """(source offset, target offset, bytes) of what is copied; neighbours go together, up to a block."""
    source = target = count = 0
    for tensor in copied:
        if (tensor.source.start, tensor.target.start) != (source + count, target + count):
            yield from _blocks(source, target, count)
            source, target, count = tensor.source.start, tensor.target.start, 0
        count += tensor.source.nbytes
    yield from _blocks(source, target, count)


def _blocks(source: int, target: int, count: int) -> Iterator[tuple[int, int, int]]:
    for first in range(0, count, COPY_BLOCK):
        yield source + first, target + first, min(COPY_BLOCK, count - first)


def _open(stack: ExitStack, shard: PlannedShard, folder: Path, meter: Meter) -> _OpenShard:
    source = os.open(shard.source.file, os.O_RDONLY)
    stack.callback(os.close, source)
    target = os.open(folder / shard.source.file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    stack.callback(os.close, target)
    os.truncate(target, shard.target.size)
    write_all(target, shard.head, 0)
    meter.add(len(shard.head))
    return _OpenShard(shard, source, target)


def _copy(run: tuple[int, int, int], shard: _OpenShard, meter: Meter) -> None:
    source_offset, target_offset, count = run
    meter.add(0)
    copy_range(shard.source, shard.target, source_offset, target_offset, count)
    meter.add(count)


def _sync(shard: _OpenShard) -> None:
    """One shard goes to the disk while the next is computed."""
    _wait_for(shard.tasks)
    os.fsync(shard.target)


def _wait_for(tasks: list[Future[None]]) -> None:
    done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
    for task in done:
        task.result()


def _stop(meter: Meter, unfinished: Iterable[Future[None]]) -> None:
    meter.stopped = True
    for task in unfinished:
        task.cancel()
