"""What one server serves: runs and their revisions, what is refused and why, and the single steps that change it.

Its state changes on the event loop alone, so what a request sees between two of its own steps is all of one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.checkpoints.runs import Candidate
from lorakit.errors import NotFound
from lorakit.server.engines.engine import Engine, LoadFailed
from lorakit.server.file_work import file_work
from lorakit.server.following.residency import NoSlot, Residency
from lorakit.server.following.rules import followed, why_not
from lorakit.server.following.watcher import Place
from lorakit.server.mixes.kept import Mixes
from lorakit.server.requests.answered import Answered, Observer
from lorakit.server.settings import Settings
from lorakit.server.sight.events import Events
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
        self.residency = Residency(engine, kept=self.is_kept, pinned=self.is_pinned, fair_wait=settings.fair_wait)
        self.runs: dict[str, Run] = {}
        self.waiting: dict[Place, Waiting] = {}
        self.requests: dict[int, int] = {}
        self.observers: list[Observer] = []  # each is told of every answer when it has ended
        self.converged = False  # what was named at start, and what aliases meant before, answers or is refused
        self._unproven: set[int] = set()  # found, and not yet tried out in the engine
        self._proven: set[int] = set()  # once in the engine, and answered there
        self._failed: dict[int, str] = {}  # refused by the engine, with its reason
        self.passed_over: dict[int, str] = {}  # what no default alias moves to by itself, with the reason
        self._loading: set[int] = set()
        self._seconds: dict[int, dict[str, float]] = {}  # that it took until the engine, of what is on its way there
        self.mixes = Mixes(self)

    def resolve(self, model: str) -> Revision | None:
        """The revision that a `model` means; None for the base.

        Raises:
            NotFound: there is no such model, or nothing of it is ready.
        """
        if self.is_base(model):
            return None
        name, selector = split_model(model)
        run = self.runs.get(name)
        revision = None
        if run is not None:
            # a name by itself is asked for at every request, and a run may have thousands of revisions
            revision = self._default(run) if selector is None else run.select(selector, self.unusable)
        revision = revision or self.mixes.find(model)
        if revision is None:
            raise NotFound(f"The model `{model}` does not exist{self._why_not(name, run)}")
        return revision

    def is_base(self, model: str) -> bool:
        return model == self.engine.limits.base

    def has(self, name: str) -> bool:
        """Whether there is a base, an adapter or a mix of this name."""
        return self.is_base(name) or name in self.runs or name in self.mixes.names

    def _default(self, run: Run) -> Revision | None:
        target = run.aliases.get("", -1)
        return None if target in self._unproven or target in self._failed else run.revisions.get(target)

    @property
    def unusable(self) -> set[int]:
        """The revisions that no request may name: not yet tried out, or refused by the engine."""
        return self._unproven | self._failed.keys()

    def _why_not(self, name: str, run: Run | None) -> str:
        if run is not None and run.revisions:
            ready = [revision.name for revision in run.revisions.values() if self.state_of(revision)[0] == "ready"]
            return f". '{name}' has {', '.join(ready[-5:])}." if ready else f", nothing of '{name}' is ready yet."
        reasons = [waiting for waiting in self.waiting.values() if waiting.candidate.run == name]
        if reasons:
            return f": it is {reasons[-1].state} ({reasons[-1].reason})."
        return ": GET /v1/models lists what there is."

    def state_of(self, revision: Revision) -> tuple[str, str | None]:
        """State and reason, in the words of `/v1/adapters`; the reason of what is ready is why its run does not move
        there by itself."""
        if revision.id in self._failed:
            return "refused", self._failed[revision.id]
        resident = self.residency.find(revision.name)
        if revision.id in self._unproven or (revision.id in self._loading and (resident is None or resident.entering)):
            return "loading", None
        if resident is not None and resident.draining:
            return "draining", None
        return "ready", self.passed_over.get(revision.id) or why_not(revision, self.settings.following)

    def followed(self, run: Run) -> Revision | None:
        """Where the default alias should point; None when it stays as it is."""
        return followed(run, self.possible(run), self.settings.following, self.passed_over)

    def possible(self, run: Run) -> Mapping[int, Revision]:
        return run.without(self._failed.keys())

    def targets(self, run: Run) -> list[Revision]:
        """What names without a step or a digest mean, the default first."""
        possible = self.possible(run)
        found = [possible.get(run.aliases.get("", -1)), latest(run.finishes, possible), best(run.finishes, possible)]
        found += [possible.get(target) for target in run.aliases.values()]
        return list({revision.id: revision for revision in found if revision is not None}.values())

    # steps

    def found(self, revision: Revision, seconds: dict[str, float]) -> None:
        """It is new in the store: no alias means it before it was tried out. `seconds` it took to get there."""
        self._unproven.add(revision.id)
        self._seconds[revision.id] = seconds

    async def bring_in(self, revision: Revision, *, urgent: bool = False) -> None:
        """Have a revision in the engine, with a first token that is a number; `urgent`: without waiting for its turn.

        Raises:
            LoadFailed: the engine refused it: it is not served any more.
            NoSlot: every slot stayed in use.
        """
        self._loading.add(revision.id)
        try:
            await self.residency.ensure(revision.name, revision.folder, wait=self.settings.load_wait, urgent=urgent)
        except LoadFailed as error:
            if not await self.engine.alive():  # nothing is known of the adapter by that
                raise NoSlot(f"the engine does not answer, so '{revision.name}' was not loaded") from None
            if not self._is_known(revision):
                raise
            self._failed[revision.id] = str(error)
            self.events.tell(
                "refused", f"{revision.name} is refused by the engine: {error}", reason=str(error), cause="engine",
                **about(revision),
            )  # fmt: skip
            raise
        finally:
            self._loading.discard(revision.id)
        self._proven.add(revision.id)
        if revision.id in self._unproven or revision.id in self._failed:
            self._unproven.discard(revision.id)
            self._failed.pop(revision.id, None)
            resident = self.residency.find(revision.name)
            seconds = {**self._seconds.pop(revision.id, {}), "engine": resident.seconds if resident else 0.0}
            self.events.tell("loaded", f"{revision.name} is in the engine", seconds=seconds, **about(revision))

    def answered(self, answer: Answered) -> None:
        for observer in self.observers:
            observer(answer)

    def is_kept(self, name: str) -> bool:
        """Whether a revision of this name should stay in the engine, if others can go: an alias means it."""
        run = self.runs.get(split_model(name)[0])
        targets = self.mixes.targets().values() if run is None else self.targets(run)
        return any(target.name == name for target in targets)

    def is_pinned(self, name: str) -> bool:
        """Whether it never leaves the engine: it is what a name means that was said to stay."""
        run = self.runs.get(split_model(name)[0])
        if run is None:
            targets = self.mixes.targets()
            return any(mix in targets and targets[mix].name == name for mix in self.settings.pins)
        target = run.revisions.get(run.aliases.get("", -1)) if run.name in self.settings.pins else None
        return target is not None and target.name == name

    def is_busy(self, revision: Revision) -> bool:
        """Whether requests use a revision, or wait for it, or for a mix that is made of it."""
        resident = self.residency.find(revision.name)
        in_engine = revision.id in self._loading or (resident is not None and resident.busy)
        return in_engine or self.mixes.is_made_of(revision)

    def is_new(self, revision: int) -> bool:
        """Whether it was not yet tried out."""
        return revision in self._unproven

    def forget_state(self, revision: Revision) -> None:
        """What was known of a revision that is served no more."""
        self._unproven.discard(revision.id)
        self._failed.pop(revision.id, None)
        self._proven.discard(revision.id)
        self._seconds.pop(revision.id, None)
        self.passed_over.pop(revision.id, None)
        self.requests.pop(revision.id, None)

    async def move(
        self, run: Run, alias: str, revision: Revision, why: str, *, pinned: bool | None = None,
        passed_over: Mapping[int, str] | None = None,
    ) -> None:  # fmt: skip
        """Point an alias at a revision, for the next request on; the rest as in the store."""
        await file_work(
            self.store.move_alias, run.name, alias, revision.id, why, pinned=pinned, passed_over=passed_over
        )
        run.aliases[alias] = revision.id
        self.passed_over |= passed_over or {}
        self.passed_over.pop(revision.id, None)
        if pinned is not None:
            run.pinned = pinned
        shown = f"{run.name}@{alias}" if alias else run.name
        self.events.tell("alias", f"{shown} is now {revision.name}", alias=shown, why=why, **about(revision))

    def _is_known(self, revision: Revision) -> bool:
        """Whether it was not forgotten meanwhile."""
        run = self.runs.get(revision.run)
        return revision.id in (run.revisions if run is not None else {one.id for one in self.mixes.revisions()})

    async def before(self, run: Run) -> Revision | None:
        """What the default alias pointed at before, if that can be served."""
        before = await file_work(self.store.previous, run.name, "")
        return self.possible(run).get(before) if before is not None else None

    def run_named(self, name: str) -> Run:
        run = self.runs.get(name)
        if run is None:
            raise NotFound(f"there is no adapter '{name}'")
        return run


def about(revision: Revision) -> dict[str, Any]:
    return {"adapter": revision.run, "revision": revision.name, "step": revision.facts.step}
