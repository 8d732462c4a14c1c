"""What every reader gives: the weights of a checkpoint by their names there, and a range of any of them on demand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lorakit.errors import Conflict
from lorakit.files.folders import FileState, file_state
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import FLOATS, load_range, torch_dtype
from lorakit.files.torch_tensors import StoredTorchTensor, as_stored, load_torch_range

if TYPE_CHECKING:
    import torch

COMPARED = 1 << 22  # elements at once


class SourceTensor(Protocol):
    """A tensor of a checkpoint, read a range at a time."""

    @property
    def dtype(self) -> str:
        """As safetensors names it: "BF16", "F32", …"""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Elements [begin, end) in the order of their indices, flat, as they are stored; reads no more than it must.

        Raises:
            NotFound, InvalidFile: its file is gone, became shorter.
        """


@dataclass(frozen=True, slots=True)
class ByteRun:
    """`nbytes` of a file from `start`."""

    file: Path
    start: int
    nbytes: int


@runtime_checkable
class CopiedTensor(SourceTensor, Protocol):
    """One whose bytes stand in files as safetensors wants them, so that the kernel can copy them."""

    def byte_runs(self) -> tuple[ByteRun, ...] | None:
        """All its bytes in the order of its elements; None where they don't stand so."""


@dataclass(frozen=True, slots=True)
class Source:
    """The weights of a checkpoint under the names that it has for them; headers and metadata are all that was read.

    `left_out` names by the reason what is no weight of the model, `beside` is the folder whose config, tokenizer, …
    belong to it, and `states` are those of every file that will be read.
    """

    path: Path
    format: str
    tensors: Mapping[str, SourceTensor]
    left_out: Mapping[str, tuple[str, ...]]
    beside: Path | None
    states: Mapping[Path, FileState]
    notes: tuple[str, ...] = ()

    def ensure_unchanged(self) -> None:
        """Raises Conflict when a file was written again since it was opened."""
        for file, state in self.states.items():
            if not file.exists() or file_state(file) != state:
                raise Conflict(f"'{file}' was written again while it was read: start anew when its writer is done")


@dataclass(frozen=True, slots=True)
class PlainTensor:
    """A byte range of a file."""

    stored: StoredTensor

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self, begin: int, end: int) -> torch.Tensor:
        return load_range(self.stored, begin, end)

    def byte_runs(self) -> tuple[ByteRun, ...] | None:
        return (ByteRun(self.stored.file, self.stored.start, self.stored.nbytes),)


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """A view of a torch file's storage, contiguous or not."""

    name: str
    stored: StoredTorchTensor

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self, begin: int, end: int) -> torch.Tensor:
        return load_torch_range(self.name, self.stored, begin, end)

    def byte_runs(self) -> tuple[ByteRun, ...] | None:
        plain = as_stored(self.name, self.stored)
        return None if plain is None else (ByteRun(plain.file, plain.start, plain.nbytes),)


def numel(tensor: SourceTensor) -> int:
    return math.prod(tensor.shape)


def same_bits(one: SourceTensor, other: SourceTensor, dtype: str | None = None) -> bool:
    """Whether two tensors are equal bit for bit, as floats of `dtype` if that is given; compared in blocks, or not at
    all where they are the same bytes.
    """
    if one is other:
        return True
    rounds = dtype is not None and {one.dtype, other.dtype} <= FLOATS - {"F64"}
    if one.shape != other.shape or (one.dtype != other.dtype and not rounds):
        return False
    if isinstance(one, CopiedTensor) and isinstance(other, CopiedTensor):
        runs = one.byte_runs()
        if runs is not None and one.dtype == other.dtype and runs == other.byte_runs():
            return True
    import torch

    for begin in range(0, numel(one), COMPARED):
        mine, theirs = (tensor.read(begin, min(begin + COMPARED, numel(one))) for tensor in (one, other))
        if dtype is not None and rounds:
            mine, theirs = mine.to(torch_dtype(dtype)), theirs.to(torch_dtype(dtype))
        if not torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8)):
            return False
    return True
