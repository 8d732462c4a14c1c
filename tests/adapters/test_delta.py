"""A delta is Σ weight · scale · B A, whatever is asked of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorakit.adapters.delta import Delta, Kind, Term
from lorakit.errors import WrongBase
from lorakit.files.safetensors import read_header

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def delta_and_dense(
    folder: Path, ranks: list[int], kind: Kind = "linear", dtype: torch.dtype = torch.float32
) -> tuple[Delta, torch.Tensor]:
    """A delta of shape (7, 5), and the float64 sum that it has to be."""
    torch.manual_seed(len(ranks))
    out, into = (5, 7) if kind == "embedding" else (7, 5)
    tensors, dense = {}, torch.zeros(out, into, dtype=torch.float64)
    for index, rank in enumerate(ranks):
        b, a = torch.randn(out, rank).to(dtype), torch.randn(rank, into).to(dtype)
        tensors |= {f"B{index}": b, f"A{index}": a}
        dense += (index + 0.5) * (2.0 if index else -1.0) * (b.double() @ a.double())
    save_file(tensors, folder / "x.safetensors")
    stored = read_header(folder / "x.safetensors").tensors
    terms = [Term(stored[f"B{i}"], stored[f"A{i}"], i + 0.5, 2.0 if i else -1.0) for i in range(len(ranks))]
    return Delta(tuple(terms), kind), dense.T if kind == "embedding" else dense


@settings(max_examples=25)
@given(
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    kind=st.sampled_from(["linear", "embedding"]),
    dtype=st.sampled_from(DTYPES),
)
def test_all_views_agree_with_the_dense_sum(tmp_path: Path, ranks: list[int], kind: Kind, dtype: torch.dtype) -> None:
    delta, dense = delta_and_dense(tmp_path, ranks, kind, dtype)
    assert delta.shape == tuple(dense.shape)
    assert delta.rank == sum(ranks)
    torch.testing.assert_close(delta.dense(), dense)
    stacked = delta.scale * (delta.B.double() @ delta.A.double())
    torch.testing.assert_close(stacked.T if kind == "embedding" else stacked, dense, rtol=1e-5, atol=1e-5)
    u, s, vh = delta.svd()
    torch.testing.assert_close(u @ torch.diag(s) @ vh, dense)
    torch.testing.assert_close(s, torch.linalg.svdvals(dense)[: len(s)])
    assert delta.norm() == pytest.approx(float(dense.norm()))
    torch.testing.assert_close((delta * -2).dense(), -2 * dense)


def test_the_sum_of_equal_factors_is_one_term(tmp_path: Path) -> None:
    delta, dense = delta_and_dense(tmp_path, [2, 3])
    doubled = delta.plus(delta * 0.5, module="m")
    assert doubled.rank == delta.rank
    torch.testing.assert_close(doubled.dense(), 1.5 * dense)


def test_a_delta_less_itself_is_zero(tmp_path: Path) -> None:
    delta, _ = delta_and_dense(tmp_path, [2, 3])
    nothing = delta.plus(delta * -1, module="m")
    assert not nothing.dense().any()
    assert nothing.norm() == 0


def test_deltas_of_different_shapes_do_not_add_up(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, _ = delta_and_dense(tmp_path / "one", [2])
    two, _ = delta_and_dense(tmp_path / "two", [2], "embedding")
    with pytest.raises(WrongBase, match=r"'m' is linear .* and embedding"):
        one.plus(two, module="m")
