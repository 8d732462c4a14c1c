"""What one server serves: runs and their revisions, what is refused and why, and the single steps that change it.

Its state changes on the event loop alone, so what a request sees between two of its own steps is all of one piece.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lorakit.checkpoints.runs import Candidate
from lorakit.errors import NotFound
from lorakit.server.answered import Answered, Observer
from lorakit.server.engine import Engine, LoadFailed
from lorakit.server.events import Events
from lorakit.server.residency import Residency
from lorakit.server.settings import Settings
from lorakit.server.watcher import Place
from lorakit.store.catalog import Revision, Run, best, latest
from lorakit.store.names import split_model
from lorakit.store.store import Store


@dataclass(frozen=True, slots=True)
class Waiting:
    """A folder that is not served: still incomplete, or refused, and why."""

    candidate: Candidate
    state: str
    reason: str


class Served:
    """State, the questions that requests ask of it, and steps that each leave it consistent."""

    def __init__(self, settings: Settings, engine: Engine, store: Store) -> None:
        self.settings = settings
        self.engine = engine
        self.store = store
        self.events = Events()
        self.residency = Residency(engine)
        self.runs: dict[str, Run] = {}
        self.waiting: dict[Place, Waiting] = {}
        self.requests: dict[int, int] = {}
        self.observers: list[Observer] = []  # each is told of every answer when it has ended
        self._unproven: set[int] = set()  # found, and not yet tried out in the engine
        self._failed: dict[int, str] = {}  # refused by the engine, with its reason
        self._loading: set[int] = set()

    def resolve(self, model: str) -> Revision | None:
        """The revision that a `model` means; None for the base.

        Raises:
            NotFound: there is no such model, or nothing of it is ready.
        """
        if model == self.engine.limits.base:
            return None
        name, selector = split_model(model)
        run = self.runs.get(name)
        revision = None
        if run is not None:
            revision = run.select(selector, self.usable(run))
        if revision is None:
            raise NotFound(f"The model `{model}` does not exist{self._why_not(name, run)}")
        return revision

    def usable(self, run: Run) -> list[int]:
        """The revisions that a request may name: in the engine, or brought in when it asks."""
        return [id for id in run.revisions if id not in self._unproven and id not in self._failed]

    def _why_not(self, name: str, run: Run | None) -> str:
        if run is not None and run.revisions:
            ready = [revision.name for revision in run.revisions.values() if self.state_of(revision)[0] == "ready"]
            return f". '{name}' has {', '.join(ready[-5:])}." if ready else f", nothing of '{name}' is ready yet."
        reasons = [waiting for waiting in self.waiting.values() if waiting.candidate.run == name]
        if reasons:
            return f": it is {reasons[-1].state} ({reasons[-1].reason})."
        return ": GET /v1/models lists what there is."

    def state_of(self, revision: Revision) -> tuple[str, str | None]:
        """State and reason, in the words of `/v1/adapters`."""
        if revision.id in self._failed:
            return "refused", self._failed[revision.id]
        resident = self.residency.find(revision.name)
        if revision.id in self._unproven or (revision.id in self._loading and (resident is None or resident.entering)):
            return "loading", None
        if resident is not None and resident.draining:
            return "draining", None
        return "ready", None

    def followed(self, run: Run) -> Revision | None:
        """Where the default alias should point; `manual` leaves it where it was first, or where a person moved it."""
        possible = self.possible(run)
        if run.pinned or (self.settings.follow == "manual" and "" in run.aliases):
            return possible.get(run.aliases.get("", -1))
        if self.settings.follow == "best":
            return best(run.finishes, possible) or latest(run.finishes, possible)
        return latest(run.finishes, possible)

    def possible(self, run: Run) -> dict[int, Revision]:
        return {id: revision for id, revision in run.revisions.items() if id not in self._failed}

    def targets(self, run: Run) -> list[Revision]:
        """What names without a step or a digest mean, the default first."""
        possible = self.possible(run)
        found = [possible.get(run.aliases.get("", -1)), latest(run.finishes, possible), best(run.finishes, possible)]
        found += [possible.get(target) for target in run.aliases.values()]
        return list({revision.id: revision for revision in found if revision is not None}.values())

    # steps

    async def bring_in(self, revision: Revision) -> None:
        """Have a revision in the engine, with a first token that is a number.

        Raises:
            LoadFailed: the engine refused it: it is not served any more.
            NoSlot: every slot stayed in use.
        """
        self._loading.add(revision.id)
        try:
            await self.residency.ensure(
                revision.name, revision.folder,
                keep=self.kept(), wait=self.settings.load_wait, prove=True,
            )  # fmt: skip
        except LoadFailed as error:
            self._failed[revision.id] = str(error)
            self.events.tell(
                "refused", f"{revision.name} is refused by the engine: {error}", reason=str(error), **about(revision)
            )
            raise
        finally:
            self._loading.discard(revision.id)
        if revision.id in self._unproven or revision.id in self._failed:
            self._unproven.discard(revision.id)
            self._failed.pop(revision.id, None)
            self.events.tell("loaded", f"{revision.name} is in the engine", **about(revision))

    def answered(self, answer: Answered) -> None:
        for observer in self.observers:
            observer(answer)

    def kept(self) -> Collection[str]:
        return {revision.name for run in self.runs.values() for revision in self.targets(run)}

    async def move(self, run: Run, alias: str, revision: Revision, why: str) -> None:
        await asyncio.to_thread(self.store.move_alias, run.name, alias, revision.id, why)
        run.aliases[alias] = revision.id
        shown = f"{run.name}@{alias}" if alias else run.name
        self.events.tell("alias", f"{shown} is now {revision.name}", alias=shown, **about(revision))

    async def pin(self, run: Run, pinned: bool) -> None:
        run.pinned = pinned
        await asyncio.to_thread(self.store.pin, run.name, pinned)

    def run_named(self, name: str) -> Run:
        run = self.runs.get(name)
        if run is None:
            raise NotFound(f"there is no adapter '{name}'")
        return run


def about(revision: Revision) -> dict[str, Any]:
    return {"adapter": revision.run, "revision": revision.name, "step": revision.facts.step}
