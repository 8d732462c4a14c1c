"""Adapter tensors that are copies of the base's: nothing is to be done for those that are equal."""

from __future__ import annotations

import os

from lorakit.errors import InvalidFile
from lorakit.files.safetensors import DTYPE_BITS, StoredTensor
from lorakit.files.tensors import same_bytes, torch_dtype

_BLOCK = 1 << 20  # elements


def equal_values(stored: StoredTensor, base: StoredTensor) -> bool:
    """Equal bytes; where the dtypes differ, the base's values as the adapter's dtype holds them."""
    if stored.dtype == base.dtype:
        return same_bytes(stored, base)
    width, base_width = (DTYPE_BITS[tensor.dtype] // 8 for tensor in (stored, base))
    count = stored.nbytes // width
    with stored.file.open("rb") as mine, base.file.open("rb") as theirs:
        for first in range(0, count, _BLOCK):
            many = min(_BLOCK, count - first)
            ours = _read(mine.fileno(), stored, first * width, many * width)
            others = _read(theirs.fileno(), base, first * base_width, many * base_width)
            if ours != _cast(others, base.dtype, stored.dtype):
                return False
    return True


def _read(file: int, stored: StoredTensor, offset: int, count: int) -> bytes:
    block = os.pread(file, count, stored.start + offset)
    if len(block) != count:
        raise InvalidFile(f"'{stored.file}' became shorter while '{stored.name}' was read")
    return block


def _cast(block: bytes, dtype: str, wanted: str) -> bytes:
    import torch

    tensor = torch.frombuffer(bytearray(block), dtype=torch_dtype(dtype)).to(torch_dtype(wanted))
    return tensor.view(torch.uint8).numpy().tobytes()
