"""On the cores nothing is lost, tasks are kept apart, and it makes no difference how a delta is split into factors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft.utils import merge_utils

from lorakit.mix.methods.cores import joint_cores, reference_cores
from lorakit.mix.methods.registry import LowRank, method_named
from tests.mix.methods.deltas import DRAW, delta, dense, merge, nothing, several, weights_for


def apart(ranks: Sequence[int], out: int = 20, into: int = 15) -> list[LowRank]:
    """Deltas whose columns are orthogonal to one another's, and whose rows are as well."""
    left = torch.linalg.qr(torch.randn(out, sum(ranks), generator=torch.Generator().manual_seed(1)).double())[0]
    right = torch.linalg.qr(torch.randn(into, sum(ranks), generator=torch.Generator().manual_seed(2)).double())[0]
    mixing = [torch.randn(rank, rank, generator=torch.Generator().manual_seed(rank)).double() for rank in ranks]
    parts = zip(left.split(list(ranks), dim=1), mixing, right.split(list(ranks), dim=1), strict=True)
    return [LowRank(b @ m, a.T, 2.0) for b, m, a in parts]


def in_another_gauge(low_rank: LowRank, seed: int) -> LowRank:
    """The same delta of other factors: B Q and Q⁻¹ A."""
    chance = torch.Generator().manual_seed(seed)
    q = torch.eye(low_rank.rank).double() * 3 + torch.randn(low_rank.rank, low_rank.rank, generator=chance).double()
    assume(float(torch.linalg.cond(q)) < 1e3)
    return LowRank(low_rank.B.double() @ q, torch.linalg.solve(q, low_rank.A.double()), low_rank.scale)


def largest_is_positive(columns: torch.Tensor) -> torch.Tensor:
    """An SVD leaves signs open, and in a vote that is a tie they count."""
    return torch.stack([column * column[column.abs().argmax()].sign() for column in columns.T], dim=1)


def tsv_by_the_paper(deltas: Sequence[torch.Tensor], weights: Sequence[float], ranks: Sequence[int]) -> torch.Tensor:
    """On dense deltas, with the ranks it keeps of each."""
    parts = [torch.linalg.svd(each, full_matrices=False) for each in deltas]
    u = torch.cat([part[0][:, :rank] for part, rank in zip(parts, ranks, strict=True)], dim=1)
    v = torch.cat([part[2][:rank].T for part, rank in zip(parts, ranks, strict=True)], dim=1)
    s = torch.cat([weight * part[1][:rank] for part, rank, weight in zip(parts, ranks, weights, strict=True)])
    (p, _, q), (x, _, y) = torch.linalg.svd(u, full_matrices=False), torch.linalg.svd(v, full_matrices=False)
    return (p @ q) @ torch.diag(s) @ (x @ y).T


@given(several())
@pytest.mark.parametrize("bases", [joint_cores, reference_cores])
def test_the_cores_lose_nothing(bases: object, deltas: list[LowRank]) -> None:
    shared = bases(deltas)  # type: ignore[operator]
    for each, core in zip(deltas, shared.cores, strict=True):
        torch.testing.assert_close(shared.U @ core @ shared.V.T, dense(each), rtol=1e-9, atol=1e-9)
    for basis in (shared.U, shared.V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["tsv", "core_tsv"])
def test_tsv_is_the_sum_of_tasks_that_are_orthogonal(name: str) -> None:
    deltas = apart([2, 5, 3])
    torch.testing.assert_close(merge(name, deltas, [0.5, -1.0, 2.0]), merge("linear", deltas, [0.5, -1.0, 2.0]))


@given(several(2, 4, most_rank=3), st.integers(0, 99))
def test_tsv_is_the_papers_formula_on_dense_deltas(deltas: list[LowRank], seed: int) -> None:
    ranks = [each.rank for each in deltas]
    assume(sum(ranks) <= min(deltas[0].shape))
    weights = weights_for(deltas, seed)
    expected = tsv_by_the_paper([dense(each) for each in deltas], weights, ranks)
    torch.testing.assert_close(merge("tsv", deltas, weights), expected, rtol=1e-7, atol=1e-7)


@given(several(2, 4, most_rank=3), st.integers(0, 99))
def test_tsv_leaves_each_task_its_singular_values_on_directions_of_its_own(deltas: list[LowRank], seed: int) -> None:
    """Only then are the merged singular vectors orthonormal."""
    ranks = [each.rank for each in deltas]
    assume(sum(ranks) <= min(deltas[0].shape))
    weights = weights_for(deltas, seed)
    each_its_own = [
        abs(weight) * torch.linalg.svdvals(dense(each))[: each.rank]
        for each, weight in zip(deltas, weights, strict=True)
    ]
    expected = torch.cat(each_its_own).sort(descending=True).values
    found = torch.linalg.svdvals(merge("tsv", deltas, weights))
    torch.testing.assert_close(found[: sum(ranks)], expected, rtol=1e-7, atol=1e-7)
    assert float(found[sum(ranks) :].sum()) < 1e-7


def test_tasks_that_do_not_fit_side_by_side_keep_an_equal_share() -> None:
    deltas = [delta(6, 9, rank, rank) for rank in (2, 5)]
    expected = tsv_by_the_paper([dense(each) for each in deltas], [0.5, 0.5], [2, 3])
    for name in ("tsv", "core_tsv"):
        torch.testing.assert_close(merge(name, deltas, [0.5, 0.5]), expected)


def test_more_tasks_than_the_module_has_directions_keep_one_each() -> None:
    merged = merge("tsv", [delta(2, 3, 2, seed) for seed in range(5)], [1.0] * 5)
    assert merged.isfinite().all()


@given(several(1, 4), st.integers(0, 99))
def test_core_tsv_is_tsv(deltas: list[LowRank], seed: int) -> None:
    weights = weights_for(deltas, seed)
    scale = max(float(dense(each).norm()) for each in deltas)
    torch.testing.assert_close(
        merge("core_tsv", deltas, weights), merge("tsv", deltas, weights), rtol=1e-6, atol=1e-6 * scale
    )


def test_tasks_with_the_same_directions_share_them_and_add_no_others() -> None:
    one = delta(9, 7, 3, 1)
    torch.testing.assert_close(merge("tsv", [one, one], [0.5, 1.0]), 0.75 * dense(one))


@given(several(), st.integers(0, 99))
def test_iso_c_has_a_flat_spectrum_and_the_subspaces_of_the_sum(deltas: list[LowRank], seed: int) -> None:
    weights = weights_for(deltas, seed)
    total = merge("linear", deltas, weights)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    rank = min(sum(each.rank for each in deltas), *total.shape)
    assume(float(s[rank - 1]) > 1e-5 * float(s[0]))
    expected = float(s[:rank].mean()) * u[:, :rank] @ vh[:rank]
    torch.testing.assert_close(merge("iso_c", deltas, weights), expected, rtol=1e-6, atol=1e-6 * float(s[0]))


def test_iso_c_does_not_raise_the_rounding_of_what_cancels() -> None:
    shared, rest = delta(9, 7, 3, 1, 16.0), delta(9, 7, 1, 2)
    both = LowRank(torch.cat([shared.B * 16, rest.B], dim=1), torch.cat([shared.A, rest.A]))
    torch.testing.assert_close(merge("iso_c", [both, shared], [1.0, -1.0]), dense(rest))


@given(several(), st.integers(0, 99), st.floats(0.1, 1.0), st.sampled_from(["total", "frequency"]))
def test_core_ties_is_ties_on_the_cores_in_the_reference_bases(
    deltas: list[LowRank], seed: int, density: float, sign: str
) -> None:
    assume(sum(each.rank for each in deltas) <= min(deltas[0].shape))
    weights = weights_for(deltas, seed)
    parts = [torch.linalg.svd(dense(each), full_matrices=False) for each in deltas]
    lefts = [u[:, : each.rank] * s[: each.rank].sqrt() for (u, s, _), each in zip(parts, deltas, strict=True)]
    rights = [s[: each.rank].sqrt()[:, None] * vh[: each.rank] for (_, s, vh), each in zip(parts, deltas, strict=True)]
    u = largest_is_positive(torch.linalg.svd(torch.cat(lefts, dim=1), full_matrices=False)[0])
    v = largest_is_positive(torch.linalg.svd(torch.cat(rights), full_matrices=False)[2].T)
    cores = [u.T @ dense(each) @ v for each in deltas]
    density = min(density, 1 - 1e-9)  # PEFT warns of 1
    core = merge_utils.ties(cores, torch.tensor(weights, dtype=torch.float64), density, sign)
    merged = merge("core_ties", deltas, weights, density=density, majority_sign=sign)
    scale = max(float(dense(each).norm()) for each in deltas)
    torch.testing.assert_close(merged, u @ core @ v.T, rtol=1e-6, atol=1e-6 * scale)


def test_core_ties_is_the_sum_of_tasks_that_are_orthogonal() -> None:
    """Each has its own part of the core, where none of the others has a say."""
    deltas = apart([2, 5, 3])
    merged = merge("core_ties", deltas, [0.5, -1.0, 2.0], density=1.0)
    torch.testing.assert_close(merged, merge("linear", deltas, [0.5, -1.0, 2.0]))


GAUGE_FREE = ["linear", "slerp", "ties", "tsv", "iso_c", "core_ties", "core_tsv", "knots", "breadcrumbs"]
BY_FREQUENCY = {"majority_sign": "frequency"}  # of two adapters: half of the votes are ties


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in GAUGE_FREE), ("core_ties", BY_FREQUENCY), ("knots", BY_FREQUENCY)],
)
@given(several(2, 2), st.integers(0, 99))
def test_it_makes_no_difference_how_a_delta_is_split_into_factors(
    name: str, options: dict[str, str], deltas: list[LowRank], seed: int
) -> None:
    others = [in_another_gauge(each, seed + index) for index, each in enumerate(deltas)]
    scale = max(float(dense(each).norm()) for each in deltas)
    torch.testing.assert_close(
        merge(name, others, [0.7, 0.4], **options),
        merge(name, deltas, [0.7, 0.4], **options),
        rtol=1e-5,
        atol=1e-5 * scale,
    )


@pytest.mark.parametrize("name", ["tsv", "core_tsv", "iso_c", "core_ties", "knots"])
def test_nothing_comes_of_adapters_that_change_nothing(name: str) -> None:
    untrained = LowRank(torch.zeros(9, 2), torch.randn(2, 7, generator=torch.Generator().manual_seed(1)))
    merged = merge(name, [untrained, untrained], [0.5, 0.5])
    assert torch.equal(merged, torch.zeros(9, 7, dtype=torch.float64))


@pytest.mark.parametrize("name", ["tsv", "core_tsv", "iso_c", "core_ties", "knots"])
def test_an_untrained_adapter_does_not_disturb_the_others(name: str) -> None:
    one, two = delta(9, 7, 2, 1), delta(9, 7, 2, 2)
    untrained = LowRank(torch.zeros(9, 2), torch.randn(2, 7, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(
        merge(name, [one, untrained, two], [0.5, 0.5, 0.5]), merge(name, [one, nothing(one), two], [0.5, 0.5, 0.5])
    )
    torch.testing.assert_close(merge(name, [one, untrained, two], [0.5, 0.5, 0.5]), merge(name, [one, two], [0.5, 0.5]))


def test_the_rank_is_that_of_the_common_bases() -> None:
    deltas = [delta(40, 30, rank, rank) for rank in (2, 3)]
    for name in ("tsv", "core_tsv", "iso_c"):
        assert method_named(name).function(deltas, [0.5, 0.5], draw=DRAW).rank == 5
