"""Whether what a name points at answers worse than what it pointed at before, or than what shares the name with it:
pure decisions over counted answers, and the observer that counts them.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from lorakit.errors import LorakitError
from lorakit.server.following.served import Served
from lorakit.server.requests.answered import Answered, Shadowed
from lorakit.store.catalog import Revision
from lorakit.store.splits import Split

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
        return max(0.0, self._bound(-SURE)) if self.answers else 0.0

    @property
    def at_most(self) -> float:
        """And the share that is at most behind it: the upper bound."""
        return min(1.0, self._bound(SURE)) if self.answers else 1.0

    def _bound(self, deviations: float) -> float:
        n, p, z2 = self.answers, self.share, SURE**2
        return (p + z2 / (2 * n) + deviations * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)


Marked = tuple[int, bool]  # an answer's place in the order of all, and whether it failed


def worse_than(now: Rate, before: Iterable[Rate], rise: float) -> str | None:
    """Why a revision is worse than each of these, by more than `rise`; None when it is not, or nobody can say yet."""
    usual = max((rate.share for rate in before), default=0.0)
    if now.answers < LEAST or now.at_least <= usual + rise:
        return None
    return f"{now.failed} of its last {now.answers} answers failed, {usual:.0%} of those before"


def worse_beside(own: Sequence[Marked], beside: Sequence[Sequence[Marked]], rise: float) -> str | None:
    """Why a revision is worse than those that answer beside it, by more than `rise`, and than chance on either side
    explains; None when it is not, or nobody can say yet. Of each, the last answers, `WINDOW` at most.

    What is compared was answered in the same time, whatever the shares: an engine that fails says it of all. And since
    the last that went well, so that one that was well for long need not fail for long.
    """
    known = max((answers[0][0] for answers in (own, *beside) if len(answers) == WINDOW), default=0)
    streak = [place for place, _ in takewhile(lambda answer: answer[1], reversed(own))]
    for since in (known, max(known, streak[-1] if streak else 0)):
        now = _rate(bad for place, bad in own if place >= since)
        others = _rate(bad for answers in beside for place, bad in answers if place >= since)
        if now.answers >= LEAST and now.at_least > others.at_most + rise:
            return f"{now.failed} of its last {now.answers} answers failed, {others.share:.0%} of the others'"
    return None


def failed(answer: Answered) -> bool | None:
    """Whether an answer speaks against its revision; None when it says nothing of it: what the client did wrong, a
    client that left, or an engine that was busy, or ended."""
    if answer.engine_ended:
        return None
    if answer.status >= 500 and answer.status not in (503, 504):
        return True
    return answer.broke if answer.status < 400 else None


class Guard:
    """Counts answers, and asks `go_back` to move a name away from a revision that is worse than the one before, or than
    those with which it shares a name.

    A name that is not shared is moved only if it follows: where a person put it, it stays.
    """

    def __init__(self, known: Served, go_back: Callable[[Revision, str], Awaitable[None]]) -> None:
        self._known = known
        self._go_back = go_back
        # of each run, what shares a name of it, what its name means, and what that meant before
        self._answers: dict[str, dict[int, deque[Marked]]] = {}
        self._counted = 0
        self._recent: deque[tuple[int | None, bool]] = deque(maxlen=WINDOW)  # of all, the base among them
        self._looking: dict[int, asyncio.Task[None]] = {}

    def observe(self, answer: Answered) -> None:
        """One more answer has ended."""
        bad = failed(answer)
        if bad is None:
            return
        revision = answer.revision
        self._recent.append((revision.id if revision is not None else None, bad))
        if revision is not None:
            self._count(revision, bad)

    def observe_shadow(self, shadowed: Shadowed) -> None:
        """One more answer has ended that was for nobody, and so says nothing of the engine to others."""
        bad = failed(shadowed.answer) if shadowed.answer is not None else None
        if bad is not None:
            self._count(shadowed.revision, bad)

    def _count(self, revision: Revision, bad: bool) -> None:
        if not (self._known.is_followed_to(revision) or self._splits_with(revision)):
            return
        self._counted += 1
        self._answers_of(revision).append((self._counted, bad))
        if bad and revision.id not in self._looking:
            task = self._looking[revision.id] = asyncio.create_task(self._look(revision))
            task.add_done_callback(lambda _: self._looking.pop(revision.id, None))

    async def close(self) -> None:
        tasks = list(self._looking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _splits_with(self, revision: Revision) -> list[Split]:
        """Those that it has a part in."""
        run = self._known.runs.get(revision.run)
        return [split for split in run.splits.values() if revision.id in split.members] if run is not None else []

    def _answers_of(self, revision: Revision) -> deque[Marked]:
        of_run = self._answers.get(revision.run)
        if of_run is None:
            runs = self._known.runs
            self._answers = {name: answers for name, answers in self._answers.items() if name in runs}
            of_run = self._answers[revision.run] = {}
        if revision.id not in of_run:
            run = self._known.runs.get(revision.run)
            shared = {one.id for _, one in run.split_among()} if run is not None else set()
            for older in [id for id in of_run if id not in shared][:-1]:
                del of_run[older]
            of_run[revision.id] = deque(maxlen=WINDOW)
        return of_run[revision.id]

    async def _look(self, revision: Revision) -> None:
        reason = self._reason(revision) or await self._not_finite(revision)
        if reason is None or not await self._known.engine.alive():  # a dying engine fails them all
            return
        splits = self._splits_with(revision)
        try:
            await self._go_back(revision, reason)
        except LorakitError as error:
            self._known.events.tell("failed", f"{revision.run} could not go back from {revision.name}: {error}")
        if splits and not self._splits_with(revision):  # where it is given a share again, it begins anew
            self._answers.get(revision.run, {}).pop(revision.id, None)

    def _reason(self, revision: Revision) -> str | None:
        of_run = self._answers.get(revision.run, {})
        if revision.id not in of_run:
            return None
        own, rise = of_run[revision.id], self._known.settings.max_error_rise
        beside = {id for split in self._splits_with(revision) for id in split.shares} - {revision.id}
        reason = worse_beside(own, [of_run[id] for id in beside & of_run.keys()], rise)
        if reason is not None or not self._known.is_followed_to(revision):
            return reason
        before = [_rate(bad for _, bad in answers) for id, answers in of_run.items() if id != revision.id]
        others = _rate(bad for id, bad in self._recent if id != revision.id)  # an engine that fails says it of all
        return worse_than(_rate(bad for _, bad in own), [*before, others], rise)

    async def _not_finite(self, revision: Revision) -> str | None:
        """What is wrong with its first token by now, if anything is."""
        resident = self._known.residency.use(revision.name)
        if resident is None:
            return None
        try:
            wrong = await resident.engine.try_out(resident.engine_name)
            return wrong if wrong is not None and await resident.engine.alive(now=True) else None
        finally:
            self._known.residency.done(resident)


def _rate(answers: Iterable[bool]) -> Rate:
    counted = list(answers)
    return Rate(sum(counted), len(counted))
