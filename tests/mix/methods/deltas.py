"""Small deltas for the methods, and how an oracle sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from hypothesis import strategies as st

from lorakit.mix.methods.registry import Draw, LowRank, checked_options, method_named

DRAW = Draw(7, "layers.0.q_proj")


def delta(out: int, into: int, rank: int, seed: int, scale: float = 1.0) -> LowRank:
    chance = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=chance), torch.randn(rank, into, generator=chance), scale)


def whole(out: int, into: int, rank: int, seed: int) -> LowRank:
    """Of small whole numbers: exact in any arithmetic, and with many values that are equal."""
    chance = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randint(-2, 3, (out, rank), generator=chance).float(),
        torch.randint(-2, 3, (rank, into), generator=chance).float(),
    )


def from_dense(matrix: torch.Tensor) -> LowRank:
    return LowRank(matrix.double(), torch.eye(matrix.shape[1], dtype=torch.float64))


def nothing(like: LowRank) -> LowRank:
    """An adapter that leaves the module alone."""
    out, into = like.B.shape[0], like.A.shape[1]
    return LowRank(torch.zeros(out, 0), torch.zeros(0, into))


def dense(low_rank: LowRank) -> torch.Tensor:
    return low_rank.scale * (low_rank.B.double() @ low_rank.A.double())


def merge(name: str, deltas: Sequence[LowRank], weights: Sequence[float], draw: Draw = DRAW, **options: Any) -> Any:
    """What the method gives, as a dense float64 matrix."""
    method = method_named(name)
    chosen = checked_options(method, options)
    chosen.pop("seed", None)
    merged = method.function(deltas, weights, draw=draw, **chosen)
    if method.gives == "dense":
        assert merged.dtype == torch.float32
        return merged.double()
    assert merged.scale == 1
    assert merged.B.dtype == merged.A.dtype
    assert merged.A.dtype in (torch.float32, torch.float64)
    return dense(merged)


@st.composite
def several(draw: st.DrawFn, smallest: int = 1, largest: int = 4, most_rank: int = 6) -> list[LowRank]:
    """Deltas of one shape; ranks and scales differ."""
    out, into = draw(st.integers(3, 24)), draw(st.integers(3, 24))
    ranks = draw(st.lists(st.integers(1, most_rank), min_size=smallest, max_size=largest))
    seed = draw(st.integers(0, 2**20))
    return [
        delta(out, into, rank, seed + index, draw(st.sampled_from([0.25, 1.0, 2.0, 16.0])))
        for index, rank in enumerate(ranks)
    ]


def weights_for(deltas: Sequence[LowRank], seed: int) -> list[float]:
    chance = torch.Generator().manual_seed(seed)
    return [round(float(value), 3) for value in torch.randn(len(deltas), generator=chance)]


def bernoulli_from(generators: Sequence[torch.Generator]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Stands for `torch.bernoulli` in PEFT: adapters take turns, each with a stream of its own."""
    turns: Iterator[torch.Generator] = cycle(generators)
    return lambda share: (torch.rand(share.shape, generator=next(turns)) < share).to(share.dtype)
