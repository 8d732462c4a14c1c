"""Cutting a weight into blocks of rows changes no bit of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakit.files.safetensors import read_header
from lorakit.files.tensors import tensor_bytes
from lorakit.merge import blocks
from lorakit.merge.blocks import Adder, row_blocks
from lorakit.merge.plan import ComputeTensor
from lorakit.merge.steps import AddProduct, matrix

SIDES = st.integers(1, 40) | st.integers(41, 700)
RANKS = st.integers(1, 70) | st.integers(120, 140)
FACTORS = st.floats(-4, 4) | st.sampled_from([1.0, 2.0, -0.5, 0.0])  # powers of two go another way
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


class InMemory:
    def __init__(self) -> None:
        self.content = bytearray()

    def put(self, tensor: ComputeTensor, offset: int, view: memoryview) -> None:
        assert offset == len(self.content)
        self.content += view


def written(computed: ComputeTensor) -> bytes:
    before = torch.get_num_threads()
    output = InMemory()
    with blocks.exact_arithmetic("cpu") as threads, computed.source.file.open("rb") as source:
        Adder("cpu", threads, lambda _: None).write(computed, source.fileno(), output)
    assert torch.get_num_threads() == before
    return bytes(output.content)


@settings(max_examples=120)
@example(rows=437, columns=32, ranks=[1, 5], dtype=torch.float32, seed=0, elements=1644, transposed=False, factor=1.0)
@given(
    rows=SIDES, columns=SIDES, ranks=st.lists(RANKS, min_size=1, max_size=3), dtype=DTYPES, seed=st.integers(0, 9),
    elements=st.integers(1, 60_000), transposed=st.booleans(), factor=FACTORS,
)  # fmt: skip
def test_blocks_have_the_bits_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, ranks: list[int], dtype: torch.dtype,
    elements: int, transposed: bool, factor: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out, into = (columns, rows) if transposed else (rows, columns)
    tensors = {"W": torch.randn(rows, columns).to(dtype)}
    for index, rank in enumerate(ranks):
        tensors |= {f"B{index}": torch.randn(out, rank), f"A{index}": torch.randn(rank, into)}
    save_file(tensors, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors").tensors

    total = tensors["W"].to(wide)
    for index in range(len(ranks)):
        delta = tensors[f"B{index}"].to(wide) @ tensors[f"A{index}"].to(wide)
        total = total + (delta.T if transposed else delta) * factor
    steps = tuple(
        AddProduct(matrix(header[f"B{index}"]), matrix(header[f"A{index}"]), factor, transposed)
        for index in range(len(ranks))
    )
    monkeypatch.setattr(blocks, "CPU_BLOCK", elements)
    computed = ComputeTensor(header["W"], header["W"], steps)
    assert written(computed) == bytes(tensor_bytes(total.to(dtype).contiguous()))


@given(rows=st.integers(0, 5000), columns=st.integers(0, 5000), elements=st.integers(1, 1 << 20))
def test_blocks_cover_every_row_once_and_none_is_tiny(rows: int, columns: int, elements: int) -> None:
    cut = list(row_blocks(rows, columns, elements))
    assert [row for first, last in cut for row in range(first, last)] == list(range(rows))
    smallest, largest = min(last - first for first, last in cut), max(last - first for first, last in cut)
    assert largest - smallest <= 1
    if rows > blocks.FEWEST_ROWS:
        assert smallest >= blocks.FEWEST_ROWS // 2


def test_a_change_of_dtype_alone_takes_any_shape(tmp_path: Path) -> None:
    tensor = torch.randn(3, 5, 7)
    save_file({"W": tensor, "out": tensor.bfloat16()}, tmp_path / "in.safetensors")
    header = read_header(tmp_path / "in.safetensors").tensors
    computed = ComputeTensor(header["W"], header["out"])
    assert written(computed) == bytes(tensor_bytes(tensor.bfloat16()))
