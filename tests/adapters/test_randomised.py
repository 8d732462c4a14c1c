"""Randomised singular values against a full SVD in float64: the optimum that no approximation beats."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.adapters.randomised import Truncated, frobenius_norm, randomised_svd, svd_for_energy, truncated_svd


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other longer than such small products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_spectrum(shape: tuple[int, int], spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix (m, n) with random singular vectors and these singular values."""
    draw = torch.Generator().manual_seed(seed)
    sides = [torch.randn(side, len(spectrum), generator=draw, dtype=torch.float64) for side in shape]
    u, v = (torch.linalg.qr(side)[0] for side in sides)
    return ((u * spectrum) @ v.T).float()


def power_law(count: int, power: float) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -power


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error_of(matrix: torch.Tensor, found: Truncated) -> float:
    exact = matrix.double()
    return float((exact - (found.U * found.S) @ found.Vh).norm() / exact.norm())


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(300, 200), (120, 400)], ids=str)
@pytest.mark.parametrize("rank", [4, 30])
def test_the_error_is_within_half_a_percent_of_the_optimum(shape: tuple[int, int], power: float, rank: int) -> None:
    spectrum = power_law(min(shape), power)
    matrix = with_spectrum(shape, spectrum)
    found = truncated_svd(matrix, rank, generator=generator())
    optimum = sqrt(float(spectrum[rank:].square().sum() / spectrum.square().sum()))
    assert optimum * (1 - 1e-4) <= error_of(matrix, found) <= optimum * 1.005


@settings(max_examples=25)
@given(m=st.integers(1, 90), n=st.integers(1, 90), rank=st.integers(0, 40), seed=st.integers(0, 99))
def test_whatever_the_shape_the_factors_are_orthonormal_and_the_error_is_what_is_said(
    m: int, n: int, rank: int, seed: int
) -> None:
    matrix = torch.randn(m, n, generator=generator(seed))
    found = truncated_svd(matrix, rank, generator=generator(seed))
    k = min(rank, m, n)
    assert (found.U.shape, found.S.shape, found.Vh.shape) == ((m, k), (k,), (k, n))
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(k, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.Vh @ found.Vh.T, torch.eye(k, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.error == pytest.approx(error_of(matrix, found), abs=1e-6)


@pytest.mark.parametrize("tail", [1e-1, 1e-3, 1e-5])
def test_the_error_is_measured_also_where_the_squares_of_the_norms_cancel(tail: float) -> None:
    spectrum = torch.cat([torch.ones(8), torch.full((192,), tail / sqrt(192))]).double()
    matrix = with_spectrum((300, 200), spectrum)
    found = truncated_svd(matrix, 8, generator=generator())
    assert found.error == pytest.approx(error_of(matrix, found), rel=1e-3)
    assert found.error == pytest.approx(tail / sqrt(8), rel=0.02)


def test_fewer_triples_say_their_own_error() -> None:
    matrix = with_spectrum((300, 200), power_law(200, 0.7))
    found = truncated_svd(matrix, 40, generator=generator())
    for rank in (0, 1, 17, 40):
        assert found.first(rank).error == pytest.approx(error_of(matrix, found.first(rank)), rel=1e-5)


def test_a_matrix_of_low_rank_comes_back_exactly_and_no_rank_is_added() -> None:
    matrix = with_spectrum((500, 400), torch.linspace(3, 1, 8, dtype=torch.float64))
    found = truncated_svd(matrix, 32, generator=generator()).above(0.0)
    assert found.rank == 8
    assert error_of(matrix, found) < 1e-6


def test_products_alone_are_enough() -> None:
    left, right = torch.randn(400, 6, generator=generator(1)), torch.randn(6, 300, generator=generator(2))
    u, s, vh = randomised_svd(
        lambda block: left @ (right @ block.float()), lambda block: right.T @ (left.T @ block.float()), (400, 300), 6
    )
    torch.testing.assert_close((u * s) @ vh, (left @ right).double(), atol=1e-4, rtol=0)


def test_the_same_seed_gives_the_same_bits_and_another_the_same_values() -> None:
    matrix = with_spectrum((300, 300), power_law(300, 1.0))
    one, same, other = (truncated_svd(matrix, 10, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.U, same.U)
    assert torch.equal(one.Vh, same.Vh)
    torch.testing.assert_close(one.S, other.S, rtol=1e-5, atol=0)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("power", [0.3, 0.7, 1.5])
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(energy: float, power: float) -> None:
    spectrum = power_law(200, power)
    matrix = with_spectrum((300, 200), spectrum)
    found = svd_for_energy(matrix, energy, generator=generator())
    kept = spectrum.square().cumsum(0) / spectrum.square().sum()
    smallest = int((kept < energy).sum()) + 1
    assert (
        smallest <= found.rank <= smallest + 1 + smallest // 50
    )  # of a flat spectrum, half a percent of error is a rank
    assert 1 - error_of(matrix, found) ** 2 >= energy - 1e-6


def test_an_energy_is_not_chased_below_the_floor_nor_above_the_largest_rank() -> None:
    matrix = with_spectrum((300, 300), torch.cat([torch.full((5,), 3.0), torch.full((295,), 0.1)]).double())
    assert svd_for_energy(matrix, 0.9999, floor=0.2, generator=generator()).rank == 5
    assert svd_for_energy(matrix, 0.9999, max_rank=9, generator=generator()).rank == 9


def test_nothing_has_rank_0_and_no_error() -> None:
    found = svd_for_energy(torch.zeros(50, 40), 0.99)
    assert (found.rank, found.error, found.norm) == (0, 0.0, 0.0)


def test_the_norm_is_summed_in_float64() -> None:
    matrix = torch.full((3000, 700), 0.1)
    assert frobenius_norm(matrix) == pytest.approx(float(matrix[0, 0]) * sqrt(3000 * 700), rel=1e-12)


@pytest.mark.parametrize("spectrum", [1 - torch.arange(400) / 40000, 1 + 0.01 * (torch.arange(400) < 100)], ids=str)
def test_where_iterations_do_not_get_there_the_whole_svd_does(spectrum: torch.Tensor) -> None:
    draw = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(side, 400, generator=draw, dtype=torch.float64))[0] for side in (600, 500))
    matrix = (u * spectrum @ v.T).float()
    found = truncated_svd(matrix, 64, generator=torch.Generator().manual_seed(1), gain=1e-6)
    least = float(torch.linalg.svdvals(matrix.double())[64:].norm())
    error = float((matrix.double() - (found.U * found.S) @ found.Vh).norm())
    assert error == pytest.approx(least, rel=1e-5)
    assert found.rest == pytest.approx(error, rel=1e-5)
