"""What one server serves: runs and their revisions, what is refused and why, and the single steps that change it.

Its state changes on the event loop alone, so what a request sees between two of its own steps is all of one piece.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.checkpoints.runs import Candidate
from lorakit.errors import NotFound
from lorakit.server.engines.engine import Answering, LoadFailed
from lorakit.server.file_work import file_work
from lorakit.server.following.residency import NoSlot, Residence, Residency
from lorakit.server.following.rules import followed, why_not
from lorakit.server.following.watcher import Place
from lorakit.server.mixes.kept import Mixes
from lorakit.server.requests.answered import Answered, Observer, ShadowObserver
from lorakit.server.settings import Settings
from lorakit.server.sharing.choosing import chosen
from lorakit.server.sight.events import Events
from lorakit.store.catalog import Revision, Run, best, latest
from lorakit.store.names import model_name, split_model
from lorakit.store.splits import Split, split_said
from lorakit.store.store import Store


@dataclass(frozen=True, slots=True)
class Waiting:
    """A folder that is not served: still incomplete, or refused, and why."""

    candidate: Candidate
    state: str
    reason: str


class Served:
    """State, the questions that requests ask of it, and steps that each leave it consistent."""

    def __init__(
        self, settings: Settings, engine: Answering, store: Store, residency_of: Callable[..., Residence] = Residency
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.store = store
        self.events = Events()
        self.residency = residency_of(engine, kept=self.is_kept, pinned=self.is_pinned, fair_wait=settings.fair_wait)
        self.runs: dict[str, Run] = {}
        self.waiting: dict[Place, Waiting] = {}
        self.requests: dict[int, int] = {}
        self.observers: list[Observer] = []  # each is told of every answer when it has ended
        self.shadow_observers: list[ShadowObserver] = []  # and of every one that was made for nobody
        self.caught_up = not settings.store  # what others that share the store have done is known
        self.converged = False  # what was named at start, and what aliases meant before, answers or is refused
        self._unproven: set[int] = set()  # found, and not yet tried out in the engine
        self._proven: set[int] = set()  # once in the engine, and answered there
        self._failed: dict[int, str] = {}  # refused by the engine, with its reason
        self.passed_over: dict[int, str] = {}  # what no default alias moves to by itself, with the reason
        self._loading: set[int] = set()
        self._seconds: dict[int, dict[str, float]] = {}  # that it took until the engine, of what is on its way there
        self._anybody: Counter[tuple[str, str]] = Counter()  # requests from nobody, of each alias that is split
        self.mixes = Mixes(self)

    def resolve(self, model: str, asker: str | int | None = None) -> Revision | None:
        """The revision that a `model` means; None for the base.

        Args:
            asker: who asks for an answer, as `asker_for` says; without, what is split means its main revision.

        Raises:
            NotFound: there is no such model, or nothing of it is ready.
        """
        if self.is_base(model):
            return None
        name, selector = split_model(model)
        run = self.runs.get(name)
        revision = None
        if run is not None and asker is not None and (split := _split(run, selector)) is not None:
            revision = self._shared(run, split, asker)
        elif run is not None:
            # a name by itself is asked for at every request, and a run may have thousands of revisions
            revision = self._default(run) if selector is None else run.select(selector, self.unusable)
        revision = revision or self.mixes.find(model)
        if revision is None:
            raise NotFound(f"The model `{model}` does not exist{self._why_not(name, run)}")
        return revision

    def split_of(self, model: str) -> tuple[Run, str, Split] | None:
        """The run, the alias and the split that a `model` means; None where it is not split."""
        name, selector = split_model(model)
        run = self.runs.get(name)
        split = _split(run, selector) if run is not None else None
        return (run, selector or "", split) if run is not None and split is not None else None

    def asker_for(self, model: str, asker: str | None) -> str | int | None:
        """Whoever asks for a model; if that is nobody, the number of the request among those of nobody. None where it
        makes no difference."""
        if (found := self.split_of(model)) is None or asker is not None:
            return asker
        whose = found[0].name, found[1]
        self._anybody[whose] += 1
        return self._anybody[whose]

    def _shared(self, run: Run, split: Split, asker: str | int) -> Revision | None:
        usable = {
            run.revisions[id].name: id
            for id in split.shares
            if id in run.revisions and id not in self._unproven and id not in self._failed
        }
        shares = {name: split.shares[id] for name, id in usable.items()}
        return run.revisions[usable[chosen(shares, split.seed, asker)]] if shares else None

    def is_base(self, model: str) -> bool:
        return model == self.engine.limits.base

    def has(self, name: str) -> bool:
        """Whether there is a base, an adapter or a mix of this name."""
        return self.is_base(name) or name in self.runs or name in self.mixes.names

    def _default(self, run: Run) -> Revision | None:
        target = run.aliases.get("", -1)
        return None if target in self._unproven or target in self._failed else run.revisions.get(target)

    @property
    def refused(self) -> Collection[int]:
        """The revisions that the engine refused."""
        return self._failed.keys()

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
        found += [possible.get(revision.id) for _, revision in run.split_among()]
        return list({revision.id: revision for revision in found if revision is not None}.values())

    # steps

    def found(self, revision: Revision, seconds: dict[str, float]) -> None:
        """It is new in the store: no alias means it before it was tried out. `seconds` it took to get there."""
        self._unproven.add(revision.id)
        self._seconds[revision.id] = seconds

    def vouched_for(self, revision: Revision) -> None:
        """Another server has tried it out: a request may name it, and loads it, even if it was refused here before."""
        self._unproven.discard(revision.id)
        self._failed.pop(revision.id, None)

    async def bring_in(self, revision: Revision, *, urgent: bool = False) -> None:
        """Have a revision in the engine, with a first token that is a number; `urgent`: without waiting for its turn.

        Raises:
            LoadFailed: the engine refused it: it is not served any more.
            NoSlot: every slot stayed in use.
        """
        self._loading.add(revision.id)
        try:
            await self.residency.ensure(
                revision.name, revision.folder, wait=self.settings.load_wait, urgent=urgent, rank=revision.rank,
                instead_of=self._meant_now(revision) if urgent else None,
            )  # fmt: skip
        except LoadFailed as error:
            if not await self.engine.alive(now=True):  # nothing is known of the adapter by that
                raise NoSlot(f"the engine does not answer, so '{revision.name}' was not loaded") from None
            if not self.is_known(revision):
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

    def _meant_now(self, revision: Revision) -> Path | None:
        """The folder of what its name means now, if that is another."""
        run = self.runs.get(revision.run)
        current = run.revisions.get(run.aliases.get("", -1)) if run is not None else None
        return current.folder if current is not None and current.id != revision.id else None

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
        passed_over: Mapping[int, str] | None = None, split: Split | None = None,
    ) -> None:  # fmt: skip
        """Point an alias at a revision, or have it split with that as the main one, for the next request on; the rest
        as in the store."""
        more: dict[str, Any] = {"pinned": pinned, "passed_over": passed_over, "split": split}
        await file_work(self.store.move_alias, run.name, alias, revision.id, why, **more)
        run.aliases[alias] = revision.id
        run.splits.pop(alias, None)
        self.passed_over |= passed_over or {}
        for id in (revision.id, *(split.members if split is not None else ())):
            self.passed_over.pop(id, None)
        if pinned is not None:
            run.pinned = pinned
        shown = model_name(run.name, alias)
        if split is None:
            self.events.tell("alias", f"{shown} is now {revision.name}", alias=shown, why=why, **about(revision))
            return
        run.splits[alias] = split
        said = split_said(split, run.revisions)
        self.events.tell("split", f"{shown} is now {split_text(said)}", alias=shown, why=why, **said, **about(revision))

    def is_known(self, revision: Revision) -> bool:
        """Whether it was not forgotten meanwhile."""
        run = self.runs.get(revision.run)
        return revision.id in (run.revisions if run is not None else {one.id for one in self.mixes.revisions()})

    def is_followed_to(self, revision: Revision) -> bool:
        """Whether a name moved there by itself, and may move away again."""
        run = self.runs.get(revision.run)
        follows = run is not None and not run.pinned and self.settings.follow != "manual"
        return follows and run is not None and run.aliases.get("") == revision.id

    async def rolled_back(self, run: Run) -> Revision | None:
        """Where a rollback of the default alias leads: the main revision where several share it; None for nowhere."""
        split = run.splits.get("")
        if split is not None and len(split.shares) > 1:
            return run.revisions.get(split.main)
        return await self.before(run)

    async def before(self, run: Run) -> Revision | None:
        """What the default alias pointed at before, if that can be served."""
        before = await file_work(self.store.previous, run.name, "")
        return self.possible(run).get(before) if before is not None else None

    def run_named(self, name: str) -> Run:
        run = self.runs.get(name)
        if run is None:
            raise NotFound(f"there is no adapter '{name}'")
        return run


def _split(run: Run, selector: str | None) -> Split | None:
    """How the alias behind the @ of a model is split, or without one the default; None where it is not."""
    return run.splits.get(selector or "") if selector != "" else None


def split_text(said: Mapping[str, Any]) -> str:
    """What `split_said` says, to a person."""
    shares = ", ".join(f"{share['share']:.3g} of {share['revision']}" for share in said["shares"])
    return f"{shares}, with {' and '.join(said['shadow'])} as shadow" if said["shadow"] else shares


def about(revision: Revision) -> dict[str, Any]:
    return {"adapter": revision.run, "revision": revision.name, "step": revision.facts.step}
