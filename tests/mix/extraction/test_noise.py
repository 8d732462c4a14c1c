"""The floor lies above what rounding alone gives, and below what was learnt."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.mix.extraction.noise import RoundingNoise, narrowest, unit_variance

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine threads wait for each other longer than such small products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def change(shape: tuple[int, int], rank: int, share: float, like: torch.Tensor) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    left, right = (torch.randn(side, rank, generator=draw, dtype=torch.float64) for side in shape)
    delta = left @ right.T
    return delta * (share * like.norm() / delta.norm())


def floor_and_spectrum(base: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    tuned = (base + delta).to(dtype)
    observed = tuned.double() - base
    noise = RoundingNoise((base.shape[0], base.shape[1]))
    for first in range(0, len(base), 100):
        noise.add(tuned[first : first + 100], observed[first : first + 100], first)
    return noise.floor(), torch.linalg.svdvals(observed)


@given(bits=st.integers(0, 2**16 - 1))
def test_the_unit_is_the_distance_to_the_next_value_of_16_bits(bits: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        both = (
            torch.tensor([bits & 0x7FFF, (bits & 0x7FFF) + 1], dtype=torch.int32).to(torch.int16).view(dtype).double()
        )
        if float(both[0]) < 1e15 and both.isfinite().all():  # squares of larger ones are infinite in float32
            unit = float(both[1] - both[0])
            # squares below 1e-38 are 0 in float32
            assert float(unit_variance(both[:1].to(dtype))[0]) == pytest.approx(unit**2 / 12, rel=1e-6, abs=1e-37)


def test_the_unit_of_float32_is_numpys_spacing() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype("float32")
    expected = np.spacing(np.abs(values)).astype("float64") ** 2 / 12
    np.testing.assert_allclose(unit_variance(torch.from_numpy(values)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 256), (150, 400), (400, 120)], ids=str)
@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_planted_rank_is_told_from_the_noise(shape: tuple[int, int], dtype: str, share: float) -> None:
    base = weights(shape).to(DTYPES[dtype]).double()
    floor, spectrum = floor_and_spectrum(base, change(shape, 8, share, base), DTYPES[dtype])
    assert int((spectrum > floor).sum()) == 8


@pytest.mark.parametrize("share", [0.0005, 0.001, 0.003])
def test_a_change_below_one_unit_is_told_too_where_it_moved_elements_at_all(share: float) -> None:
    base = weights((500, 500)).bfloat16().double()
    delta = change((500, 500), 8, share, base)
    floor, spectrum = floor_and_spectrum(base, delta, torch.bfloat16)
    assert int((spectrum > floor).sum()) == 8


def test_noise_alone_is_below_the_floor() -> None:
    base = weights((400, 300))  # not on the grid of bf16: the tuned weight is the base, rounded
    floor, spectrum = floor_and_spectrum(base, torch.zeros_like(base), torch.bfloat16)
    assert float(spectrum[0]) < floor < 1.4 * float(spectrum[0])


def test_rows_of_different_size_raise_the_floor_with_their_noise() -> None:
    sizes = torch.exp(0.3 * torch.randn(400, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    base = (weights((400, 400)) * sizes).bfloat16().double()
    floor, spectrum = floor_and_spectrum(base, change((400, 400), 8, 0.03, base), torch.bfloat16)
    assert int((spectrum > floor).sum()) == 8


def test_rows_that_did_not_change_bring_no_noise() -> None:
    base = weights((400, 400)).bfloat16().double()
    delta = torch.zeros_like(base)
    delta[:3] = weights((3, 400), seed=5)
    floor, spectrum = floor_and_spectrum(base, delta, torch.bfloat16)
    assert int((spectrum > floor).sum()) == 3
    assert floor_and_spectrum(base, torch.zeros_like(base), torch.bfloat16)[0] == 0.0


def test_values_of_16_bits_that_are_stored_in_32_are_known_by_themselves() -> None:
    values = weights((50, 40)).float()
    assert narrowest(values) is torch.float32
    assert narrowest(values.bfloat16().float()) is torch.bfloat16
    assert narrowest(values.half().float()) is torch.float16
    assert narrowest(values.half()) is torch.float16
