"""Computed weights, a block of rows at a time: read, put through their steps in float32, rounded once, written.

The order of operations is PEFT's (peft/tuners/lora/layer.py, `Linear.merge` and `get_delta_weight`): B A in float32,
times the factor, added to the weight, rounded to the weight's dtype. So the bits are PEFT's too.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from lorakit.errors import Refused, UsageError
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor, read_into, tensor_bytes, torch_dtype
from lorakit.merge.apply import Memory, Stepper
from lorakit.merge.plan import ComputeTensor, WholeTensor
from lorakit.merge.rounding import Rounding, Survival

if TYPE_CHECKING:
    from lorakit.merge.residual import Residual, Residuals

CPU_BLOCK = 1 << 19  # elements: two float32 blocks and a 16-bit one stay near a core's own cache
GPU_BLOCK = 1 << 23
FEWEST_ROWS = 64
SAMPLED_BLOCKS = 2  # the survival of a large weight is measured on so many of its blocks: on all it takes as long again


@contextmanager
def exact_arithmetic(device: str) -> Iterator[int]:
    """No TF32, which would drop 13 bits of a delta. Gives torch's number of threads, which is as before at the end."""
    threads = torch.get_num_threads()
    try:
        with nullcontext() if device == "cpu" else _no_tf32():
            yield threads
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_tf32() -> Iterator[None]:
    settings = torch.backends.cuda.matmul
    # torch 2.9 has a new name for it, and refuses the old one once the new one is used
    name, exact = ("fp32_precision", "ieee") if hasattr(settings, "fp32_precision") else ("allow_tf32", False)
    before = getattr(settings, name)
    setattr(settings, name, exact)
    try:
        yield
    finally:
        setattr(settings, name, before)


def usable_device(device: str) -> str:
    """`auto` is a GPU where there is one.

    Raises:
        UsageError: this machine has no such device.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(f"torch finds no device '{device}' on this machine: try --device cpu")
    return device


def arithmetic(device: str) -> str:
    """Whose float32 products these are: where two merges agree in this, they agree in every bit."""
    if device != "cpu":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {_processor()} {capability}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def row_blocks(rows: int, columns: int, elements: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` evenly into blocks of about `elements`, so that none is tiny."""
    count = max(1, -(-rows // max(FEWEST_ROWS, elements // max(1, columns))))
    edges = [rows * index // count for index in range(count + 1)]
    return pairwise(edges)


class Output(Protocol):
    """Where computed bytes go: into a file, or into a comparison with what is there."""

    def put(self, tensor: ComputeTensor, offset: int, view: memoryview) -> None:
        """`offset` is in bytes, from the tensor's own beginning."""


class Adder:
    """Computes tensors; one object for all threads.

    `threads` is how many a product in one piece gets; `advance` is told of bytes written.
    """

    def __init__(
        self,
        device: str,
        threads: int,
        advance: Callable[[int], None],
        *,
        rounding: Rounding | None = None,
        residuals: Residuals | None = None,
    ) -> None:
        self.device = device
        self.on_cpu = device == "cpu"
        self.threads = threads
        self.advance = advance
        self.rounding = rounding or Rounding()
        self.residuals = residuals
        self._memory = Memory()

    def write(self, tensor: ComputeTensor, source: int, output: Output) -> Survival:
        """Read one tensor from an open file, compute it and put it out, and say what rounding left of its change.

        Raises:
            InvalidFile: the source became shorter.
            Refused: a value is too large for float16.
        """
        torch.set_num_threads(1)  # for this thread: the threads share the cores among them
        survival = Survival()
        with torch.inference_mode(), self._own_stream():
            rows, columns = tensor.matrix
            stepper = Stepper(tensor, self._memory, self.device, self.threads)
            whole = [(0, rows)] if stepper.needs_whole else None
            blocks = list(whole or row_blocks(rows, columns, CPU_BLOCK if self.on_cpu else GPU_BLOCK))
            if stepper.needs_norms:
                for first, last in blocks:
                    stepper.add_norms(self._read(tensor.source, source, first, last, columns), first)
            sample = max(1, len(blocks) // SAMPLED_BLOCKS) if stepper.is_even else 1
            residual = None if self.residuals is None else self.residuals.of(tensor, self.device)
            for index, (first, last) in enumerate(blocks):
                stored = self._read(tensor.source, source, first, last, columns)
                looked_at = survival if index % sample == 0 else None
                merged = self._merged(tensor, stored, stepper, first, looked_at, residual)
                output.put(tensor, first * columns * merged.element_size(), tensor_bytes(merged))
                self.advance(merged.nbytes)
            if residual is not None:
                residual.finish()
        return survival

    def write_whole(self, tensor: WholeTensor, output: Output) -> Survival:
        """Read a weight that is quantised, or will be, compute it in one piece, and put out what holds it.

        Raises:
            InvalidFile: the parts of a quantised weight don't fit together.
            Refused: a value is too large for float16, or not finite.
        """
        torch.set_num_threads(1)
        computed, survival = tensor.computed, Survival()
        with torch.inference_mode(), self._own_stream():
            stepper = Stepper(computed, self._memory, self.device, self.threads)
            stored = load_tensor(computed.source) if tensor.quantised is None else tensor.quantised.read()
            base = stored.to(stepper.wide).reshape(computed.matrix)
            if stepper.needs_norms:
                stepper.add_norms(base, 0)
            total = stepper.applied(base.to(self.device, copy=True), 0)
            written = self._packed(tensor, total.reshape(computed.source.shape))
            if computed.steps and tensor.quantiser is None:
                now = _as_read_again(tensor, written)
                survival.add(base.to(self.device), total, now.reshape(total.shape).to(self.device), self._memory)
        for target in tensor.targets:
            output.put(replace(computed, target=target), 0, tensor_bytes(written[target.name].contiguous()))
            self.advance(target.nbytes)
        return survival

    def _packed(self, tensor: WholeTensor, total: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors to write, by their names."""
        target = tensor.computed.target
        if tensor.quantiser is not None:
            return tensor.quantiser.quantise(tensor.name, target.dtype, total.cpu())
        if tensor.keeps_format:
            assert tensor.quantised is not None
            packed = tensor.quantised.packed(total.cpu())
            return {tensor.quantised.parts[role].name: part for role, part in packed.items()}
        rows = total.reshape(tensor.computed.matrix)
        rounded = self.rounding.rounded(rows, tensor.computed, 0, self._memory, self.device)
        if rounded.dtype == torch.float16:
            _refuse_overflow(rows, rounded, target.name)
        return {target.name: rounded.cpu()}

    def _own_stream(self) -> AbstractContextManager[object]:
        """On a GPU each thread has a stream, so that copies and products of several overlap."""
        return nullcontext() if self.on_cpu else torch.cuda.stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def _read(self, stored: StoredTensor, source: int, first: int, last: int, columns: int) -> torch.Tensor:
        dtype = torch_dtype(stored.dtype)
        block = self._memory.take(f"read {dtype}", (last - first, columns), dtype, "cpu", not self.on_cpu)
        read_into(source, tensor_bytes(block), stored.start + first * columns * dtype.itemsize, stored)
        return block

    def _merged(
        self,
        tensor: ComputeTensor,
        stored: torch.Tensor,
        stepper: Stepper,
        first: int,
        survival: Survival | None,
        residual: Residual | None,
    ) -> torch.Tensor:
        """The rows from `first` on, rounded once, in the CPU's memory."""
        shape = (stored.shape[0], stored.shape[1])
        total = self._memory.take("total", shape, stepper.wide, self.device, False)
        total.copy_(stored, non_blocking=True)
        total = stepper.applied(total, first)
        rounded = self.rounding.rounded(total, tensor, first, self._memory, self.device)
        if rounded.dtype == torch.float16:
            _refuse_overflow(total, rounded, tensor.target.name)
        if residual is not None:
            residual.add(total, rounded, first)
        if survival is not None and tensor.steps and rounded.dtype != total.dtype:
            survival.add(stored.to(self.device), total, rounded, self._memory)
        if self.on_cpu:
            return rounded
        fetched = self._memory.take("fetched", shape, rounded.dtype, "cpu", True).copy_(rounded, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return fetched


def _as_read_again(tensor: WholeTensor, written: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight that the written tensors hold."""
    if not tensor.keeps_format:
        return written[tensor.computed.target.name]
    assert tensor.quantised is not None
    parts = {role: written[part.name] for role, part in tensor.quantised.parts.items() if part.name in written}
    return tensor.quantised.unpacked(parts)


def _refuse_overflow(total: torch.Tensor, rounded: torch.Tensor, name: str) -> None:
    if rounded.isinf().any() and (rounded.isinf() & total.isfinite()).any():
        raise Refused(f"'{name}' has values beyond the range of float16 (65504): use --dtype bf16 or fp32")
