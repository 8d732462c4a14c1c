"""How ZeRO lays weights out: any parameters on any number of ranks come back as they were."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.convert.readers.zero import PARTITIONS, SHARES, flat, of_partitions, of_shares
from lorakit.errors import InvalidFile
from lorakit.files.torch_file import read_torch_file
from tests.convert.readers.same import ensure_same
from tests.convert.readers.state import whole

Group = dict[str, torch.Tensor]
SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4)
GROUPS = st.lists(SHAPES, min_size=1, max_size=3)


def weights(groups: list[list[tuple[int, ...]]]) -> list[Group]:
    """Every element is a number of its own."""
    made, first = [], 0
    for number, shapes in enumerate(groups):
        made.append({})
        for place, shape in enumerate(shapes):
            count = math.prod(shape)
            made[-1][f"{number}.{place}"] = torch.arange(first, first + count, dtype=torch.float32).reshape(shape)
            first += count
    return made


def filled(tensor: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([tensor, torch.full((count - tensor.numel(),), -1.0)])


def stored(folder: Path, ranks: list[Any]) -> list[Any]:
    torch.save(ranks, folder / "ranks.pt")
    found: list[Any] = read_torch_file(folder / "ranks.pt")
    return found


def shapes_of(groups: list[Group]) -> list[dict[str, tuple[int, ...]]]:
    return [{name: tuple(tensor.shape) for name, tensor in group.items()} for group in groups]


def everything(groups: list[Group]) -> Group:
    return {name: tensor for group in groups for name, tensor in group.items()}


@given(shapes=GROUPS, ranks=st.integers(1, 4), align=st.integers(1, 5), free=st.integers(0, 3), lean=st.booleans())
def test_partitions_are_one_row_of_all_parameters(
    tmp_path: Path, shapes: list[list[tuple[int, ...]]], ranks: int, align: int, free: int, lean: bool
) -> None:
    groups = weights(shapes)
    said: list[dict[str, Any]] = [{PARTITIONS: []} for _ in range(ranks)]
    for group in groups:
        row = torch.cat([filled(tensor.reshape(-1), tensor.numel() + free) for tensor in group.values()])
        each = math.ceil(row.numel() / (align * ranks)) * align
        for rank, part in enumerate(filled(row, each * ranks).split(each) if each else [row] * ranks):
            left = min(max(row.numel() - rank * each, 0), each)
            said[rank][PARTITIONS].append(part[: left if lean else each].clone())
    if free:
        said[0]["param_alignment_paddings"] = [[free] * len(group) for group in groups]
    found = of_partitions(shapes_of(groups), stored(tmp_path, said))
    ensure_same({name: whole(tensor, 3) for name, tensor in found.items()}, everything(groups))


@given(shapes=GROUPS, ranks=st.integers(1, 4), data=st.data())
def test_shares_are_a_part_of_each_parameter_on_every_rank(
    tmp_path: Path, shapes: list[list[tuple[int, ...]]], ranks: int, data: st.DataObject
) -> None:
    groups = weights(shapes)
    rows: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for tensor in everything(groups).values():
        each = math.ceil(tensor.numel() / ranks)
        for rank, part in enumerate(
            filled(tensor.reshape(-1), each * ranks).split(each) if each else [tensor.reshape(-1)] * ranks
        ):
            rows[rank].append(part)
    joined = [torch.cat(row) for row in rows]
    cut = data.draw(st.integers(0, joined[0].numel()))
    said = [{SHARES: [row[:cut].clone(), row[cut:].clone()]} for row in joined]
    found = of_shares(shapes_of(groups), stored(tmp_path, said))
    ensure_same({name: whole(tensor, 3) for name, tensor in found.items()}, everything(groups))


def test_weights_that_end_too_early_are_named(tmp_path: Path) -> None:
    short = stored(tmp_path, [{PARTITIONS: [torch.ones(3)]}, {PARTITIONS: [torch.ones(2)]}])
    with pytest.raises(InvalidFile, match="end before 'w' does"):
        of_partitions([{"w": (2, 3)}], short)
    with pytest.raises(InvalidFile, match="are not the 4 numbers each"):
        of_shares([{"w": (7,)}], stored(tmp_path, [{SHARES: [torch.ones(4)]}, {SHARES: [torch.ones(3)]}]))


def test_ranks_of_different_groups_are_refused(tmp_path: Path) -> None:
    ranks = stored(tmp_path, [{PARTITIONS: [torch.ones(3)]}, {PARTITIONS: [torch.ones(3)] * 2}])
    with pytest.raises(InvalidFile, match="how many groups"):
        of_partitions([{"w": (6,)}], ranks)


@pytest.mark.parametrize("paddings", [[1], [1, -1], [True, 1], "11"])
def test_paddings_that_are_none_are_refused(tmp_path: Path, paddings: Any) -> None:
    ranks = stored(tmp_path, [{PARTITIONS: [torch.ones(6)], "param_alignment_paddings": [paddings]}])
    with pytest.raises(InvalidFile, match="param_alignment_paddings"):
        of_partitions([{"v": (2,), "w": (2,)}], ranks)


@pytest.mark.parametrize("rows", [[torch.ones(2, 2)], [torch.ones(2), torch.ones(2).half()], [7], None])
def test_what_is_not_flat_is_refused(tmp_path: Path, rows: Any) -> None:
    with pytest.raises(InvalidFile, match="flat weights of one dtype"):
        flat(stored(tmp_path, [rows])[0])
