"""Mixes that clients ask for by what they are made of: each made once, kept for a while, and served as any revision.

What is made is recorded before it is served. Unnamed ones make room for one another; a name keeps its own, and with
`follow` moves to a new one when an adapter in it moves.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import Conflict, LorakitError, NotFound, Refused
from lorakit.server.file_work import file_work
from lorakit.server.following.changes import Changes
from lorakit.server.mixes.making import MixNotMade, MixRefused, Recipe, write_mix
from lorakit.server.mixes.text import OPENS, MixText, parse_mix
from lorakit.store.catalog import Revision, Run
from lorakit.store.mixes import RUN, MixStore, Named
from lorakit.store.names import check_alias, check_name

if TYPE_CHECKING:
    from lorakit.server.following.served import Served

MOST_MAKINGS = 64  # that are under way or wait for their turn
MOST_NAMES = 256
MOST_REFUSALS = 1024  # remembered, so that asking again costs nothing


@dataclass(slots=True)
class Follower:
    """A name as it stands, and why it does not follow at the moment, if it does not."""

    named: Named
    asked: MixText
    trouble: str | None = None
    remaking: asyncio.Task[None] | None = None


@dataclass(frozen=True, slots=True)
class Making:
    """A mix that is made, once for all who ask for it."""

    recipe: Recipe
    task: asyncio.Task[Revision]


class Mixes:
    """All methods run on the event loop; mixes are made, and the disk is touched, in threads."""

    def __init__(self, known: Served) -> None:
        self._known = known
        self._store: MixStore | None = None
        self._run = Run(RUN)
        self._base = Path()
        self._by_recipe: dict[str, int] = {}
        self._errors: dict[int, float] = {}
        self._used: dict[int, None] = {}  # the least recently asked for first
        self._refused: dict[str, str] = {}
        self._makings: dict[str, Making] = {}
        self._at_once = asyncio.Semaphore(known.settings.mixes_at_once)
        self._clearing: dict[int, asyncio.Task[None]] = {}
        self._claimed: set[int] = set()  # about to have a name
        self._changes = Changes()
        self.names: dict[str, Follower] = {}

    # life

    async def recall(self, run: Run, base: Path, changes: Changes) -> None:
        """Know again what was made and named before; `run` is what the store has of it, `base` the base's folder."""
        await file_work(import_module, "lorakit.mix.mix")  # or the first request for a mix waits for that
        store = self._store = await file_work(MixStore, self._known.store.home, self._known.store.base)
        self._run, self._base, self._changes = run, base, changes
        for found in await file_work(store.recorded):
            if found.revision in run.revisions:
                self._by_recipe[found.recipe] = found.revision
                self._errors[found.revision] = found.error
                self._used[found.revision] = None
        for named in await file_work(store.names):
            with contextlib.suppress(Refused):  # written by a lorakit that knew other methods
                if named.name in run.aliases:
                    self.names[named.name] = Follower(named, parse_mix(named.mix))

    async def close(self) -> None:
        """End what is under way."""
        tasks: list[asyncio.Task[Any]] = [making.task for making in self._makings.values()]
        tasks += [*self._clearing.values()]
        tasks += [follower.remaking for follower in self.names.values() if follower.remaking is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._store is not None:
            await file_work(self._store.close)

    @property
    def store(self) -> MixStore:
        assert self._store is not None, "recall comes first"
        return self._store

    # what requests ask

    def is_seen(self, revision: Revision) -> bool:
        """Whether whoever looks may see it: here that is everybody."""
        return True

    def find(self, model: str, eyes: Served | None = None) -> Revision | None:
        """What a name, `mix@3fa9c1d2`, or the text of a mix that was made already means; None when nothing. `eyes` is
        what is served as whoever asks sees it.

        Raises:
            NotFound: the engine refuses it.
        """
        eyes = eyes or self._known
        if model.startswith(OPENS):
            with contextlib.suppress(Refused, NotFound):
                made = self._made_before(self._recipe(parse_mix(model), eyes))
                return made if made is not None and eyes.mixes.is_seen(made) else None
            return None
        is_name = model in eyes.mixes.names
        selector = model if is_name else model.removeprefix(f"{RUN}@")
        found = self._run.select(selector) if selector != model or is_name else None
        if found is None or not eyes.mixes.is_seen(found):
            return None
        state, reason = self._known.state_of(found)
        if state == "refused":
            raise NotFound(f"The model `{model}` is refused by the engine: {reason}")
        self._touch(found.id)
        return found

    async def revision_for(self, model: str, eyes: Served | None = None) -> Revision:
        """The revision that `mix(…)` means now, made if it is not there; those who ask for the same wait together.
        `eyes` as in `find`.

        Raises:
            Refused: it can't be read.
            NotFound: an adapter in it does not exist.
            MixRefused: it would lose too much, or can't be made.
            MixNotMade: it could not be made now, or not within the time that a request waits.
        """
        return await self._made(self._recipe(parse_mix(model), eyes or self._known))

    def error_of(self, revision: Revision | None) -> float | None:
        """‖Δ - Δ'‖ / ‖Δ‖ of a mix; None of what is none."""
        return self._errors.get(revision.id) if revision is not None and revision.run == RUN else None

    def revisions(self) -> list[Revision]:
        """All that requests may name, the least recently asked for first."""
        return [self._run.revisions[id] for id in self._used]

    def unnamed(self) -> list[Revision]:
        named = set(self._run.aliases.values())
        return [revision for revision in self.revisions() if revision.id not in named]

    def targets(self) -> dict[str, Revision]:
        """What each name means."""
        found = {name: self._run.revisions.get(self._run.aliases[name]) for name in self.names}
        return {name: revision for name, revision in found.items() if revision is not None}

    def is_made_of(self, revision: Revision) -> bool:
        """Whether a mix that is being made reads a revision."""
        parents = (parent for making in self._makings.values() for parent, _ in making.recipe.parents)
        return any(parent.id == revision.id for parent in parents)

    def refuse_taken(self, name: str) -> None:
        """Raises Refused when a mix has a name that a run or an adapter wants."""
        if name in self.names:
            raise Refused(
                f"the name '{name}' is a mix's: rename the folder, or forget the mix (DELETE /v1/mixes/{name})"
            )

    # making

    def _recipe(self, asked: MixText, eyes: Served) -> Recipe:
        parents: dict[str, tuple[Revision, float]] = {}
        for name, weight in asked.adapters:
            if name in eyes.mixes.names or name.partition("@")[0] == RUN:
                raise Refused(
                    f"'{name}' in {asked} is a mix, and a mix is made of adapters: name those, with their weights"
                )
            parent = eyes.resolve(name)
            if parent is None:
                raise Refused(f"'{name}' in {asked} is the base, which every mix is added to: leave it out")
            first, before = parents.get(parent.digest, (parent, 0.0))
            parents[parent.digest] = (first, before + weight)
        return Recipe(asked, tuple(parents.values()), self._known.engine.limits.max_rank)

    def _made_before(self, recipe: Recipe) -> Revision | None:
        """Raises MixRefused when it can't be served."""
        if recipe.key in self._refused:
            raise MixRefused(self._refused[recipe.key])
        found = self._run.revisions.get(self._by_recipe.get(recipe.key, -1))
        if found is None:
            return None
        if self._errors[found.id] > self._known.settings.max_mix_error:
            return None  # the limit was another when it was made: making it again says what is wrong
        self._touch(found.id)
        return found

    async def _made(self, recipe: Recipe) -> Revision:
        found = self._made_before(recipe)
        if found is not None and not await self._is_lost(found):
            return found
        making = self._makings.get(recipe.key)
        if making is None:
            if len(self._makings) >= MOST_MAKINGS:
                raise MixNotMade(f"{len(self._makings)} mixes are being made already, so {recipe} has to wait")
            making = self._makings[recipe.key] = Making(recipe, asyncio.create_task(self._make(recipe)))
            making.task.add_done_callback(lambda done: self._ended(recipe.key, done))
        try:
            async with asyncio.timeout(self._known.settings.load_wait):
                return await asyncio.shield(making.task)  # whoever goes away does not end it for the others
        except TimeoutError:
            raise MixNotMade(f"{recipe} is still being made after {self._known.settings.load_wait:g} s") from None

    async def _is_lost(self, revision: Revision) -> bool:
        """Whether what the engine refused has no files any more, and is forgotten, so that it is made again.

        Raises:
            MixRefused: it is there, and the engine refuses it.
        """
        state, reason = self._known.state_of(revision)
        if state != "refused":
            return False
        if await file_work(self.store.is_there, revision):
            raise MixRefused(f"{revision.source} is refused by the engine: {reason}")
        self._drop(revision)
        return True

    async def _make(self, recipe: Recipe) -> Revision:
        begun = time.monotonic()
        try:
            async with self._at_once:
                revision, lost = await file_work(self._written, recipe)
                while leaving := self._clearing.get(revision.id):  # the same content was on its way out
                    await asyncio.wait([leaving])
                    revision, lost = await file_work(self._written, recipe)
        except MixRefused as refused:
            self._refused[recipe.key] = str(refused)
            while len(self._refused) > MOST_REFUSALS:
                del self._refused[next(iter(self._refused))]
            raise
        except (NotFound, Refused):
            raise
        except Exception as error:  # a full disk, too little memory
            named = str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
            self._known.events.tell("failed", f"{recipe} was not made: {named}", mix=str(recipe), reason=named)
            raise MixNotMade(f"{recipe} can't be made now: {named}") from error
        self._run.revisions[revision.id] = revision
        self._by_recipe[recipe.key], self._errors[revision.id] = revision.id, lost
        self._touch(revision.id)
        self._known.events.tell(
            "mixed", f"{revision.name} is {recipe}", revision=revision.name, mix=str(recipe), error=lost,
            seconds={"mix": time.monotonic() - begun},
        )  # fmt: skip
        self._make_room(revision)
        return revision

    def _written(self, recipe: Recipe) -> tuple[Revision, float]:
        most = self._known.settings.max_mix_error
        with self._known.store.staging() as staged:
            made = write_mix(recipe, self._base, staged, most_error=most)
            kept = self.store.keep(staged, recipe.key, text=str(recipe), rank=made.rank, error=made.error)
        return kept, made.error

    def _ended(self, key: str, task: asyncio.Task[Revision]) -> None:
        del self._makings[key]
        if not task.cancelled():
            task.exception()  # told to those who waited, if any did

    # room

    def _touch(self, id: int) -> None:
        self._used.pop(id, None)
        self._used[id] = None

    def _make_room(self, new: Revision) -> None:
        """Let the unnamed mixes go that were not asked for the longest, down to what may be kept."""
        settings, unnamed = self._known.settings, self.unnamed()
        count, size = len(unnamed), sum(revision.size for revision in unnamed)
        for revision in unnamed:
            if count <= settings.mixes_kept and size <= settings.mix_bytes:
                return
            if revision.id not in (new.id, *self._claimed) and not self._known.is_busy(revision):
                count, size = count - 1, size - revision.size
                self._drop(revision)
                self._clearing[revision.id] = asyncio.create_task(self._leave(revision))

    async def _leave(self, revision: Revision) -> None:
        try:
            await file_work(self.store.forget, revision)
            await self._known.residency.leave(revision.name)
            await file_work(self.store.remove_folder, revision.folder)
        except (LorakitError, OSError) as error:  # the next start clears it away
            self._known.events.tell("failed", f"{revision.name} is not served any more, but its files stay: {error}")
        finally:
            del self._clearing[revision.id]

    def _drop(self, revision: Revision) -> None:
        """No request finds it any more."""
        self._run.revisions.pop(revision.id, None)
        self._used.pop(revision.id, None)
        self._errors.pop(revision.id, None)
        self._by_recipe = {key: id for key, id in self._by_recipe.items() if id != revision.id}
        self._known.forget_state(revision)

    # names

    async def name(self, name: str, mix: str, *, follow: bool, eyes: Served | None = None) -> None:
        """Give a mix a name that requests can use; one that has it already moves. `eyes` as in `find`.

        Raises:
            Conflict: an adapter has that name, or there are too many names.
            Refused, NotFound, MixRefused, MixNotMade, LoadFailed, NoSlot: it can't be one, or can't be served; nothing
                is changed.
        """
        check_name(name, self._known.engine.limits.base)
        check_alias(name)
        asked = parse_mix(mix)
        self._refuse_name(name)
        revision = await self._proven(self._recipe(asked, eyes or self._known))
        async with self._changes.of(name):
            self._refuse_name(name)
            await self._point(Follower(Named(name, str(asked), follow), asked), revision, "set")

    def _refuse_name(self, name: str) -> None:
        if name in self._known.runs or name in self._known.settings.adapters:
            raise Conflict(f"'{name}' is an adapter: choose another name for the mix")
        if name not in self.names and len(self.names) >= MOST_NAMES:
            raise Conflict(f"{MOST_NAMES} mixes have names: forget one first (DELETE /v1/mixes/NAME)")

    async def forget_name(self, name: str) -> None:
        """The mix itself stays until others need its place.

        Raises:
            NotFound: no mix has that name.
        """
        async with self._changes.of(name):
            if name not in self.names:
                raise NotFound(f"there is no mix of the name '{name}': GET /v1/mixes lists them")
            await file_work(self.store.unname, name)
            forgotten = self.names.pop(name)
            del self._run.aliases[name]
            self._known.events.tell("gone", f"{name} is no longer served", adapter=name, mix=forgotten.named.mix)

    def look(self) -> None:
        """Begin to make again what follows, where an adapter in it has moved."""
        for follower in self.names.values():
            if not follower.named.follow or follower.remaking is not None:
                continue
            try:
                recipe = self._recipe(follower.asked, self._known)
                if self._is_met(follower, recipe):
                    follower.trouble = None
                    continue
                self._made_before(recipe)
            except LorakitError as error:
                self._stays(follower, str(error))
                continue
            follower.remaking = asyncio.create_task(self._remake(follower, recipe))

    def _is_met(self, follower: Follower, recipe: Recipe) -> bool:
        current = self.targets().get(follower.named.name)
        if current is None or self._by_recipe.get(recipe.key) != current.id:
            return False
        return self._known.state_of(current)[0] != "refused"

    async def _remake(self, follower: Follower, recipe: Recipe) -> None:
        try:
            revision = await self._proven(recipe)
            async with self._changes.of(follower.named.name):
                if self.names.get(follower.named.name) is follower:  # and it was not forgotten meanwhile
                    await self._point(follower, revision, "follow")
            follower.trouble = None
        except Exception as error:  # the name stays where it is, and the next look tries again
            self._stays(follower, str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}")
        finally:
            follower.remaking = None

    async def _proven(self, recipe: Recipe) -> Revision:
        """Made, and tried out in the engine: only then may a name move to it."""
        revision = await self._made(recipe)
        await self._known.bring_in(revision)
        return revision

    async def _point(self, follower: Follower, revision: Revision, why: str) -> None:
        named, before = follower.named, self._run.aliases.get(follower.named.name)
        if revision.id not in self._run.revisions:
            raise MixNotMade(f"{revision.source} made room for others before it had the name '{named.name}': try again")
        self._claimed.add(revision.id)
        try:
            await file_work(self.store.name, named, revision.id, why)
        finally:
            self._claimed.discard(revision.id)
        self._run.aliases[named.name] = revision.id
        self.names[named.name] = follower
        if before != revision.id:
            said = f"{named.name} is now {revision.name}, {revision.source}"
            told = {"alias": named.name, "why": why, "adapter": RUN, "revision": revision.name, "step": None,
                    "mix": revision.source}  # fmt: skip
            self._known.events.tell("alias", said, **told)

    def _stays(self, follower: Follower, trouble: str) -> None:
        if trouble != follower.trouble:
            name, mix = follower.named.name, follower.named.mix
            self._known.events.tell(
                "stalled", f"{name} stays as it is: {trouble}", adapter=name, reason=trouble, mix=mix
            )
        follower.trouble = trouble
