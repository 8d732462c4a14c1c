"""Trained rows of an embedding as factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lorakit.adapters.trained import Rows
from lorakit.convert.adapters.token_rows import on_embedding, on_head, row_changes
from lorakit.errors import InvalidFile
from lorakit.files.safetensors import read_header

COUNT, WIDTH = 9, 4


def stored(folder: Path, indices: list[int], same: int = 0, width: int = WIDTH) -> tuple[Rows, torch.Tensor, object]:
    """Trained rows, of which the first `same` are the base's own; what they change; the base's table."""
    chance = np.random.default_rng(1)
    table = chance.standard_normal((COUNT, WIDTH)).astype("float32")
    rows = chance.standard_normal((len(indices), width)).astype("float32")
    if same:
        rows[:same] = table[indices[:same]]
    folder.mkdir(exist_ok=True)
    save_file({"table": table, "rows": rows}, folder / "both.safetensors")
    tensors = read_header(folder / "both.safetensors").tensors
    wanted = torch.zeros(COUNT, WIDTH, dtype=torch.float64)
    if width == WIDTH and max(indices) < COUNT:
        wanted[indices] = torch.from_numpy(rows.astype("float64") - table[indices])
    return Rows(((tensors["rows"], tuple(indices), 1.0),)), wanted, tensors["table"]


@given(st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT, unique=True), st.integers(0, COUNT))
def test_both_sides_change_by_what_was_trained_and_each_changed_row_costs_one_rank(
    tmp_path: Path, indices: list[int], same: int
) -> None:
    same = min(same, len(indices))
    rows, wanted, table = stored(tmp_path / "a", indices, same)
    kept, changes = row_changes(rows, table)  # type: ignore[arg-type]
    for make in (on_embedding, on_head):
        delta = make(kept, changes, COUNT)
        assert delta.shape == (COUNT, WIDTH)
        assert delta.rank == len(indices) - same
        torch.testing.assert_close(delta.dense(), wanted)


def test_rows_that_the_base_does_not_have_are_named(tmp_path: Path) -> None:
    for number, (indices, width) in enumerate((([COUNT], WIDTH), ([1], WIDTH + 1))):
        rows, _, table = stored(tmp_path / f"{number}", indices, width=width)
        with pytest.raises(InvalidFile, match="table"):
            row_changes(rows, table)  # type: ignore[arg-type]
