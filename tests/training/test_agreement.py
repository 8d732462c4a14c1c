"""When to look: by steps and by seconds, at the same step on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import UsageError
from lorakit.training import agreement
from lorakit.training.agreement import Agreement


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def looks(every_steps: int, every_seconds: float, durations: Sequence[float], *, alone: bool = True) -> list[int]:
    """The steps, of such durations, at whose ends it looks."""
    clock = Clock()
    agreed = Agreement(every_steps, every_seconds, clock=clock)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        if not alone:  # what it decides by; the collective itself is tested with real ranks
            patch.setattr(Agreement, "is_due", lambda self, step: step - self._looked_at >= self._pause)
        for step, seconds in enumerate(durations, 1):
            clock.now += seconds
            if agreed.is_due(step):
                agreed.agreed(0, step, "cpu")
                found.append(step)
    return found


def test_it_looks_at_the_first_step_and_at_each_that_takes_long() -> None:
    assert looks(100, 1.0, [5.0] * 6) == [1, 2, 3, 4, 5, 6]


def test_fast_steps_are_looked_at_once_a_second() -> None:
    found = looks(1000, 1.0, [0.01] * 2000)
    assert found[0] == 1
    gaps = [later - earlier for earlier, later in pairwise(found[8:])]
    assert set(gaps) <= {99, 100, 101}


def test_however_fast_it_looks_once_in_so_many_steps() -> None:
    found = looks(10, 60.0, [0.001] * 500)
    assert max(later - earlier for earlier, later in pairwise(found)) == 10


def test_steps_that_become_slow_are_looked_at_each_after_one_pause_at_most() -> None:
    durations = [0.01] * 300 + [10.0] * 150
    found = [step for step in looks(100, 1.0, durations, alone=False) if step > 300]
    assert found[0] <= 400
    assert found[1:] == list(range(found[0] + 1, 451))
    assert [step for step in looks(100, 1.0, durations) if step > 300] == list(range(301, 451)), "alone, at once"


@given(
    durations=st.lists(st.integers(0, 100), min_size=1, max_size=60),
    every_steps=st.integers(1, 20), every_seconds=st.integers(0, 50),
)  # fmt: skip
def test_it_never_waits_longer_than_it_was_told(durations: list[int], every_steps: int, every_seconds: int) -> None:
    """Whole seconds, as sums of others depend on the order."""
    found = [0, *looks(every_steps, every_seconds, durations)]
    assert all(later - earlier <= every_steps for earlier, later in pairwise(found))
    assert len(durations) - found[-1] < every_steps
    waited = sum(durations[found[-1] :])
    assert waited < every_seconds or found[-1] == len(durations)


@pytest.mark.parametrize(("steps", "seconds"), [(0, 1.0), (1, -1.0), (1, float("nan"))])
def test_what_makes_no_sense_is_refused(steps: int, seconds: float) -> None:
    with pytest.raises(UsageError):
        Agreement(steps, seconds)


def test_alone_there_is_nobody_to_wait_for() -> None:
    assert not agreement.several_ranks()
    agreement.all_ranks_are_here()
