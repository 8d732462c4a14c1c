"""Merged weights, a block of rows at a time: round(W + Σ factor · (B A)), with one rounding.

The order of operations is PEFT's (peft/tuners/lora/layer.py, `Linear.merge` and `get_delta_weight`): B A in float32,
times the factor, added to the weight, rounded to the weight's dtype. So the bits are PEFT's too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch

from lorakit.adapters.delta import Term
from lorakit.errors import Refused, UsageError
from lorakit.files.folders import write_all
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor, read_into, tensor_bytes, torch_dtype
from lorakit.merge.plan import ComputeTensor

CPU_BLOCK = 1 << 19  # elements: two float32 blocks and a 16-bit one stay near a core's own cache
GPU_BLOCK = 1 << 23
FEWEST_ROWS = 64

# Seen on MKL (AVX-512): the bits of a float32 product depend on how it is cut and on the number of threads when one of
# its sides is 11 or less, and never above; those of a float64 product always do. Such a product is made whole, with
# the threads that PEFT would have; but a large one in float64 is cut, and may differ from PEFT's in its last bit.
THIN = 32
LARGE = 1 << 22  # elements


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


def row_blocks(rows: int, columns: int, elements: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` evenly into blocks of about `elements`, so that none is tiny."""
    count = max(1, -(-rows // max(FEWEST_ROWS, elements // max(1, columns))))
    edges = [rows * index // count for index in range(count + 1)]
    return pairwise(edges)


@dataclass(frozen=True, slots=True)
class _Factors:
    """One term on the device, in the dtype it is computed in."""

    B: torch.Tensor
    A: torch.Tensor
    factor: float

    @property
    def is_whole(self) -> bool:
        """Whether the product has to be made in one piece to have PEFT's bits."""
        out, into = self.B.shape[0], self.A.shape[1]
        return min(out, into) < THIN or (self.B.dtype == torch.float64 and out * into <= LARGE)


def _refuse_overflow(total: torch.Tensor, rounded: torch.Tensor, name: str) -> None:
    if rounded.isinf().any() and (rounded.isinf() & total.isfinite()).any():
        raise Refused(f"'{name}' has values beyond the range of float16 (65504): use --dtype bf16 or fp32")


class _Memory(threading.local):
    """Buffers that a thread uses again for each block."""

    def __init__(self) -> None:
        self.held: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: str, pinned: bool) -> torch.Tensor:
        count = shape[0] * shape[1]
        held = self.held.get(name)
        if held is None or held.dtype != dtype or len(held) < count:
            held = self.held[name] = torch.empty(count, dtype=dtype, device=device, pin_memory=pinned)
        return held[:count].view(shape)


class Adder:
    """Writes computed tensors; one object for all threads.

    `threads` is how many a product in one piece gets; `advance` is told of bytes written.
    """

    def __init__(self, device: str, threads: int, advance: Callable[[int], None]) -> None:
        self.device = device
        self.on_cpu = device == "cpu"
        self.threads = threads
        self.advance = advance
        self._memory = _Memory()

    def write(self, tensor: ComputeTensor, source: int, target: int) -> None:
        """Read, compute and write one tensor between two open files.

        Raises:
            InvalidFile: the source became shorter.
            Refused: a value is too large for float16.
        """
        torch.set_num_threads(1)  # for this thread: the threads share the cores among them
        wide = torch.float64 if tensor.source.dtype == "F64" else torch.float32
        with torch.inference_mode(), self._own_stream():
            factors = [self._factors(term, wide) for term in tensor.terms]
            rows, columns = tensor.source.shape if factors else (math.prod(tensor.source.shape), 1)
            whole = any(factor.is_whole for factor in factors)
            blocks = [(0, rows)] if whole else row_blocks(rows, columns, CPU_BLOCK if self.on_cpu else GPU_BLOCK)
            for first, last in blocks:
                stored = self._read(tensor.source, source, first, last, columns)
                merged = self._merged(tensor, stored, factors, first, wide)
                offset = first * columns * merged.element_size()
                write_all(target, tensor_bytes(merged), tensor.target.start + offset)
                self.advance(merged.nbytes)

    def _own_stream(self) -> AbstractContextManager[object]:
        """On a GPU each thread has a stream, so that copies and products of several overlap."""
        return nullcontext() if self.on_cpu else torch.cuda.stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]

    def _factors(self, term: Term, wide: torch.dtype) -> _Factors:
        b, a = (load_tensor(stored).to(device=self.device, dtype=wide) for stored in (term.B, term.A))
        return _Factors(b, a, term.factor)

    def _read(self, stored: StoredTensor, source: int, first: int, last: int, columns: int) -> torch.Tensor:
        dtype = torch_dtype(stored.dtype)
        block = self._memory.take(f"read {dtype}", (last - first, columns), dtype, "cpu", not self.on_cpu)
        read_into(source, tensor_bytes(block), stored.start + first * columns * dtype.itemsize, stored)
        return block

    def _merged(
        self, tensor: ComputeTensor, stored: torch.Tensor, factors: list[_Factors], first: int, wide: torch.dtype
    ) -> torch.Tensor:
        """The rows from `first` on, rounded once, in the CPU's memory."""
        shape = (stored.shape[0], stored.shape[1])
        total = self._memory.take("total", shape, wide, self.device, False).copy_(stored, non_blocking=True)
        for factor in factors:
            total.add_(self._delta(factor, first, shape, tensor.transposed))
        rounded_dtype = torch_dtype(tensor.target.dtype)
        rounded = self._memory.take("rounded", shape, rounded_dtype, self.device, False).copy_(total)
        if rounded_dtype == torch.float16:
            _refuse_overflow(total, rounded, tensor.target.name)
        if self.on_cpu:
            return rounded
        fetched = self._memory.take("fetched", shape, rounded_dtype, "cpu", True).copy_(rounded, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return fetched

    def _delta(self, factors: _Factors, first: int, shape: tuple[int, int], transposed: bool) -> torch.Tensor:
        last = first + shape[0]
        if transposed:
            delta = self._product(factors, factors.B, factors.A[:, first:last])
        else:
            delta = self._product(factors, factors.B[first:last], factors.A)
        delta.mul_(factors.factor)
        return delta.T if transposed else delta

    def _product(self, factors: _Factors, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out = self._memory.take("delta", (left.shape[0], right.shape[1]), left.dtype, self.device, False)
        if not (factors.is_whole and self.on_cpu):
            return torch.mm(left, right, out=out)
        torch.set_num_threads(self.threads)
        try:
            return torch.mm(left, right, out=out)
        finally:
            torch.set_num_threads(1)
