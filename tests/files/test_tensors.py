"""Tensors come from their byte ranges as they were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import InvalidFile
from lorakit.files.safetensors import read_header
from lorakit.files.tensors import load_tensor, same_bytes, tensor_bytes, torch_dtype


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (), (2, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_a_tensor_is_loaded_as_it_was_saved(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    save_file({"pad": torch.ones(1, dtype=torch.uint8), "x": tensor}, tmp_path / "x")
    loaded = load_tensor(read_header(tmp_path / "x").tensors["x"])
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)
    assert len(tensor_bytes(tensor)) == tensor.nbytes


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100)}, tmp_path / "x")
    stored = read_header(tmp_path / "x").tensors["x"]
    os.truncate(tmp_path / "x", stored.end - 1)
    with pytest.raises(InvalidFile, match="became shorter while 'x' was read"):
        load_tensor(stored)


def test_a_dtype_that_torch_lacks_is_said() -> None:
    with pytest.raises(InvalidFile, match="torch has no dtype for F6_E2M3"):
        torch_dtype("F6_E2M3")


def test_equal_means_dtype_shape_and_bytes(tmp_path: Path) -> None:
    ones = torch.ones(4, 2)
    save_file({"a": ones, "b": ones.clone(), "c": ones.T.contiguous(), "d": ones.half(), "e": -ones}, tmp_path / "x")
    stored = read_header(tmp_path / "x").tensors
    assert [same_bytes(stored["a"], stored[name]) for name in "abcde"] == [True, True, False, False, False]
