"""Carry out a plan: shards are laid out in full, and filled at their offsets by a few threads.

What is held in memory at any moment is a block of rows and one module's factors a thread, whatever the model's size.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.files.folders import copy_range, write_all
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.journal import PART, Journal, SurvivalSums
from lorakit.merge.plan import ComputeTensor, CopyTensor, MergePlan, PlannedShard, WholeTensor

if TYPE_CHECKING:
    from lorakit.merge.blocks import Adder
    from lorakit.merge.fetch import RemoteShards
    from lorakit.merge.residual import Residuals
    from lorakit.merge.rounding import Survival

Progress = Callable[[int, int], None]
Entered = Callable[[PlannedShard, Path, Mapping[str, SurvivalSums]], None]

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


class ShardFile:
    """One file of the result while it is written: under another name until it is whole and on the disk."""

    def __init__(self, plan: PlannedShard, folder: Path, part: str | None = None) -> None:
        self.plan = plan
        self.place = folder / plan.name
        self.part = folder / (part or f"{plan.name}{PART}")
        self.tasks: list[Future[Any]] = []
        self.file = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self.survivals: dict[str, Survival] = {}

    def begin(self) -> int:
        """Take the space, write the head: the number of its bytes."""
        os.truncate(self.file, self.plan.target.size)
        write_all(self.file, self.plan.head, 0)
        return len(self.plan.head)

    def put(self, tensor: ComputeTensor, offset: int, view: memoryview) -> None:
        write_all(self.file, view, tensor.target.start + offset)

    def finish(self, entered: Callable[[ShardFile], None]) -> None:
        """Once all is written: one shard goes to the disk while the next is computed."""
        _wait_for(self.tasks)
        os.fsync(self.file)
        entered(self)

    def close(self) -> None:
        os.close(self.file)


class Sources:
    """Open files to read from, each once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def of(self, stored: StoredTensor) -> int:
        with self._lock:
            if stored.file not in self._open:
                self._open[stored.file] = os.open(stored.file, os.O_RDONLY)
            return self._open[stored.file]

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)


@dataclass(frozen=True, slots=True)
class How:
    """With what the weights are computed; `workers` threads, or one a core."""

    device: str = "auto"
    workers: int | None = None
    rounding: str = "nearest"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """On which device it was computed, what rounding left of each change, and which shards were there already.

    `arithmetic` is said where others computed it: see `blocks.arithmetic`.
    """

    device: str
    survivals: Mapping[str, SurvivalSums]
    resumed: tuple[str, ...]
    arithmetic: str | None = None


class Crew(Protocol):
    """Others who write shards, for this process."""

    def write(
        self,
        plan: MergePlan,
        shards: Sequence[PlannedShard],
        how: How,
        entered: Entered,
    ) -> tuple[str, str | None]:
        """Have these written: the device, and whose arithmetic it was.

        `entered` is told of each once it is on the disk, as what file beside its place, and what survived in it.
        """


def execute(
    plan: MergePlan,
    folder: Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    residuals: Residuals | None = None,
    crew: Crew | None = None,
    progress: Progress | None = None,
) -> Done:
    """Write every shard of the plan into `folder`, but for those that an interrupted run has left there, whole.

    With a `crew` it writes them; there are no residuals then.

    Raises:
        UsageError: this machine has no such device.
        InvalidFile: a source became shorter meanwhile.
        Refused: a value is too large for float16.
    """
    meter = Meter(plan.nbytes, progress)
    journal = Journal(folder)
    whole = journal.whole(plan.shards)
    left = [shard for shard in plan.shards if shard.name not in whole]
    for shard in plan.shards:
        if shard.name in whole:
            meter.add(shard.target.size)
    how = How(device, workers, rounding, seed)

    def enter(shard: PlannedShard, part: Path, survivals: Mapping[str, Survival | SurvivalSums]) -> None:
        journal.enter(shard.name, survivals)
        part.rename(folder / shard.name)

    if crew is None:
        used = write_shards(
            left, folder, how, meter, lambda file: enter(file.plan, file.part, file.survivals),
            remote=plan.base.remote, residuals=residuals,
        )  # fmt: skip
        return Done(used, journal.survivals(), tuple(whole))

    def entered(shard: PlannedShard, part: Path, survivals: Mapping[str, SurvivalSums]) -> None:
        enter(shard, part, survivals)
        meter.add(shard.target.size)

    used, arithmetic = crew.write(plan, left, how, entered)
    return Done(used, journal.survivals(), tuple(whole), arithmetic)


def write_shards(
    shards: Sequence[PlannedShard],
    folder: Path,
    how: How,
    meter: Meter,
    entered: Callable[[ShardFile], None],
    *,
    part: str | None = None,
    remote: RemoteShards | None = None,
    residuals: Residuals | None = None,
) -> str:
    """Write shards with the threads of this process, and give the device that computed them.

    `entered` is told of each, from a thread, once it is on the disk under its temporary name, which is `part` where
    there is one shard alone.
    """
    device = how.device
    with ExitStack() as stack:
        sources = Sources()
        stack.callback(sources.close)
        files: list[ShardFile] = []
        for planned in shards:
            files.append(ShardFile(planned, folder, part))
            stack.callback(files[-1].close)
            meter.add(files[-1].begin())
        pool = stack.enter_context(ThreadPoolExecutor(how.workers or worker_count(), thread_name_prefix="merge"))
        syncer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sync"))
        unfinished: list[Future[Any]] = []
        stack.callback(_stop, meter, unfinished)

        def begin_copying(shard: ShardFile) -> None:
            shard.tasks += [
                pool.submit(_copy, run, sources.of(run.source), shard, meter) for run in runs(shard.plan.copied)
            ]
            unfinished.extend(shard.tasks)

        if remote is not None:
            remote.begin(file for shard in files for file in remote.files_of(shard.plan))
            stack.callback(remote.stop)
        else:  # copying needs no torch, so it goes on while torch is imported here
            for shard in files:
                begin_copying(shard)
        adder: Adder | None = None
        if any(shard.computed or shard.whole for shard in shards):
            with _no_collection():
                from lorakit.merge.blocks import Adder, exact_arithmetic, usable_device
                from lorakit.merge.rounding import Rounding

            device = usable_device(device)
            threads = stack.enter_context(exact_arithmetic(device))
            rounding = Rounding(how.rounding, how.seed)
            adder = Adder(device, threads, meter.add, rounding=rounding, residuals=residuals)
        for shard in files:
            if remote is not None:
                _wait_for_arrivals(remote.arrivals(shard.plan), unfinished)
                begin_copying(shard)
            if adder is not None:
                adding = [
                    pool.submit(_add, adder, tensor, sources.of(tensor.source), shard) for tensor in shard.plan.computed
                ]
                adding += [pool.submit(_add_whole, adder, tensor, shard) for tensor in shard.plan.whole]
                shard.tasks += adding
                unfinished += adding
            unfinished.append(syncer.submit(shard.finish, entered))
        _wait_for(unfinished)
    return device


def _add(adder: Adder, tensor: ComputeTensor, source: int, shard: ShardFile) -> None:
    shard.survivals[tensor.target.name] = adder.write(tensor, source, shard)


def _add_whole(adder: Adder, tensor: WholeTensor, shard: ShardFile) -> None:
    shard.survivals[tensor.name] = adder.write_whole(tensor, shard)


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


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes to copy between two files: neighbours go together, up to a block."""

    source: StoredTensor  # the first of them
    source_offset: int
    target_offset: int
    count: int


def runs(copied: Iterable[CopyTensor]) -> Iterator[Run]:
    """What is copied, in pieces."""
    first: StoredTensor | None = None
    source = target = count = 0
    for tensor in copied:
        follows = first is not None and first.file == tensor.source.file
        if not follows or (tensor.source.start, tensor.target.start) != (source + count, target + count):
            if first is not None:
                yield from _blocks(first, source, target, count)
            first, source, target, count = tensor.source, tensor.source.start, tensor.target.start, 0
        count += tensor.source.nbytes
    if first is not None:
        yield from _blocks(first, source, target, count)


def _blocks(stored: StoredTensor, source: int, target: int, count: int) -> Iterator[Run]:
    for first in range(0, count, COPY_BLOCK):
        yield Run(stored, source + first, target + first, min(COPY_BLOCK, count - first))


def _copy(run: Run, source: int, shard: ShardFile, meter: Meter) -> None:
    meter.add(0)
    copy_range(source, shard.file, run.source_offset, run.target_offset, run.count)
    meter.add(run.count)


def _wait_for(tasks: Sequence[Future[Any]]) -> None:
    done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
    for task in done:
        task.result()


def _wait_for_arrivals(arrivals: Sequence[Future[Any]], unfinished: Sequence[Future[Any]]) -> None:
    """As long as nothing of what is being merged meanwhile has failed."""
    waiting: set[Future[Any]] = set(arrivals)
    while waiting:
        _, waiting = wait(waiting, timeout=0.2)
        for task in (*arrivals, *unfinished):
            if task.done():
                task.result()


def _stop(meter: Meter, unfinished: Iterable[Future[Any]]) -> None:
    meter.stopped = True
    for task in unfinished:
        task.cancel()
