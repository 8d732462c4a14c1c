"""What became of a tensor, beside numpy and torch."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file

from lorakit.checkpoints.tensors import open_tensors
from lorakit.errors import UsageError
from lorakit.files.safetensors import planned_header
from lorakit.mix import changes
from lorakit.mix.changes import Closeness, TensorChange, tensor_changes

FINITE = st.floats(-1e4, 1e4, width=32)


def change_of(
    folder: Path, before: torch.Tensor, after: torch.Tensor, closeness: Closeness | None = None
) -> TensorChange:
    opened = []
    for number, tensor in enumerate((before, after)):
        save_file({"w": tensor}, folder / f"{number}.safetensors")
        opened.append(open_tensors(folder / f"{number}.safetensors").stored)
    (found,) = tensor_changes(*opened, closeness)
    return found


@settings(max_examples=60)
@given(
    before=arrays.arrays(np.float32, st.integers(1, 20), elements=FINITE),
    moved=st.lists(st.tuples(st.integers(0, 19), FINITE), max_size=3),
    block=st.integers(1, 7),
)
def test_numbers_are_those_of_dense_arithmetic(
    tmp_path_factory: pytest.TempPathFactory, before: Any, moved: list[tuple[int, float]], block: int
) -> None:
    after = before.copy()
    for place, to in moved:
        after[place % len(after)] = to
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "_BLOCK", block)
        found = change_of(tmp_path_factory.mktemp("changes"), torch.from_numpy(before), torch.from_numpy(after))
    old, new = before.astype("float64"), after.astype("float64")
    assert found.change is not None
    assert found.change.before == pytest.approx((old**2).sum())
    assert found.change.after == pytest.approx((new**2).sum())
    assert found.change.difference == pytest.approx(((new - old) ** 2).sum())
    assert found.change.product == pytest.approx((new * old).sum())
    assert found.largest == np.abs(new - old).max()
    same = before.tobytes() == after.tobytes()
    assert found.state == ("equal" if same else "close" if np.allclose(new, old) else "different")


@settings(max_examples=60)
@given(
    values=st.lists(st.tuples(st.sampled_from([0.0, -0.0, 1.0, inf, -inf, nan]), FINITE | st.just(inf)), min_size=1),
    rtol=st.floats(0, 1),
    atol=st.floats(0, 1e3),
)
def test_closeness_is_that_of_torch_whatever_the_numbers(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[float, float]], rtol: float, atol: float
) -> None:
    before, after = (torch.tensor(one, dtype=torch.float64) for one in zip(*values, strict=True))
    after = torch.where(after.abs() < 1e3, before, after)
    found = change_of(tmp_path_factory.mktemp("changes"), before, after, Closeness(rtol, atol))
    close = torch.allclose(after, before, rtol=rtol, atol=atol, equal_nan=True)
    assert (found.state in ("equal", "close")) == close


@pytest.mark.parametrize("atol", [0.0, 1e-3])
def test_what_is_infinite_in_both_is_close_where_nothing_is_allowed(tmp_path: Path, atol: float) -> None:
    before, after = torch.tensor([-inf, 1.0]), torch.tensor([-inf, 1.0 + 1e-6])
    found = change_of(tmp_path, before, after, Closeness(0.0, atol))
    assert (found.state == "close") == torch.allclose(before, after, rtol=0.0, atol=atol)


@pytest.mark.parametrize("wrong", [nan, inf, -1.0])
def test_closeness_is_a_finite_number(wrong: float) -> None:
    for pair in ((wrong, 0.0), (0.0, wrong)):
        with pytest.raises(UsageError, match="finite numbers"):
            Closeness(*pair)


WIDE = {torch.int64: st.integers(-(2**63), 2**63 - 1), torch.uint64: st.integers(0, 2**64 - 1)}


@settings(max_examples=60)
@given(data=st.data(), before=st.sampled_from(list(WIDE)), after=st.sampled_from([*WIDE, torch.int32]))
def test_integers_are_subtracted_as_such(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, before: torch.dtype, after: torch.dtype
) -> None:
    ranges = {**WIDE, torch.int32: st.integers(-(2**31), 2**31 - 1)}
    old, new = data.draw(ranges[before]), data.draw(ranges[after])
    if before == after:
        new = data.draw(st.sampled_from([new, min(old + 1, 2**63 - 1)]))
    pair = torch.tensor([old], dtype=before), torch.tensor([new], dtype=after)
    found = change_of(tmp_path_factory.mktemp("wide"), *pair, Closeness(0.0, 0.5))
    assert found.largest == abs(float(new - old))
    assert (found.state in ("equal", "close")) == (old == new)


def test_without_closeness_a_bit_makes_the_difference(tmp_path: Path) -> None:
    before, after = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    assert change_of(tmp_path, before, after).state == "close"
    assert change_of(tmp_path, before, after, Closeness(None, None)).state == "different"
    assert change_of(tmp_path, before, before, Closeness(None, None)).state == "equal"


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int64", "float16", "bfloat16", "float64", "float8_e4m3fn", "complex64"]
)
def test_every_dtype_can_be_compared(tmp_path: Path, dtype: str) -> None:
    before = torch.tensor([1.0, 0.0, 1.0]).to(getattr(torch, dtype))
    after = torch.tensor([1.0, 1.0, 1.0]).to(getattr(torch, dtype))
    found = change_of(tmp_path, before, after)
    assert (found.state, found.largest) == ("different", 1.0)
    assert found.change is not None
    assert (found.change.before, found.change.after, found.change.difference) == (2.0, 3.0, 1.0)
    assert change_of(tmp_path, before, before).state == "equal"


def test_another_dtype_with_the_same_numbers_is_close_and_both_are_named(tmp_path: Path) -> None:
    found = change_of(tmp_path, torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16))
    assert (found.state, found.largest, found.before, found.after) == ("close", 0.0, "F32 [2, 3]", "BF16 [2, 3]")
    found = change_of(tmp_path, torch.ones(2, 3), torch.ones(3, 2))
    assert (found.state, found.change, found.before, found.after) == ("reshaped", None, "F32 [2, 3]", "F32 [3, 2]")


def test_what_is_no_number_has_no_norm(tmp_path: Path) -> None:
    found = change_of(tmp_path, torch.tensor([1.0, nan]), torch.tensor([2.0, nan]))
    assert (found.state, found.largest, found.change) == ("different", None, None)
    assert found.as_dict()["norms"] is None


def test_numbers_that_torch_does_not_have_are_compared_as_bytes(tmp_path: Path) -> None:
    opened = []
    for number, content in enumerate((b"\x12\x34", b"\x12\x35")):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(planned_header(file, [("w", "F4", (4,))], {})[0] + content)
        opened.append(open_tensors(file).stored)
    (same,) = tensor_changes(opened[0], opened[0])
    (other,) = tensor_changes(*opened)
    assert (same.state, other.state, other.change, other.before) == ("equal", "different", None, "F4 [4]")
