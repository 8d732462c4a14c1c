"""NaN and infinity are found by their bits, in every float dtype."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import InvalidFile
from lorakit.files.finite import look_at_numbers
from lorakit.files.safetensors import read_header

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_number_is_found_and_its_tensor_named(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    numbers = torch.randn(100, 7).to(dtype)
    save_file({"good": numbers, "odd": torch.ones(1, dtype=torch.uint8)}, tmp_path / "x")
    assert look_at_numbers(read_header(tmp_path / "x")).not_finite is None
    numbers[99, 6] = bad
    save_file({"good": torch.ones(3), "bad": numbers}, tmp_path / "y")
    assert look_at_numbers(read_header(tmp_path / "y")).not_finite == "bad"


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_and_smallest_numbers_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    save_file({"x": torch.tensor([limits.max, limits.min, limits.tiny, -0.0], dtype=dtype)}, tmp_path / "x")
    assert look_at_numbers(read_header(tmp_path / "x")).not_finite is None


def test_zeros_are_known(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(5), "y": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "x")
    assert look_at_numbers(read_header(tmp_path / "x")).all_zero
    save_file({"x": torch.zeros(5), "y": torch.ones(1)}, tmp_path / "y")
    assert not look_at_numbers(read_header(tmp_path / "y")).all_zero


def test_a_file_that_is_cut_short_meanwhile_is_refused_and_ends_nothing(tmp_path: Path) -> None:
    save_file({"x": torch.ones(10_000)}, tmp_path / "x")
    header = read_header(tmp_path / "x")
    os.truncate(tmp_path / "x", header.data_start + 8)
    with pytest.raises(InvalidFile, match="became shorter"):
        look_at_numbers(header)
