"""Torch tensors from byte ranges of files, and back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

from lorakit.errors import InvalidFile, NotFound
from lorakit.files.safetensors import StoredTensor

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "C64": "complex64",
}  # fmt: skip

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype."""
    import torch

    name = TORCH_NAMES.get(dtype)
    if name is None:
        raise InvalidFile(f"torch has no dtype for {dtype}")
    found: torch.dtype = getattr(torch, name)
    return found


def load_tensor(stored: StoredTensor) -> torch.Tensor:
    """Read one whole tensor into memory of its own."""
    import torch

    tensor = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
    fill_from(stored, tensor)
    return tensor


def fill_from(stored: StoredTensor, into: torch.Tensor) -> None:
    """Read one whole tensor into a contiguous one of its size and dtype.

    Raises:
        NotFound, InvalidFile: the file is gone, or became shorter.
    """
    with _opened(stored) as stream:
        read_into(stream.fileno(), tensor_bytes(into), stored.start, stored)


def load_range(stored: StoredTensor, begin: int, end: int) -> torch.Tensor:
    """Elements [begin, end) in the order of their indices, flat.

    Raises:
        NotFound, InvalidFile: the file is gone, or became shorter; or torch has no such dtype.
    """
    import torch

    tensor = torch.empty(end - begin, dtype=torch_dtype(stored.dtype))
    with _opened(stored) as stream:
        read_into(stream.fileno(), tensor_bytes(tensor), stored.start + begin * tensor.itemsize, stored)
    return tensor


def load_floats(stored: StoredTensor) -> torch.Tensor:
    """Read one whole tensor of finite numbers.

    Raises:
        InvalidFile: it is of no floating dtype, or holds NaN or infinity.
    """
    if stored.dtype not in FLOATS:
        raise InvalidFile(f"'{stored.file}': '{stored.name}' is {stored.dtype}: save it in bf16, fp16 or fp32")
    tensor = load_tensor(stored)
    if not tensor.isfinite().all():
        raise InvalidFile(f"'{stored.file}': '{stored.name}' holds NaN or infinity: it was broken in training")
    return tensor


def read_into(reader: int, view: memoryview, offset: int, stored: StoredTensor) -> None:
    """Fill `view` from an open file.

    Raises:
        InvalidFile: the file became shorter since its header was read.
    """
    done = 0
    while done < len(view):
        got = os.preadv(reader, [view[done:]], offset + done)
        if got == 0:
            raise InvalidFile(f"'{stored.file}' became shorter while '{stored.name}' was read")
        done += got


def _opened(stored: StoredTensor) -> BinaryIO:
    try:
        return stored.file.open("rb")
    except FileNotFoundError:
        raise NotFound(f"'{stored.file}' is gone, and '{stored.name}' was still to be read from it") from None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal bit for bit, compared in blocks."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        for offset in range(0, one.nbytes, 1 << 22):
            count = min(1 << 22, one.nbytes - offset)
            if os.pread(first.fileno(), count, one.start + offset) != os.pread(
                second.fileno(), count, other.start + offset
            ):
                return False
    return True
