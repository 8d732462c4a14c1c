"""The `lorax:` methods give what LoRAX made of a request: its formulas in float64, written out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from lorakit.errors import UsageError
from lorakit.mix.methods.registry import Draw, LowRank, checked_options, method_named
from tests.mix.methods.deltas import delta, dense

Matrix = npt.NDArray[np.float64]
WEIGHTS = [(0.7, 0.3, 0.5), (2.0,), (1.0, -0.5)]


def merged(name: str, deltas: Sequence[LowRank], weights: Sequence[float], **options: object) -> LowRank:
    method = method_named(name)
    made = method.merged(deltas, weights, module="q_proj", options=checked_options(method, options))
    assert isinstance(made, LowRank)
    return made


def several(count: int) -> list[LowRank]:
    """Of one rank, each with another scale."""
    return [LowRank(each.B, each.A, 0.5 + seed) for seed in range(count) for each in (delta(9, 7, 4, seed),)]


def factors(deltas: Sequence[LowRank]) -> tuple[list[Matrix], list[Matrix]]:
    return [each.B.double().numpy() for each in deltas], [each.A.double().numpy() for each in deltas]


def largest(values: Matrix, density: float) -> Matrix:
    kept = np.argsort(-np.abs(values).ravel(), kind="stable")[: int(density * values.size)]
    mask = np.zeros(values.size)
    mask[kept] = 1
    return values * mask.reshape(values.shape)


def elected(values: list[Matrix], weights: Sequence[float], sign: str) -> Matrix:
    stack = np.stack(values)
    votes = (stack if sign == "total" else np.sign(stack)).sum(axis=0)
    agree = np.sign(stack) == np.where(votes >= 0, 1, -1)
    return (stack * np.asarray(weights)[:, None, None] * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_linear_has_the_whole_weight_on_both_factors(weights: tuple[float, ...]) -> None:
    deltas = several(len(weights))
    lefts, rights = factors(deltas)
    expected = sum(w * b for w, b in zip(weights, lefts, strict=True)) @ sum(
        w * a for w, a in zip(weights, rights, strict=True)
    )
    np.testing.assert_allclose(dense(merged("lorax:linear", deltas, weights)).numpy(), 0.5 * expected, rtol=1e-5)


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_ties_elects_on_each_factor(weights: tuple[float, ...], sign: str) -> None:
    deltas = several(len(weights))
    left, right = (elected([largest(each, 0.5) for each in side], weights, sign) for side in factors(deltas))
    made = merged("lorax:ties", deltas, weights, density=0.5, majority_sign=sign)
    np.testing.assert_allclose(dense(made).numpy(), 0.5 * (left @ right), rtol=1e-5, atol=1e-7)


def test_dare_drops_and_makes_up_for_nothing() -> None:
    (one,) = several(1)
    made = merged("lorax:dare_linear", [one], [1.0], density=0.5, seed=3)
    for mine, given in ((made.A.double(), one.A.double()), (made.B.double() / one.scale, one.B.double())):
        kept = mine != 0
        assert 0 < kept.double().mean() < 1
        assert bool((mine[kept] == given[kept]).all())
    again = merged("lorax:dare_linear", [one], [1.0], density=0.5, seed=3)
    assert bool((again.A == made.A).all())


def test_dare_ties_that_drops_nothing_is_ties_that_drops_nothing() -> None:
    deltas = several(2)
    one, other = (merged(name, deltas, [0.7, 0.3], density=1.0) for name in ("lorax:ties", "lorax:dare_ties"))
    assert bool((dense(one) == dense(other)).all())


def test_other_ranks_are_refused_with_what_takes_them() -> None:
    with pytest.raises(UsageError, match=r"lorax:ties needs adapters of the same rank.*take 'ties'"):
        merged("lorax:ties", [delta(9, 7, 4, 1), delta(9, 7, 5, 2)], [0.5, 0.5])


def test_chance_is_the_draws() -> None:
    deltas = several(2)
    one, other = (
        method_named("lorax:dare_ties").function(
            deltas, [0.5, 0.5], draw=Draw(seed, "q_proj"), density=0.5, majority_sign="total"
        )
        for seed in (1, 2)
    )
    assert not bool((one.A == other.A).all())
