"""Who asks for what and when: the same for every rule that is compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RANKS = (8, 16, 32, 64, 128)
SHARES = (0.25, 0.40, 0.20, 0.10, 0.05)  # of the adapters
PROMPT, ANSWER = 512.0, 128.0  # tokens, at the mean
SPREAD = 0.8  # of their logarithms


@dataclass(frozen=True, slots=True)
class Shape:
    """`exponent`: the n-th adapter has a share of n to the minus that; `runs` of the adapters are training, and give a
    checkpoint every `every` seconds."""

    adapters: int = 10_000
    exponent: float = 1.0
    runs: int = 200
    every: float = 60.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order in which they come: seconds, adapters by number, tokens. `checkpoints`: seconds and the
    number of the run."""

    times: np.ndarray
    adapters: np.ndarray
    prompts: np.ndarray
    answers: np.ndarray
    ranks: tuple[int, ...]  # of each adapter
    checkpoints: tuple[tuple[float, int], ...]

    def shares(self) -> dict[int, float]:
        """Of the requests, by rank."""
        asked = np.array(self.ranks)[self.adapters]
        return {rank: float((asked == rank).mean()) for rank in RANKS}


def made(shape: Shape, count: int, rate: float, seed: int) -> Traffic:
    """So many requests, `rate` a second, at random moments."""
    chance = np.random.default_rng(seed)
    weights = np.arange(1, shape.adapters + 1) ** -shape.exponent
    cumulative = np.cumsum(weights) / weights.sum()
    adapters = np.minimum(np.searchsorted(cumulative, chance.random(count)), shape.adapters - 1)
    times = np.cumsum(chance.exponential(1 / rate, count))
    runs = chance.choice(shape.adapters, shape.runs, replace=False)
    phases = chance.random(shape.runs) * shape.every
    checkpoints = sorted(
        (float(moment), int(run))
        for run, phase in zip(runs, phases, strict=True)
        for moment in np.arange(phase, times[-1], shape.every)
    )
    return Traffic(
        times, adapters, _lengths(chance, PROMPT, count), _lengths(chance, ANSWER, count),
        _ranks(shape), tuple(checkpoints),
    )  # fmt: skip


def _ranks(shape: Shape) -> tuple[int, ...]:
    """So that each rank has its share of the adapters among the hot and among the cold: by the golden ratio."""
    places = (np.arange(shape.adapters) * 0.6180339887498949 + 0.3) % 1
    return tuple(RANKS[int(found)] for found in np.searchsorted(np.cumsum(SHARES), places, side="right").clip(max=4))


def _lengths(chance: np.random.Generator, mean: float, count: int) -> np.ndarray:
    return np.maximum(1, chance.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, count)).astype(np.int64)
