"""Tensors of torch files: what is read is what is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lorakit.errors import InvalidFile, NotFound
from lorakit.files.tensors import load_tensor
from lorakit.files.torch_file import StoredTorchTensor, read_torch_file
from lorakit.files.torch_tensors import as_stored, checked_tensor, load_torch_tensor, rows_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save({"w": torch.arange(24, dtype=torch.float16).reshape(6, 4)}, tmp_path / "it.pt")
    return tmp_path / "it.pt"


@pytest.fixture
def stored(file: Path) -> StoredTorchTensor:
    found = read_torch_file(file)["w"]
    assert isinstance(found, StoredTorchTensor)
    return found


def test_a_contiguous_tensor_is_a_byte_range_as_of_safetensors(stored: StoredTorchTensor) -> None:
    found = as_stored("w", stored)
    assert found is not None
    assert (found.dtype, found.shape, found.nbytes) == ("F16", (6, 4), 48)
    assert torch.equal(load_tensor(found), torch.arange(24, dtype=torch.float16).reshape(6, 4))
    content = stored.file.read_bytes()[found.start : found.end]
    assert np.array_equal(np.frombuffer(content, "<f2"), np.arange(24))


def test_rows_are_read_without_the_others(stored: StoredTorchTensor) -> None:
    rows = rows_of(stored, 2, 5)
    assert rows.span == (stored.span[0] + 16, stored.span[0] + 40)
    assert torch.equal(load_torch_tensor("w", rows), torch.arange(8, 20, dtype=torch.float16).reshape(3, 4))
    for start, stop in ((-1, 2), (3, 2), (0, 7)):
        with pytest.raises(InvalidFile, match="no rows"):
            rows_of(stored, start, stop)


def test_rows_of_a_transposed_tensor_are_its_own(tmp_path: Path) -> None:
    whole = torch.arange(24).reshape(6, 4)
    torch.save(whole.T, tmp_path / "it.pt")
    found = read_torch_file(tmp_path / "it.pt")
    assert as_stored("w", found) is None
    assert torch.equal(load_torch_tensor("w", rows_of(found, 1, 3)), whole.T[1:3])


def test_one_number_spread_over_many_takes_the_bytes_of_one(tmp_path: Path) -> None:
    torch.save(torch.ones(1).expand(10**12), tmp_path / "it.pt")
    found = read_torch_file(tmp_path / "it.pt")
    assert found.span[1] - found.span[0] == 4
    assert load_torch_tensor("w", found).shape == (10**12,)


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [((25,), (1,), 0), ((6, 4), (4, 1), 1), ((2,), (24,), 0), ((2,), (-1,), 1), ((-1,), (1,), 0), ((2,), (1, 1), 0)],
)
def test_a_view_never_reaches_beyond_its_storage(
    stored: StoredTorchTensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    with pytest.raises(ValueError, match=r"reaches beyond|whole numbers|strides"):
        checked_tensor("F16", shape, stride, stored.storage, offset)


def test_a_file_that_went_away_is_said(stored: StoredTorchTensor) -> None:
    stored.file.unlink()
    with pytest.raises(NotFound, match="is gone"):
        load_torch_tensor("w", stored)
