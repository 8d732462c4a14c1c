"""What is dropped, which sign wins, and what comes of the rest; PEFT's operators on float64 deltas are the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import sqrt

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft.utils import merge_utils

from lorakit.errors import UsageError
from lorakit.mix.methods import blocks
from lorakit.mix.methods.registry import Draw, LowRank
from tests.mix.methods.deltas import (
    DRAW,
    bernoulli_from,
    delta,
    dense,
    from_dense,
    merge,
    several,
    weights_for,
    whole,
)

densities = st.floats(0.05, 0.95)
signs = st.sampled_from(["total", "frequency"])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def as_peft_sees(deltas: Sequence[LowRank]) -> list[torch.Tensor]:
    """Dense, with no two values of a delta alike: of equal ones PEFT keeps whichever topk finds."""
    tensors = [dense(each).float().double() for each in deltas]
    assume(all(len(tensor.abs().unique()) == tensor.numel() for tensor in tensors))
    return tensors


def assert_same(mine: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to float32's rounding, of which there are two."""
    torch.testing.assert_close(mine, expected, rtol=2e-6, atol=1e-6 * float(expected.abs().max()))


@given(several(), st.integers(0, 99), densities, signs)
def test_ties_is_pefts_on_the_dense_deltas(deltas: list[LowRank], seed: int, density: float, sign: str) -> None:
    weights = weights_for(deltas, seed)
    expected = merge_utils.ties(as_peft_sees(deltas), torch.tensor(weights, dtype=torch.float64), density, sign)
    assert_same(merge("ties", deltas, weights, density=density, majority_sign=sign), expected)


@given(several(), st.integers(0, 99), densities)
def test_magnitude_prune_is_pefts_on_the_dense_deltas(deltas: list[LowRank], seed: int, density: float) -> None:
    weights = weights_for(deltas, seed)
    expected = merge_utils.magnitude_prune(as_peft_sees(deltas), torch.tensor(weights, dtype=torch.float64), density)
    assert_same(merge("magnitude_prune", deltas, weights, density=density), expected)


@given(several(), st.integers(0, 99), densities, signs)
def test_dare_is_pefts_with_the_same_masks(deltas: list[LowRank], seed: int, density: float, sign: str) -> None:
    weights = weights_for(deltas, seed)
    tensors, factors = [dense(each) for each in deltas], torch.tensor(weights, dtype=torch.float64)
    density = float(torch.tensor(density))  # PEFT's shares are of the deltas' dtype, and would round otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", bernoulli_from([DRAW.generator(index) for index in range(len(deltas))]))
        summed = merge_utils.dare_linear(tensors, factors, density)
        patch.setattr(torch, "bernoulli", bernoulli_from([DRAW.generator(index) for index in range(len(deltas))]))
        elected = merge_utils.dare_ties(tensors, factors, density, sign)
    assert_same(merge("dare_linear", deltas, weights, density=density), summed)
    assert_same(merge("dare_ties", deltas, weights, density=density, majority_sign=sign), elected)


def test_the_elected_sign_wins() -> None:
    one = from_dense(torch.tensor([[3.0, -1.0, 2.0, 0.0]]))
    two = from_dense(torch.tensor([[-1.0, -3.0, -2.0, 5.0]]))
    merged = merge("ties", [one, two], [1.0, 1.0], density=1.0)
    # 3 outvotes −1; −1 and −3 agree and are averaged; a tie goes to +; a zero has no say and is not counted
    assert merged.tolist() == [[3.0, -2.0, 2.0, 5.0]]


def test_a_majority_by_frequency_counts_heads() -> None:
    deltas = [from_dense(torch.tensor([[value]])) for value in (5.0, -1.0, -2.0)]
    assert merge("ties", deltas, [1.0] * 3, density=1.0, majority_sign="total").item() == 5.0
    assert merge("ties", deltas, [1.0] * 3, density=1.0, majority_sign="frequency").item() == -1.5


def test_signs_are_elected_before_the_weights() -> None:
    deltas = [from_dense(torch.tensor([[value]])) for value in (5.0, -1.0)]
    assert merge("ties", deltas, [0.01, 100.0], density=1.0).item() == pytest.approx(0.05)


@given(several(2, 2), densities)
def test_ties_keeps_no_value_below_the_threshold(deltas: list[LowRank], density: float) -> None:
    tensors = as_peft_sees(deltas)
    merged = merge("ties", deltas, [1.0, 1.0], density=density)
    count = int(density * merged.numel())
    assume(count)
    kept = torch.zeros_like(merged, dtype=torch.bool)
    for tensor in tensors:
        kept |= tensor.abs() >= tensor.abs().flatten().kthvalue(tensor.numel() - count + 1).values
    assert not merged[~kept].any()
    assert int((merged != 0).sum()) <= 2 * count


@given(st.integers(1, 12), st.integers(1, 12), densities, st.integers(0, 99))
def test_of_equal_values_no_more_are_kept_than_the_density_allows(
    out: int, into: int, density: float, seed: int
) -> None:
    each = whole(out, into, 2, seed)
    merged = merge("magnitude_prune", [each], [1.0], density=density)
    count = int(density * out * into)
    largest = dense(each).abs().flatten().sort(descending=True).values[:count]
    assert torch.equal(merged.abs().flatten().sort(descending=True).values[:count], largest)
    assert int((merged != 0).sum()) <= count


def seeds_of(name: str, each: LowRank, seeds: int, **options: float) -> torch.Tensor:
    return torch.stack([merge(name, [each], [1.0], Draw(seed, "m"), **options) for seed in range(seeds)])


def test_dare_is_unbiased() -> None:
    each, density, seeds = delta(12, 10, 3, 1), 0.3, 300
    expected = dense(each)
    spread = expected.abs() * sqrt((1 - density) / density / seeds)
    mean = seeds_of("dare_linear", each, seeds, density=density).mean(dim=0)
    assert float(((mean - expected) / spread).abs().max()) < 4.5
    assert float(((mean - expected) / spread).square().mean()) == pytest.approx(1.0, abs=0.4)


def test_della_is_unbiased_and_drops_small_values_more_often() -> None:
    each, density, epsilon, seeds = delta(12, 10, 3, 1), 0.5, 0.8, 300
    drawn = seeds_of("della", each, seeds, density=density, epsilon=epsilon)
    expected = dense(each)
    rank = expected.abs().argsort(dim=1, descending=True).argsort(dim=1)  # 0 the largest of its row
    keep = density + epsilon / 2 - epsilon * rank / 10
    spread = expected.abs() * ((1 - keep) / keep / seeds).sqrt()
    assert float(((drawn.mean(dim=0) - expected) / spread).abs().max()) < 4.5
    kept = torch.tensor([float((drawn != 0).double().mean(dim=0)[rank == place].mean()) for place in range(10)])
    assert kept.tolist() == pytest.approx([0.9 - 0.08 * place for place in range(10)], abs=0.04)
    assert bool((kept.diff() < 0).all())


@given(several(), st.integers(0, 99), densities)
def test_della_without_epsilon_is_dare_ties(deltas: list[LowRank], seed: int, density: float) -> None:
    weights = weights_for(deltas, seed)
    assert_same(
        merge("della", deltas, weights, density=density, epsilon=0),
        merge("dare_ties", deltas, weights, density=density),
    )


def test_breadcrumbs_removes_the_outliers_and_the_small_values() -> None:
    values = torch.arange(1.0, 101.0)[torch.randperm(100, generator=torch.Generator().manual_seed(1))].view(10, 10)
    values = values * torch.where(torch.arange(100).view(10, 10) % 2 == 0, 1, -1)
    merged = merge("breadcrumbs", [from_dense(values)], [1.0], density=0.25, gamma=0.05)
    assert sorted(merged[merged != 0].abs().tolist()) == list(range(71, 96))
    assert torch.equal(merged[merged != 0], values.double()[merged != 0])


@given(several(), st.integers(0, 99), densities)
def test_breadcrumbs_that_keeps_its_outliers_is_magnitude_prune(
    deltas: list[LowRank], seed: int, density: float
) -> None:
    weights = weights_for(deltas, seed)
    mine = merge("breadcrumbs", deltas, weights, density=density, gamma=0)
    assert torch.equal(mine, merge("magnitude_prune", deltas, weights, density=density))


RANDOM = {"dare_linear": {}, "dare_ties": {}, "della": {"epsilon": 0.3}}
EACH = {**RANDOM, "ties": {}, "magnitude_prune": {}, "breadcrumbs": {"gamma": 0.1}}


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_seed_gives_the_same_delta_and_another_seed_another(name: str, threads: None) -> None:
    deltas = [delta(300, 200, 4, 1), delta(300, 200, 4, 2)]
    torch.set_num_threads(1)
    alone = merge(name, deltas, [0.5, 0.5], Draw(1, "m"), **RANDOM[name])
    torch.set_num_threads(2)
    assert torch.equal(merge(name, deltas, [0.5, 0.5], Draw(1, "m"), **RANDOM[name]), alone)
    for other in (Draw(2, "m"), Draw(1, "n")):
        assert not torch.equal(merge(name, deltas, [0.5, 0.5], other, **RANDOM[name]), alone)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("size", [1, 100])
def test_it_makes_no_difference_how_the_rows_are_cut(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [whole(37, 23, rank, rank) for rank in (2, 3, 4)]
    at_once = merge(name, deltas, [0.5, -0.25, 2.0], **EACH[name])
    monkeypatch.setattr(blocks, "BLOCK", size)
    assert torch.equal(merge(name, deltas, [0.5, -0.25, 2.0], **EACH[name]), at_once)


def test_della_that_would_never_keep_a_value_is_refused() -> None:
    with pytest.raises(UsageError, match=r"density=0\.04 set epsilon below 0\.08, not 0\.1"):
        merge("della", [delta(4, 4, 1, 1)], [1.0], density=0.04)


def test_breadcrumbs_that_would_keep_more_than_there_is_is_refused() -> None:
    with pytest.raises(UsageError, match=r"set density to 0\.9 at most"):
        merge("breadcrumbs", [delta(4, 4, 1, 1)], [1.0], density=0.95, gamma=0.1)
