"""Tensors of torch files as byte ranges: read when they are asked for, whole or as a slice of their elements."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import InvalidFile
from lorakit.files.safetensors import DTYPE_BITS, StoredTensor
from lorakit.files.tensors import TORCH_NAMES, fill_from, load_range, load_tensor, torch_dtype

if TYPE_CHECKING:
    import torch

# safetensors' names by torch's; what else torch has (quantised, complex128) has none.
DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}
MAX_ELEMENTS = 1 << 60
SPAN = 1 << 22  # elements that are read at once of what isn't contiguous


@dataclass(frozen=True, slots=True)
class TorchStorage:
    """Bytes that one or more tensors view: `start` to `end` of `file`, little endian, elements of `dtype`."""

    file: Path
    key: str
    dtype: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StoredTorchTensor:
    """A view of a storage; `stride` and `offset` in elements, `dtype` as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: TorchStorage
    offset: int

    @property
    def file(self) -> Path:
        return self.storage.file

    @property
    def itemsize(self) -> int:
        return DTYPE_BITS[self.dtype] // 8

    @property
    def nbytes(self) -> int:
        """Of its elements, not of its storage."""
        return math.prod(self.shape) * self.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements stand one behind the other, in the order of their indices."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    @property
    def span(self) -> tuple[int, int]:
        """The bytes of the file from its first element to its last one."""
        start = self.storage.start + self.offset * self.itemsize
        return start, start + _reach(self.shape, self.stride) * self.itemsize


def checked_tensor(
    dtype: str, shape: tuple[int, ...], stride: tuple[int, ...], storage: TorchStorage, offset: int
) -> StoredTorchTensor:
    """Raises ValueError when the view reaches beyond its storage, or has more elements than torch can count."""
    numbers = (*shape, *stride, offset)
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise ValueError("shape, stride and offset are no whole numbers")
    if len(shape) != len(stride) or len(shape) > 64:
        raise ValueError(f"{len(shape)} dimensions, and {len(stride)} strides")
    if not is_countable(shape):
        raise ValueError(f"no tensor has the shape {list(shape)}")
    tensor = StoredTorchTensor(dtype, shape, stride, storage, offset)
    if tensor.span[1] > storage.end and 0 not in shape:
        raise ValueError(f"the tensor {list(shape)} reaches beyond its storage")
    return tensor


def is_countable(shape: tuple[int, ...]) -> bool:
    """Whether torch makes tensors of that shape at all, were there the memory; empty ones among them."""
    return math.prod(size for size in shape if size) < MAX_ELEMENTS


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one, both counted."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def as_stored(name: str, tensor: StoredTorchTensor) -> StoredTensor | None:
    """The same as safetensors' readers take it; None when its elements don't stand one behind the other."""
    if not tensor.is_contiguous:
        return None
    start = tensor.span[0] if tensor.nbytes else tensor.storage.start
    return StoredTensor(name, tensor.file, tensor.dtype, tensor.shape, start, start + tensor.nbytes)


def as_torch(stored: StoredTensor) -> StoredTorchTensor:
    """A byte range as a view of a storage of its own."""
    strides = [math.prod(stored.shape[axis + 1 :]) for axis in range(len(stored.shape))]
    storage = TorchStorage(stored.file, stored.name, stored.dtype, stored.start, stored.end)
    return StoredTorchTensor(stored.dtype, stored.shape, tuple(strides), storage, 0)


def load_torch_tensor(name: str, tensor: StoredTorchTensor) -> torch.Tensor:
    """Read the bytes between its first and its last element, and no others. What isn't contiguous comes as a view.

    Raises:
        NotFound, InvalidFile: the file is gone, or became shorter; or torch has no such dtype.
    """
    import torch

    stored = as_stored(name, tensor)
    if stored is not None:
        return load_tensor(stored)
    start, end = tensor.span
    spanned = StoredTensor(name, tensor.file, tensor.dtype, ((end - start) // tensor.itemsize,), start, end)
    return torch.as_strided(load_tensor(spanned), tensor.shape, tensor.stride)


def load_torch_range(name: str, tensor: StoredTorchTensor, begin: int, end: int) -> torch.Tensor:
    """Elements [begin, end) in the order of their indices, flat. Of what isn't contiguous, all that stands in the file
    between elements of those rows is read too, a few MB at a time.

    Raises:
        NotFound, InvalidFile: as `load_torch_tensor`.
    """
    import torch

    stored = as_stored(name, tensor)
    if stored is not None:
        return load_range(stored, begin, end)
    if begin == end:
        return torch.empty(0, dtype=torch_dtype(tensor.dtype))
    row = math.prod(tensor.shape[1:])
    first, last = begin // row, -(-end // row)
    if last - first == 1 and len(tensor.shape) > 1:
        return load_torch_range(name, _index(tensor, first), begin - first * row, end - first * row)
    rows = torch.empty((last - first, *tensor.shape[1:]), dtype=torch_dtype(tensor.dtype))
    load_into(name, rows_of(tensor, first, last), rows)
    return rows.reshape(-1)[begin - first * row : end - first * row]


def load_into(name: str, tensor: StoredTorchTensor, into: torch.Tensor) -> None:
    """Fill a tensor of its shape and dtype. Where one of the two isn't contiguous, along the axis of the widest stride
    as many indices at once as stand within `SPAN` elements.

    Raises:
        NotFound, InvalidFile: as `load_torch_tensor`.
    """
    stored = as_stored(name, tensor)
    if stored is not None and into.is_contiguous():
        fill_from(stored, into)
        return
    reach = _reach(tensor.shape, tensor.stride)
    if reach <= SPAN:
        into.copy_(load_torch_tensor(name, tensor))
        return
    axis = max((axis for axis, size in enumerate(tensor.shape) if size > 1), key=lambda axis: tensor.stride[axis])
    step = max(1, (SPAN - reach) // tensor.stride[axis] + tensor.shape[axis])
    for start in range(0, tensor.shape[axis], step):
        count = min(step, tensor.shape[axis] - start)
        shape = (*tensor.shape[:axis], count, *tensor.shape[axis + 1 :])
        part = replace(tensor, shape=shape, offset=tensor.offset + start * tensor.stride[axis])
        load_into(name, part, into.narrow(axis, start, count))


def part_of(tensor: StoredTorchTensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> StoredTorchTensor:
    """The box that begins at `offsets`, by arithmetic alone; it lies inside."""
    start = sum(offset * stride for offset, stride in zip(offsets, tensor.stride, strict=True))
    return replace(tensor, shape=shape, offset=tensor.offset + start)


def _index(tensor: StoredTorchTensor, place: int) -> StoredTorchTensor:
    """`tensor[place]`."""
    offset = tensor.offset + place * tensor.stride[0]
    return replace(tensor, shape=tensor.shape[1:], stride=tensor.stride[1:], offset=offset)


def rows_of(tensor: StoredTorchTensor, start: int, stop: int) -> StoredTorchTensor:
    """`tensor[start:stop]`, by arithmetic alone.

    Raises:
        InvalidFile: it has no such rows.
    """
    if not tensor.shape or not 0 <= start <= stop <= tensor.shape[0]:
        raise InvalidFile(f"'{tensor.file}': a tensor of shape {list(tensor.shape)} has no rows {start} to {stop}")
    shape = (stop - start, *tensor.shape[1:])
    return replace(tensor, shape=shape, offset=tensor.offset + start * tensor.stride[0])
