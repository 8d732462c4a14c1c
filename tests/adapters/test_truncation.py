"""Truncations of thin products are those of a full SVD; ranks are shared out within a budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapters.truncation import cut, product_spectrum, product_svd, rank_for_energy, ranks_within
from lorakit.errors import UsageError

SIZES = st.integers(1, 24)


def thin(m: int, n: int, ranks: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    columns = sum(ranks)
    return torch.randn(m, columns, dtype=torch.float64), torch.randn(columns, n, dtype=torch.float64)


@given(m=SIZES, n=SIZES, columns=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_cut_is_the_best_approximation_there_is(m: int, n: int, columns: int, rank: int, seed: int) -> None:
    left, right = thin(m, n, [columns], seed)
    whole = left @ right
    u, s, vh = product_svd(left, right)
    torch.testing.assert_close(product_spectrum(left, right), torch.linalg.svdvals(whole)[: len(s)])
    b, a = cut(u, s, vh, min(rank, len(s)))
    full_u, full_s, full_vh = torch.linalg.svd(whole, full_matrices=False)
    best = (full_u[:, :rank] * full_s[:rank]) @ full_vh[:rank]
    error, optimum = float((whole - b.double() @ a.double()).norm()), float((whole - best).norm())
    assert error == pytest.approx(optimum, rel=1e-5, abs=1e-6 * float(whole.norm()))


@given(st.lists(st.floats(0, 10), min_size=1, max_size=9), st.floats(0.01, 1))
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(values: list[float], energy: float) -> None:
    spectrum = sorted(values, reverse=True)
    rank = rank_for_energy(spectrum, energy)
    squares = [value**2 for value in spectrum]
    assert sum(squares[:rank]) >= energy * sum(squares) - 1e-9
    assert rank == 0 or energy == 1 or sum(squares[: rank - 1]) < energy * sum(squares)


@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.lists(st.floats(0.1, 10), min_size=1, max_size=4).map(lambda s: sorted(s)[::-1]),
        min_size=1,
    ),
    st.integers(3, 60),
)  # fmt: skip
def test_a_budget_is_kept_and_the_strongest_go_first(spectra: dict[str, list[float]], budget: int) -> None:
    costs = dict.fromkeys(spectra, 3)
    ranks = ranks_within(spectra, costs, budget)
    assert sum(ranks.values()) == min(budget // 3, sum(map(len, spectra.values())))
    kept = [sigma for module, rank in ranks.items() for sigma in spectra[module][:rank]]
    lost = [sigma for module, rank in ranks.items() for sigma in spectra[module][rank:]]
    assert not lost or min(kept) >= max(lost)


def test_a_dear_module_has_to_be_worth_its_price() -> None:
    assert ranks_within({"dear": [3.0], "cheap": [2.0, 2.0]}, {"dear": 100, "cheap": 10}, 100) == {
        "dear": 0,
        "cheap": 2,
    }


def test_a_budget_that_holds_nothing() -> None:
    with pytest.raises(UsageError, match="a budget of 5 parameters holds nothing: one rank of one module takes 10"):
        ranks_within({"a": [1.0]}, {"a": 10}, 5)
