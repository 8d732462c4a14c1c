"""Rows in another place or order: any range is that of the tensor that they make."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.convert.readers.rows import HalvedHeads, Rows, Stacked
from lorakit.convert.source import SourceTensor


@dataclass
class Numbered:
    """Elements that are their own index; `read_of` counts how many were asked for."""

    shape: tuple[int, ...]
    dtype: str = "I64"
    read_of: list[int] = field(default_factory=list)

    def read(self, begin: int, end: int) -> torch.Tensor:
        assert 0 <= begin <= end <= torch.Size(self.shape).numel()
        self.read_of.append(end - begin)
        return torch.arange(begin, end)

    def whole(self) -> torch.Tensor:
        return torch.arange(torch.Size(self.shape).numel()).view(self.shape)


WIDTHS = st.lists(st.integers(1, 4), max_size=2).map(tuple)


def ensure_ranges(tensor: SourceTensor, expected: torch.Tensor, data: st.DataObject) -> tuple[int, int]:
    assert tensor.shape == tuple(expected.shape)
    end = data.draw(st.integers(0, expected.numel()))
    begin = data.draw(st.integers(0, end))
    assert torch.equal(tensor.read(begin, end), expected.flatten()[begin:end])
    return begin, end


@given(st.data(), WIDTHS, st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_parts_of_each_period(data: st.DataObject, width: tuple[int, ...], blocks: int, parts: list[int]) -> None:
    source = Numbered((blocks * sum(parts), *width))
    wanted = data.draw(st.integers(0, len(parts) - 1))
    rows = Rows(source, sum(parts), sum(parts[:wanted]), parts[wanted])
    split = source.whole().view(blocks, sum(parts), *width).split(parts, dim=1)[wanted]
    begin, end = ensure_ranges(rows, split.reshape(-1, *width), data)
    assert sum(source.read_of) == end - begin  # and no more


@given(st.data(), WIDTHS, st.integers(1, 4), st.integers(1, 4))
def test_heads_whose_halves_alternate(data: st.DataObject, width: tuple[int, ...], heads: int, pairs: int) -> None:
    source = Numbered((heads * pairs * 2, *width))
    rows = source.whole().view(heads, pairs, 2, *width)
    ensure_ranges(
        HalvedHeads(source, pairs * 2),
        torch.cat([rows[:, :, :1], rows[:, :, 1:]], 2).transpose(1, 2).reshape(source.shape),
        data,
    )


@given(st.data(), WIDTHS, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_tensors_below_one_another(data: st.DataObject, width: tuple[int, ...], rows: list[int]) -> None:
    parts = tuple(Numbered((count, *width)) for count in rows)
    begin, end = ensure_ranges(Stacked(parts), torch.cat([part.whole() for part in parts]), data)
    assert sum(sum(part.read_of) for part in parts) == end - begin
