"""KnOTS is TIES on the right factors of one SVD of all deltas side by side."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft.utils import merge_utils

from lorakit.mix.methods.registry import LowRank, method_named
from tests.mix.methods.deltas import DRAW, delta, dense, merge, several, weights_for


@given(several(1, 3), st.integers(0, 99), st.floats(0.1, 0.99), st.sampled_from(["total", "frequency"]))
def test_it_is_the_papers_formula_on_the_concatenated_dense_deltas(
    deltas: list[LowRank], seed: int, density: float, sign: str
) -> None:
    out, into = deltas[0].shape
    rank = sum(each.rank for each in deltas)
    assume(rank <= min(out, into))
    weights = weights_for(deltas, seed)
    u, s, vh = torch.linalg.svd(torch.cat([dense(each) for each in deltas], dim=1), full_matrices=False)
    # an SVD leaves signs open, and in a vote that is a tie they count
    signs = torch.stack([row[row.abs().argmax()].sign() for row in vh])
    u, vh = u * signs, vh * signs[:, None]
    rights = list(vh[:rank].split(into, dim=1))
    merged = merge_utils.ties(rights, torch.tensor(weights, dtype=torch.float64), density, sign)
    expected = u[:, :rank] * s[:rank] @ merged
    found = merge("knots", deltas, weights, density=density, majority_sign=sign)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(s[0]))


@given(several(1, 1))
def test_a_single_adapter_at_full_density_is_itself(deltas: list[LowRank]) -> None:
    torch.testing.assert_close(merge("knots", deltas, [1.0], density=1.0), dense(deltas[0]), rtol=1e-9, atol=1e-9)


def test_adapters_that_do_not_meet_are_summed() -> None:
    """Where one adapter has a value and the others have none, it is all of the mean."""
    one, two = delta(12, 10, 2, 1), delta(12, 10, 3, 2)
    one.A[:, 5:] = 0
    two.A[:, :5] = 0
    merged = merge("knots", [one, two], [0.5, 2.0], density=1.0)
    torch.testing.assert_close(merged, 0.5 * dense(one) + 2.0 * dense(two))


def test_no_dense_matrix_is_formed() -> None:
    """These would be of 640 GB."""
    wide = [LowRank(torch.ones(200_000, 1), torch.ones(1, 400_000)) for _ in range(2)]
    merged = method_named("knots").function(wide, [0.5, 0.5], draw=DRAW, density=1.0, majority_sign="total")
    torch.testing.assert_close(float(merged.B[0] @ merged.A[:, 0]), 0.5)
