"""Chance depends on the seed, the module and the adapter, and on nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.mix.methods.low_rank import Draw, LowRank, kept_at_random


def first_values(draw: Draw, adapter: int = 0) -> list[float]:
    return torch.rand(8, generator=draw.generator(adapter)).tolist()


def test_the_same_draw_gives_the_same_values_again() -> None:
    assert first_values(Draw(3, "q_proj")) == first_values(Draw(3, "q_proj"))


def test_seed_module_and_adapter_each_make_another_stream() -> None:
    streams = [
        first_values(draw, adapter)
        for draw in (Draw(3, "q_proj"), Draw(4, "q_proj"), Draw(3, "k_proj"))
        for adapter in (0, 1)
    ]
    assert len({tuple(stream) for stream in streams}) == len(streams)


def test_a_seed_and_a_name_that_end_and_begin_alike_are_not_mistaken_for_one_another() -> None:
    assert first_values(Draw(1, "2.q_proj")) != first_values(Draw(12, ".q_proj"))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    first_values(Draw(3, "q_proj"))
    assert torch.equal(torch.rand(4), expected)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=6), st.integers(1, 9))
def test_rows_drawn_apart_are_the_rows_drawn_at_once(rows: list[int], columns: int) -> None:
    cpu = torch.device("cpu")
    at_once = kept_at_random((sum(rows), columns), 0.5, Draw(1, "m").generator(0), cpu)
    generator = Draw(1, "m").generator(0)
    apart = torch.cat([kept_at_random((count, columns), 0.5, generator, cpu) for count in rows])
    assert torch.equal(apart, at_once)


def test_a_delta_knows_its_shape_and_rank() -> None:
    low_rank = LowRank(torch.ones(5, 2, dtype=torch.bfloat16), torch.ones(2, 7, dtype=torch.bfloat16), 0.5)
    assert (low_rank.shape, low_rank.rank) == ((5, 7), 2)
    assert torch.equal(low_rank.left() @ low_rank.right(), torch.ones(5, 7, dtype=torch.float64))
