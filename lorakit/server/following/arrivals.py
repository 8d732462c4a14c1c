"""What appears in the watched folders: looked at, taken into the store when it is finished, and why not until then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from lorakit.checkpoints.runs import Candidate
from lorakit.errors import Incomplete, LorakitError, Refused
from lorakit.merge.base import BaseModel
from lorakit.server.file_work import file_work
from lorakit.server.following.changes import Changes
from lorakit.server.following.intake import take_in, why_never_served
from lorakit.server.following.served import Served, Waiting, about
from lorakit.server.following.watcher import GLANCES, Place, Sight, Watcher
from lorakit.store.catalog import Revision, Run
from lorakit.store.names import check_name


class Arrivals:
    """Fills `known.runs` and `known.waiting`. The disk is touched in threads, the state on the event loop alone."""

    def __init__(self, known: Served, base: BaseModel, changes: Changes) -> None:
        self._known = known
        self._base = base
        self._changes = changes
        settings = known.settings
        self.watcher = Watcher(
            [Path(folder) for folder in settings.watch],
            {name: Path(folder) for name, folder in settings.adapters.items()},
            quiet=settings.quiet,
        )
        self._absent: set[Place] = set()

    async def look(self) -> list[Sight]:
        """What is new since it was settled; what is said of folders that are gone is forgotten."""
        sights = await file_work(self.watcher.scan)
        self._drop_vanished()
        return sights

    def in_order(self, sights: Sequence[Sight]) -> Iterator[list[Sight]]:
        """What to consider together: each run's in the order of its steps. Of a long run that nothing is known of, the
        newest comes first, and all but that after the others; none of it begins an attempt, whatever the order."""
        later: list[list[Sight]] = []
        for run, group in groupby(sights, key=lambda sight: sight.candidate.run):
            found = list(group)
            if len(found) > GLANCES and run not in self._known.runs and all(sight.early for sight in found):
                yield found[-1:]
                later += [found[start : start + GLANCES] for start in range(0, len(found) - 1, GLANCES)]
            else:
                yield found
        yield from later

    async def consider(self, sight: Sight) -> None:
        """Take it in, or note why not."""
        candidate, look = sight.candidate, sight.look
        if never := why_never_served(look):
            self._note(candidate, "refused", never, cause="regular" if look.kind == "regular" else "format")
            self.watcher.settle(sight)
            return
        if not sight.ready:
            self._note(candidate, "incomplete", look.reason, stalled=sight.stalled)
            if sight.stalled:
                self.watcher.settle(sight)
            return
        try:
            check_name(candidate.run, self._known.engine.limits.base)
            async with self._changes.of(candidate.run):
                self._known.mixes.refuse_taken(candidate.run)
                await self._take(sight)
        except Incomplete as error:
            self._note(candidate, "incomplete", str(error))
        except Refused as error:
            self._note(candidate, "refused", str(error), cause=error.cause)
            self.watcher.settle(sight)
        except Exception as error:  # a full disk, a file nobody thought of: the others are served meanwhile
            named = str(error) if isinstance(error, LorakitError | OSError) else f"{type(error).__name__}: {error}"
            self._note(candidate, "incomplete", f"it could not be taken in, and will be tried again: {named}")

    async def _take(self, sight: Sight) -> None:
        candidate, look = sight.candidate, sight.look
        known = await file_work(self._known.store.source, candidate.run, str(candidate.folder))
        served = candidate.run in self._known.runs or candidate.run not in self._known.settings.adapters
        if known and known.signature == look.signature and served:
            self.watcher.settle(sight)
            self._known.waiting.pop(candidate.place, None)
            return
        rewritten = known is None or known.weights_signature != look.weights_signature
        if not rewritten and served and not self._is_there(candidate):
            self.watcher.settle(sight)  # it was removed from the store, and its metrics alone are new
            return
        self._known.store.ensure_reachable()  # before anything is copied
        await self.take_in(sight, finished=rewritten, late=sight.early and known is None)
        self.watcher.settle(sight)

    def _is_there(self, candidate: Candidate) -> bool:
        run = self._known.runs.get(candidate.run, Run(candidate.run))
        return any(revision.source == str(candidate.folder) for revision in run.revisions.values())

    async def take_in(self, sight: Sight, *, finished: bool = True, late: bool = False, shown: str = "") -> Revision:
        """Put it into the store, and among what is known; within a change of its run.

        Raises:
            Incomplete, Refused: as `intake.take_in`.
        """
        candidate, known = sight.candidate, self._known
        seconds = {} if sight.early else {"detect": max(0.0, time.time() - sight.written)}
        taken = await file_work(
            take_in, known.store, self._base, sight.look, run=candidate.run, kind=candidate.kind, step=candidate.step,
            max_rank=known.engine.limits.max_rank, finished=finished, late=late, shown=shown,
        )  # fmt: skip
        revision = taken.revision
        run = known.runs.setdefault(candidate.run, Run(candidate.run))
        if revision.id not in run.revisions:
            known.found(revision, {**seconds, **taken.seconds})
            repaired = f", repaired: {revision.repaired}" if revision.repaired else ""
            known.events.tell("found", f"{revision.name} is in the store{repaired}", **about(revision))
        run.revisions[revision.id] = revision
        if taken.finish:
            run.finishes.append(taken.finish)
        known.waiting.pop(candidate.place, None)
        return revision

    def _drop_vanished(self) -> None:
        """Forget what was said of folders that are gone; a named one that is not there has to be said."""
        known, missing = self._known, self.watcher.missing
        for name, folder in self._absent - missing.items():
            known.waiting.pop((name, folder), None)
        self._absent = set(missing.items())
        known.waiting = {
            (run, folder): waiting
            for (run, folder), waiting in known.waiting.items()
            if (run, folder) in self._absent or (run, folder) in self.watcher.places
        }
        for name, folder in missing.items():
            if name not in known.runs:
                gone = Candidate(folder, name, "plain")
                self._note(gone, "refused", f"there is no folder '{folder}'", cause="missing")

    def _note(
        self, candidate: Candidate, state: str, reason: str, *, stalled: bool = False, cause: str | None = None
    ) -> None:
        before = self._known.waiting.get(candidate.place)
        if before is None or (before.state, before.reason) != (state, reason):
            self._known.waiting[candidate.place] = Waiting(candidate, state, reason)
            if state == "refused" or stalled:
                kind = "stalled" if stalled else state
                name = candidate.run if candidate.step is None else f"{candidate.run}@step-{candidate.step}"
                told = {"adapter": candidate.run, "reason": reason, "cause": cause}
                self._known.events.tell(kind, f"{name} is {kind}: {reason}", **told)
