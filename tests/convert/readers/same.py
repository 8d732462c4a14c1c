"""Bit for bit: what a reader gives, and what was trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lorakit.convert.source import CopiedTensor, Source
from lorakit.files.tensors import tensor_bytes
from tests.convert.readers.state import state_of, whole


def ensure_same(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bytes(tensor_bytes(found[name])) == bytes(tensor_bytes(tensor.contiguous())), name


def ensure_gives(source: Source, wanted: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """By ranges that fit no row, and by the bytes that the kernel would copy; `prefix` begins each name there."""
    named = {f"{prefix}{name}": tensor for name, tensor in wanted.items()}
    ensure_same(state_of(source, 1001), named)
    for name, tensor in source.tensors.items():
        runs = tensor.byte_runs() if isinstance(tensor, CopiedTensor) else None
        if runs is not None:
            parts = [run.file.read_bytes()[run.start : run.start + run.nbytes] for run in runs]
            assert b"".join(parts) == bytes(tensor_bytes(whole(tensor))), name
    source.ensure_unchanged()
