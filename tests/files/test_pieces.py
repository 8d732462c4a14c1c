"""Tensors in pieces: any range of elements, out of any pieces, as torch would slice it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InvalidFile, NotFound
from lorakit.files import torch_tensors
from lorakit.files.pieces import Box, StoredPiece, boxes, cover, read_pieces
from lorakit.files.torch_file import StoredTorchTensor, read_torch_file

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def sharded(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[slice, ...]], tuple[int, ...], int, int]:
    """A shape, boxes that cover it (some of them empty), the order of axes in which each is saved, and a range."""
    shape = draw(SHAPES)
    ranges: list[tuple[slice, ...]] = [()]
    for size in shape:
        cuts = [0, *sorted(draw(st.lists(st.integers(0, size), max_size=2))), size]
        ranges = [(*one, slice(a, b)) for one in ranges for a, b in pairwise(cuts)]
    count = torch.Size(shape).numel()
    begin = draw(st.integers(0, count))
    axes = tuple(draw(st.permutations(range(len(shape)))))
    return shape, draw(st.permutations(ranges)), axes, begin, draw(st.integers(begin, count))


def saved(file: Path, whole: torch.Tensor, ranges: list[tuple[slice, ...]], axes: tuple[int, ...]) -> list[StoredPiece]:
    """Each part in a storage of its own, its elements in another order than their indices'."""
    back = [axes.index(axis) for axis in range(len(axes))]
    torch.save(
        [whole[part].permute(axes).clone(memory_format=torch.contiguous_format).permute(back) for part in ranges], file
    )
    found = read_torch_file(file)
    return [StoredPiece(tuple(one.start for one in part), tensor) for part, tensor in zip(ranges, found, strict=True)]


@given(case=sharded())
def test_any_range_of_any_pieces_is_the_slice(
    case: tuple[tuple[int, ...], list[tuple[slice, ...]], tuple[int, ...], int, int],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shape, ranges, axes, begin, end = case
    monkeypatch.setattr(torch_tensors, "SPAN", 3)
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
    pieces = saved(tmp_path / "pieces.pt", whole, ranges, axes)
    assert cover(pieces, shape, "it")
    assert torch.equal(read_pieces("w", "I16", shape, pieces, begin, end), whole.reshape(-1)[begin:end])


@given(shape=SHAPES, data=st.data())
def test_boxes_are_the_range_in_its_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    begin = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(begin, whole.numel()))
    found = list(boxes(shape, begin, end))
    parts = [
        whole[tuple(slice(at, at + size) for at, size in zip(box.offsets, box.shape, strict=True))] for box in found
    ]
    assert [number for part in parts for number in part.reshape(-1).tolist()] == list(range(begin, end))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize(
    "pieces",
    [
        [Box((0, 0), (2, 4))],
        [Box((0, 0), (4, 4)), Box((0, 0), (1, 4))],
        [Box((0, 0), (4, 2)), Box((0, 1), (4, 2))],
        [Box((0, 0), (2, 4)), Box((3, 0), (2, 4))],
        [Box((0,), (4,)), Box((0, 0), (3, 4))],
    ],
    ids=["too few", "too many", "twice", "outside", "of another rank"],
)
def test_pieces_that_are_not_the_whole_once_do_not_cover_it(pieces: list[Box]) -> None:
    assert not cover(pieces, (4, 4), "it")


def test_a_file_that_went_away_or_became_shorter_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pieces.pt"
    torch.save(torch.arange(8.0), file)
    stored = read_torch_file(file)
    assert isinstance(stored, StoredTorchTensor)
    file.write_bytes(file.read_bytes()[: stored.storage.start + 4])
    with pytest.raises(InvalidFile, match="became shorter while 'w'"):
        read_pieces("w", "F32", (8,), [StoredPiece((0,), stored)], 0, 8)
    file.unlink()
    with pytest.raises(NotFound, match="is gone, and 'w'"):
        read_pieces("w", "F32", (8,), [StoredPiece((0,), stored)], 2, 4)
