"""The largest values of a matrix are found though no more than a block of it is in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.mix.methods import blocks
from lorakit.mix.methods.blocks import Dense, Largest, row_blocks
from lorakit.mix.methods.registry import LowRank
from tests.mix.methods.deltas import delta, dense, whole


@pytest.fixture(params=[1, 50, 1 << 19], ids=lambda size: f"blocks of {size}")
def block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    return int(request.param)


def marked(low_rank: LowRank, count: int) -> torch.Tensor:
    matrix = Dense.of(low_rank)
    largest = Largest(matrix, count)
    return torch.cat([largest.mask(block) for block in matrix.blocks()])


def by_sorting(low_rank: LowRank, count: int) -> np.ndarray:
    magnitudes = np.abs(dense(low_rank).numpy().astype(np.float32))
    mask = np.zeros(magnitudes.size, dtype=bool)
    mask[np.argsort(-magnitudes.ravel(), kind="stable")[:count]] = True
    return mask.reshape(magnitudes.shape)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 4), st.floats(0, 1), st.booleans(), st.integers(0, 999))
def test_the_largest_are_those_that_sorting_finds(
    block_size: int, out: int, into: int, rank: int, share: float, ties: bool, seed: int
) -> None:
    low_rank = (whole if ties else delta)(out, into, rank, seed)
    count = int(share * out * into)
    assert np.array_equal(marked(low_rank, count).numpy(), by_sorting(low_rank, count))


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1.0, 1e20])
def test_magnitudes_of_any_size_are_told_apart(block_size: int, scale: float) -> None:
    """Subnormal ones as well."""
    low_rank = LowRank(delta(20, 30, 3, 1).B, delta(20, 30, 3, 1).A, scale)
    assert np.array_equal(marked(low_rank, 99).numpy(), by_sorting(low_rank, 99))


def test_the_blocks_are_the_float64_product_rounded_once(block_size: int) -> None:
    low_rank = LowRank(delta(40, 30, 5, 1).B.bfloat16(), delta(40, 30, 5, 1).A.half(), 0.5)
    assert torch.equal(torch.cat(list(Dense.of(low_rank).blocks())), dense(low_rank).float())


@given(st.integers(1, 500), st.integers(1, 500))
def test_blocks_hold_all_rows_and_no_more_elements_than_they_may(rows: int, columns: int) -> None:
    cut = list(row_blocks(rows, columns))
    assert [row for block in cut for row in range(rows)[block]] == list(range(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK", 700)
        cut = list(row_blocks(rows, columns))
    assert [row for block in cut for row in range(rows)[block]] == list(range(rows))
    assert all(0 < (block.stop - block.start) * columns <= max(700, columns) for block in cut)
