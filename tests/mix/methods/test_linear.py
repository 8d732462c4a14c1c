"""The weighted sum is exact; slerp goes along the arc between two deltas."""

from __future__ import annotations

from math import asin, cos, pi, sin

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lorakit.errors import UsageError
from lorakit.mix.methods.registry import LowRank
from tests.mix.methods.deltas import delta, dense, merge, nothing, several, weights_for


def angle(one: torch.Tensor, two: torch.Tensor) -> float:
    return 2 * asin(min(1.0, float((one / one.norm() - two / two.norm()).norm()) / 2))


def of_norm(low_rank: LowRank, norm: float) -> LowRank:
    return LowRank(low_rank.B, low_rank.A, norm / float((low_rank.B.double() @ low_rank.A.double()).norm()))


@given(several(), st.integers(0, 99))
def test_linear_is_the_float64_sum(deltas: list[LowRank], seed: int) -> None:
    weights = weights_for(deltas, seed)
    expected = sum(weight * dense(each) for each, weight in zip(deltas, weights, strict=True))
    torch.testing.assert_close(merge("linear", deltas, weights), expected, rtol=1e-12, atol=1e-12)


def test_factors_in_sixteen_bits_are_summed_in_float64() -> None:
    deltas = [LowRank(each.B.bfloat16(), each.A.half()) for each in (delta(9, 7, 3, 1), delta(9, 7, 2, 2))]
    expected = 0.7 * dense(deltas[0]) - 0.1 * dense(deltas[1])
    torch.testing.assert_close(merge("linear", deltas, [0.7, -0.1]), expected, rtol=1e-14, atol=1e-14)


@given(several(2, 2), st.floats(0.01, 1.0))
def test_slerp_keeps_the_norm_and_goes_evenly_along_the_great_circle(deltas: list[LowRank], t: float) -> None:
    one, two = (of_norm(each, 1.0) for each in deltas)
    between = angle(dense(one), dense(two))
    assume(0.1 < between < pi - 0.1)
    merged = merge("slerp", [one, two], [1 - t, t])
    assert float(merged.norm()) == pytest.approx(1.0)
    along = torch.stack([dense(one).flatten(), dense(two).flatten()], dim=1)
    off_the_plane = merged.flatten() - along @ torch.linalg.lstsq(along, merged.flatten()[:, None]).solution[:, 0]
    assert float(off_the_plane.norm()) < 1e-9
    assert angle(dense(one), merged) == pytest.approx(t * between, abs=1e-6)
    assert angle(merged, dense(two)) == pytest.approx((1 - t) * between, abs=1e-6)


@pytest.mark.parametrize(("weights", "which"), [((1.0, 0.0), 0), ((0.0, 3.0), 1)])
def test_slerp_ends_at_the_adapters_themselves(weights: tuple[float, float], which: int) -> None:
    deltas = [delta(9, 7, 3, 1, 2.0), delta(9, 7, 2, 2)]
    torch.testing.assert_close(merge("slerp", deltas, weights), dense(deltas[which]))


def test_only_the_ratio_of_the_weights_counts_in_slerp() -> None:
    deltas = [delta(9, 7, 3, 1), delta(9, 7, 2, 2)]
    torch.testing.assert_close(merge("slerp", deltas, [1, 3]), merge("slerp", deltas, [0.25, 0.75]))


def test_a_negative_weight_goes_on_along_the_arc() -> None:
    deltas = [
        LowRank(torch.tensor([[1.0], [0.0]]), torch.ones(1, 1)),
        LowRank(torch.tensor([[0.0], [1.0]]), torch.ones(1, 1)),
    ]
    expected = torch.tensor([[cos(-pi / 4)], [sin(-pi / 4)]], dtype=torch.float64)
    torch.testing.assert_close(merge("slerp", deltas, [1.5, -0.5]), expected)


@pytest.mark.parametrize("second", ["the same", "its opposite", "none"])
def test_where_there_is_no_one_arc_slerp_is_the_weighted_mean(second: str) -> None:
    one = delta(9, 7, 3, 1)
    two = {"the same": LowRank(one.B, one.A, 1.001), "its opposite": LowRank(-one.B, one.A), "none": nothing(one)}[
        second
    ]
    merged = merge("slerp", [one, two], [3.0, 1.0])
    torch.testing.assert_close(merged, 0.75 * dense(one) + 0.25 * dense(two))


@pytest.mark.parametrize("count", [1, 3])
def test_slerp_of_other_than_two_adapters_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"there are {count}: name two"):
        merge("slerp", [delta(4, 4, 1, index) for index in range(count)], [1.0] * count)


def test_slerp_of_weights_that_cancel_is_refused() -> None:
    with pytest.raises(UsageError, match="sum is not zero, but they are 1 and -1"):
        merge("slerp", [delta(4, 4, 1, 1), delta(4, 4, 1, 2)], [1.0, -1.0])
