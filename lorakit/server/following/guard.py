"""Whether what a name points at answers worse than what it pointed at before: a pure decision over counted answers, and
the observer that counts them.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from lorakit.errors import LorakitError
from lorakit.server.following.served import Served
from lorakit.server.requests.answered import Answered
from lorakit.store.catalog import Revision

WINDOW = 200  # answers that are remembered of each revision
LEAST = 5  # answers below which nothing is decided by their number
SURE = 1.96  # standard deviations: 97.5%


@dataclass(frozen=True, slots=True)
class Rate:
    """How many of so many answers failed."""

    failed: int = 0
    answers: int = 0

    @property
    def share(self) -> float:
        return self.failed / self.answers if self.answers else 0.0

    @property
    def at_least(self) -> float:
        """The share that is at least behind it, with 97.5% certainty: the lower bound of Wilson's interval."""
        if not self.answers:
            return 0.0
        n, p, z2 = self.answers, self.share, SURE**2
        spread = SURE * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return max(0.0, (p + z2 / (2 * n) - spread) / (1 + z2 / n))


def worse_than(now: Rate, before: Iterable[Rate], rise: float) -> str | None:
    """Why a revision is worse than each of these, by more than `rise`; None when it is not, or nobody can say yet."""
    usual = max((rate.share for rate in before), default=0.0)
    if now.answers < LEAST or now.at_least <= usual + rise:
        return None
    return f"{now.failed} of its last {now.answers} answers failed, {usual:.0%} of those before"


def failed(answer: Answered) -> bool | None:
    """Whether an answer speaks against its revision; None when it says nothing of it: what the client did wrong, a
    client that left, or an engine that was busy."""
    if answer.status >= 500 and answer.status not in (503, 504):
        return True
    return answer.broke if answer.status < 400 else None


class Guard:
    """Counts answers, and asks `go_back` to move a name away from a revision that is worse than the one before.

    Only a name that follows is moved: where a person put it, it stays.
    """

    def __init__(self, known: Served, go_back: Callable[[Revision, str], Awaitable[None]]) -> None:
        self._known = known
        self._go_back = go_back
        self._answers: dict[str, dict[int, deque[bool]]] = {}  # of each run, what its name means, and meant before
        self._recent: deque[tuple[int | None, bool]] = deque(maxlen=WINDOW)  # of all, the base among them
        self._looking: dict[int, asyncio.Task[None]] = {}

    def observe(self, answer: Answered) -> None:
        """One more answer has ended."""
        bad = failed(answer)
        if bad is None:
            return
        revision = answer.revision
        self._recent.append((revision.id if revision is not None else None, bad))
        if revision is None or not self._is_guarded(revision):
            return
        self._answers_of(revision).append(bad)
        if bad and revision.id not in self._looking:
            task = self._looking[revision.id] = asyncio.create_task(self._look(revision))
            task.add_done_callback(lambda _: self._looking.pop(revision.id, None))

    async def close(self) -> None:
        tasks = list(self._looking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_guarded(self, revision: Revision) -> bool:
        """Whether a name follows to it."""
        run = self._known.runs.get(revision.run)
        follows = run is not None and not run.pinned and self._known.settings.follow != "manual"
        return follows and run is not None and run.aliases.get("") == revision.id

    def _answers_of(self, revision: Revision) -> deque[bool]:
        of_run = self._answers.get(revision.run)
        if of_run is None:
            runs = self._known.runs
            self._answers = {name: answers for name, answers in self._answers.items() if name in runs}
            of_run = self._answers[revision.run] = {}
        if revision.id not in of_run:
            for older in list(of_run)[:-1]:
                del of_run[older]
            of_run[revision.id] = deque(maxlen=WINDOW)
        return of_run[revision.id]

    async def _look(self, revision: Revision) -> None:
        reason = self._reason(revision) or await self._not_finite(revision)
        if reason is None or not await self._known.engine.alive():  # a dying engine fails them all
            return
        try:
            await self._go_back(revision, reason)
        except LorakitError as error:
            self._known.events.tell("failed", f"{revision.run} could not go back from {revision.name}: {error}")

    def _reason(self, revision: Revision) -> str | None:
        of_run = self._answers.get(revision.run, {})
        if revision.id not in of_run:
            return None
        before = [answers for id, answers in of_run.items() if id != revision.id]
        others = [bad for id, bad in self._recent if id != revision.id]  # an engine that fails says it of all
        rates = [_rate(answers) for answers in (*before, others)]
        return worse_than(_rate(of_run[revision.id]), rates, self._known.settings.max_error_rise)

    async def _not_finite(self, revision: Revision) -> str | None:
        """What is wrong with its first token by now, if anything is."""
        resident = self._known.residency.use(revision.name)
        if resident is None:
            return None
        try:
            return await self._known.engine.try_out(resident.engine_name)
        finally:
            self._known.residency.done(resident)


def _rate(answers: Iterable[bool]) -> Rate:
    counted = list(answers)
    return Rate(sum(counted), len(counted))
