"""Carry out a plan: files are laid out in full, and filled at their offsets by a few threads.

What stands in the source as it will stand in the result is copied by the kernel; of the rest, a block a thread is in
memory at any moment.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.convert.planning import ConvertPlan, PlannedTensor, Shard
from lorakit.convert.source import ByteRun, CopiedTensor, numel
from lorakit.errors import NotFound, Refused
from lorakit.files.folders import copy_range, write_all
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import tensor_bytes, torch_dtype
from lorakit.merge.execute import COPY_BLOCK, Meter, Progress, worker_count

if TYPE_CHECKING:
    import torch

    from lorakit.merge.quantised import Quantiser

SYNC_EVERY = 0.1  # seconds
BLOCK = 1 << 21  # elements that a thread reads and rounds at once


class Files:
    """Open files to read from, each once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._lock = threading.Lock()

    def of(self, file: Path) -> int:
        """Raises NotFound when it is gone."""
        with self._lock:
            if file not in self._open:
                try:
                    self._open[file] = os.open(file, os.O_RDONLY)
                except FileNotFoundError:
                    raise NotFound(f"'{file}' is gone, and was still to be read from") from None
            return self._open[file]

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)


def write_shards(
    plan: ConvertPlan, folder: Path, *, workers: int | None = None, progress: Progress | None = None
) -> None:
    """Write every file of the plan into `folder`.

    Raises:
        NotFound, InvalidFile: a source is gone, or became shorter.
        Refused: a value is too large for float16.
    """
    files = [(shard, shard.name) for shard in plan.shards]
    write_files(files, plan.quantiser, folder, Meter(plan.nbytes, progress), workers=workers)


def write_files(
    planned: Sequence[tuple[Shard, str]],
    quantiser: Quantiser | None,
    folder: Path,
    meter: Meter,
    *,
    workers: int | None = None,
) -> None:
    """Write files, each under the name beside it, and sync them. Raises what `write_shards` does."""
    with ExitStack() as stack:
        files = Files()
        stack.callback(files.close)
        written = stack.enter_context(ExitStack())  # closed when no thread writes any more
        if any(tensor.is_rounded for shard, _ in planned for tensor in shard.tensors):
            from lorakit.merge.blocks import exact_arithmetic

            stack.enter_context(exact_arithmetic("cpu"))
        pool = stack.enter_context(ThreadPoolExecutor(workers or worker_count(), thread_name_prefix="convert"))
        syncer = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="sync"))
        unfinished: list[Future[Any]] = []
        stack.callback(_stop, meter, unfinished)
        for shard, name in planned:
            writer = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            written.callback(os.close, writer)
            os.truncate(writer, shard.target.size)
            write_all(writer, shard.head, 0)
            meter.add(len(shard.head))
            output = _Output(shard, writer, files, meter)
            tasks = [pool.submit(job) for tensor in shard.tensors for job in output.jobs(tensor, quantiser)]
            unfinished += [*tasks, syncer.submit(_sync, tasks, writer)]
        _wait_for(unfinished)


def _sync(tasks: Sequence[Future[Any]], writer: int) -> None:
    """What is written goes to the disk while the rest is, so that little is left to wait for at the end."""
    unfinished = set(tasks)
    while unfinished:
        done, unfinished = wait(unfinished, timeout=SYNC_EVERY, return_when=FIRST_EXCEPTION)
        for task in done:
            task.result()
        os.fdatasync(writer)
    os.fsync(writer)


def _wait_for(tasks: Sequence[Future[Any]]) -> None:
    done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
    for task in done:
        task.result()


@dataclass(frozen=True, slots=True)
class _Output:
    """One file of the result while it is filled."""

    shard: Shard
    writer: int
    files: Files
    meter: Meter

    def jobs(self, tensor: PlannedTensor, quantiser: Quantiser | None) -> Iterator[Callable[[], None]]:
        """What has to be done for a tensor, in pieces that any thread may do at any time."""
        source = tensor.source
        if quantiser is not None and tensor.is_quantised:
            rows, columns = source.shape
            for first in range(0, rows, step := max(1, BLOCK // columns)):
                yield partial(self._quantise, tensor, quantiser, first, min(first + step, rows))
            return
        start = self.shard.target.tensors[tensor.name].start
        runs = source.byte_runs() if isinstance(source, CopiedTensor) and source.dtype == tensor.dtype else None
        if runs is not None:
            for run in runs:
                for first in range(0, run.nbytes, COPY_BLOCK):
                    count = min(COPY_BLOCK, run.nbytes - first)
                    yield partial(self._copy, ByteRun(run.file, run.start + first, count), start + first)
                start += run.nbytes
            return
        itemsize, count = torch_dtype(tensor.dtype).itemsize, numel(source)
        for begin in range(0, count, BLOCK):
            yield partial(self._round, tensor, begin, min(begin + BLOCK, count), start + begin * itemsize)

    def _copy(self, run: ByteRun, offset: int) -> None:
        self.meter.add(0)
        copy_range(self.files.of(run.file), self.writer, run.start, offset, run.nbytes)
        self.meter.add(run.nbytes)

    def _round(self, tensor: PlannedTensor, begin: int, end: int, offset: int) -> None:
        self.meter.add(0)
        if tensor.is_rounded:
            _one_thread()
        rounded = _rounded(tensor, tensor.source.read(begin, end))
        write_all(self.writer, tensor_bytes(rounded), offset)
        self.meter.add(rounded.nbytes)

    def _quantise(self, tensor: PlannedTensor, quantiser: Quantiser, first: int, last: int) -> None:
        """Rows [first, last): a scale is of one row, or of a part of it."""
        self.meter.add(0)
        _one_thread()
        rows, columns = tensor.source.shape
        weight = tensor.source.read(first * columns, last * columns).reshape(last - first, columns)
        for name, part in quantiser.quantise(tensor.name, tensor.dtype, weight).items():
            target = self.shard.target.tensors[name]
            if name.endswith("_shape"):  # of the whole, and not of these rows
                if first == 0:
                    self._fill(target, 0, part.new_tensor([rows, columns]))
            else:
                self._fill(target, target.nbytes // rows * first, part)

    def _fill(self, target: StoredTensor, offset: int, part: torch.Tensor) -> None:
        write_all(self.writer, tensor_bytes(part), target.start + offset)
        self.meter.add(part.nbytes)


def _one_thread() -> None:
    """For this thread: the threads share the cores among them."""
    import torch

    torch.set_num_threads(1)


def _rounded(tensor: PlannedTensor, block: torch.Tensor) -> torch.Tensor:
    """To the dtype of the result, once: from float64 not by way of float32, where that would round twice."""
    import torch

    wanted = torch_dtype(tensor.dtype)
    if block.dtype == torch.float64 and wanted.itemsize == 2:
        block = _rounded_to_odd(block)
    rounded = block.to(wanted)
    if wanted == torch.float16 and rounded.isinf().any() and (rounded.isinf() & block.isfinite()).any():
        raise Refused(f"'{tensor.name}' has values beyond the range of float16 (65504): use --dtype bf16 or fp32")
    return rounded.contiguous()


def _rounded_to_odd(block: torch.Tensor) -> torch.Tensor:
    """float32 from which rounding on gives what rounding at once would: of two neighbours the one whose last bit is
    set (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    import torch

    nearest = block.float()
    codes = nearest.view(torch.int32)
    gone_out = nearest.double().abs() > block.abs()  # the code below has the smaller magnitude
    inexact = (nearest.double() != block) & block.isfinite()
    truncated = torch.where(inexact & gone_out, codes - 1, codes)
    return torch.where(inexact, truncated | 1, codes).view(torch.float32)


def _stop(meter: Meter, tasks: Iterable[Future[Any]]) -> None:
    meter.stopped = True
    for task in tasks:
        task.cancel()
