"""When a trainer looks for requests and signals, and what all of its ranks make of what they see.

Ranks have clocks of their own, and a collective that only some of them enter hangs: so they agree, each time they look,
at which step they look next. One all-reduce of two numbers does both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lorakit.errors import UsageError


class Agreement:
    """Looks at the ends of steps: once in `every_steps` at least, and about once in `every_seconds`.

    Raises:
        UsageError: a number is below what makes sense.
    """

    def __init__(self, every_steps: int, every_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        if every_steps < 1 or not every_seconds >= 0:
            raise UsageError(
                f"every_steps={every_steps}, every_seconds={every_seconds}: give a whole number above 0, and seconds"
            )
        self._every_steps = every_steps
        self._every_seconds = every_seconds
        self._clock = clock
        self.start(0)

    def start(self, step: int) -> None:
        """Training begins at this step: the first look is at the end of the next."""
        self._looked_at = step
        self._looked = self._clock()
        self._pause = 1  # steps

    def is_due(self, step: int) -> bool:
        """The same on every rank, at the end of the same step."""
        if step - self._looked_at >= self._pause:
            return True
        return not several_ranks() and self._clock() - self._looked >= self._every_seconds

    def agreed(self, wish: int, step: int, device: Any) -> int:
        """The largest wish of any rank. Every rank has to call it at the same step."""
        pause = self._next_pause(step)
        if several_ranks():
            import torch

            both = torch.tensor([wish, -pause], dtype=torch.int64, device=device)
            torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
            wish, pause = (int(number) for number in both.tolist())
            pause = -pause
        self._looked_at, self._looked, self._pause = step, self._clock(), pause
        return wish

    def _next_pause(self, step: int) -> int:
        """Steps that take about `every_seconds`, going by those since the last look; at most twice as many as those,
        so that a few fast steps promise nothing of many.
        """
        steps = step - self._looked_at
        if steps < 1:
            return self._pause
        seconds = (self._clock() - self._looked) / steps
        wanted = self._every_steps if seconds <= 0 else int(min(self._every_seconds / seconds, self._every_steps))
        return max(1, min(wanted, 2 * self._pause, self._every_steps))


def several_ranks() -> bool:
    """Whether other processes train the same model, and have to do what this one does."""
    import torch

    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def all_ranks_are_here() -> None:
    """Wait until every rank is: what each of them writes into a checkpoint is there then."""
    if several_ranks():
        import torch

        torch.distributed.barrier()
