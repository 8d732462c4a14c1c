"""A range of a tensor's elements, wherever and however it is stored; torch's own indexing is the measure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakit.convert.source import CopiedTensor, PlainTensor, Source, TorchTensor, same_bits
from lorakit.errors import Conflict, InvalidFile, NotFound
from lorakit.files import torch_tensors
from lorakit.files.folders import file_state
from lorakit.files.safetensors import read_header
from lorakit.files.torch_file import read_torch_file


def of_torch_file(file: Path, tensor: torch.Tensor) -> TorchTensor:
    torch.save(tensor, file)
    return TorchTensor("it", read_torch_file(file))


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """Transposed, cut, stepped and expanded ones."""
    shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=4))
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    for axis in range(tensor.dim()):
        begin = draw(st.integers(0, tensor.shape[axis] - 1))
        tensor = tensor.narrow(axis, begin, draw(st.integers(1, tensor.shape[axis] - begin)))
    steps = tuple(slice(None, None, draw(st.integers(1, 3))) for _ in range(tensor.dim()))
    tensor = tensor[steps] if steps else tensor
    if draw(st.booleans()):
        tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    return tensor


@given(tensor=views(), data=st.data(), span=st.sampled_from([1, 3, 1 << 22]))
@settings(max_examples=300, deadline=None)
def test_any_range_of_any_view_is_what_torch_says(
    tmp_path_factory: pytest.TempPathFactory, tensor: torch.Tensor, data: st.DataObject, span: int
) -> None:
    stored = of_torch_file(tmp_path_factory.mktemp("view") / "it.pt", tensor)
    flat = tensor.reshape(-1)
    begin = data.draw(st.integers(0, flat.numel()))
    end = data.draw(st.integers(begin, flat.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_tensors, "SPAN", span)
        assert torch.equal(stored.read(begin, end), flat[begin:end])


def test_the_bytes_of_what_stands_in_order_can_be_copied(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4)
    in_order, turned = of_torch_file(tmp_path / "a.pt", tensor[2:]), of_torch_file(tmp_path / "b.pt", tensor.T)
    assert turned.byte_runs() is None
    (run,) = in_order.byte_runs() or ()
    raw = run.file.read_bytes()[run.start : run.start + run.nbytes]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32), tensor[2:].reshape(-1))


def test_tensors_are_equal_when_every_bit_is(tmp_path: Path) -> None:
    tensor = torch.tensor([[0.0, math.nan], [1.0, 2.0]])
    tensors = {"it": tensor, "same": tensor.clone(), "negative": tensor.clone(), "other": tensor.reshape(4).clone()}
    tensors["negative"][0, 0] = -0.0
    save_file(tensors, tmp_path / "model.safetensors")
    stored = {name: PlainTensor(one) for name, one in read_header(tmp_path / "model.safetensors").tensors.items()}
    assert isinstance(stored["it"], CopiedTensor)
    answers = {name: same_bits(stored["it"], one) for name, one in stored.items()}
    assert answers == {"it": True, "same": True, "negative": False, "other": False}


@pytest.mark.parametrize(("then", "error"), [("gone", NotFound), ("shorter", InvalidFile)])
def test_a_file_that_changes_under_its_reader_is_said(tmp_path: Path, then: str, error: Any) -> None:
    stored = of_torch_file(tmp_path / "it.pt", torch.randn(1000))
    if then == "gone":
        (tmp_path / "it.pt").unlink()
    else:
        (tmp_path / "it.pt").write_bytes(b"")
    with pytest.raises(error, match=r"it\.pt"):
        stored.read(0, 1000)


def test_a_file_that_was_written_again_is_a_conflict(tmp_path: Path) -> None:
    file = tmp_path / "it.pt"
    tensor = of_torch_file(file, torch.randn(3))
    source = Source(tmp_path, "torch", {"it": tensor}, {}, None, {file: file_state(file)})
    source.ensure_unchanged()
    torch.save(torch.randn(4), file)
    with pytest.raises(Conflict, match="written again"):
        source.ensure_unchanged()
