"""What should be served, compared with what is, one safe step at a time.

What should be stands in the store, so whichever process dies, the next one converges to it. A change of what is served
is one transaction of the store, and waits for no engine: what it needs is in the engine before it begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.runs import candidates_of
from lorakit.errors import Incomplete, LorakitError, NotFound, Refused
from lorakit.merge.base import BaseModel
from lorakit.server.engines.engine import Answering, LoadFailed
from lorakit.server.file_work import file_work
from lorakit.server.following.arrivals import Arrivals
from lorakit.server.following.catching_up import CatchingUp
from lorakit.server.following.changes import Changes
from lorakit.server.following.guard import Guard
from lorakit.server.following.intake import why_never_served
from lorakit.server.following.leaving import Leaving
from lorakit.server.following.residency import NoSlot, Residence, Residency
from lorakit.server.following.retention import retention_of
from lorakit.server.following.rules import finished_between
from lorakit.server.following.served import Served, about
from lorakit.server.following.smoke import read_smokes, what_fails
from lorakit.server.following.splitting import Splitting, named_in, own_alias
from lorakit.server.following.watcher import Sight
from lorakit.server.settings import Settings
from lorakit.server.sharing.comparison import Comparison
from lorakit.store.catalog import Revision, Run, best, latest
from lorakit.store.mixes import RUN as MIXES
from lorakit.store.names import check_name, parse_selector
from lorakit.store.remote.objects import Unreachable
from lorakit.store.remote.shared import Overtaken
from lorakit.store.store import Store


class Reconciler(Served):
    """Makes what is served what it should be. The disk is touched in threads, the state on the event loop alone."""

    def __init__(
        self, settings: Settings, engine: Answering, store: Store, base: BaseModel,
        residency_of: Callable[..., Residence] = Residency,
    ) -> None:  # fmt: skip
        super().__init__(settings, engine, store, residency_of)
        self.base = base
        self._changes = Changes()
        self._arrivals = Arrivals(self, base, self._changes)
        self._smokes = read_smokes(Path(settings.probe)) if settings.probe else ()
        self._leaving = Leaving(self, self._changes, retention_of(settings.keep_revisions, settings.retention))
        self._guard = Guard(self, self._go_back)
        self.observers.append(self._guard.observe)
        self.shadow_observers.append(self._guard.observe_shadow)
        self.comparison = Comparison(self)
        self.splitting = Splitting(self, self._changes, self.comparison, self._prove)
        self._catching_up = CatchingUp(self, self._changes, self._leaving, self.comparison)
        self._following: dict[str, asyncio.Task[None]] = {}
        self._unsettled: set[str] = set()  # runs of which something changed since they were compared
        self._moved: dict[str, float] = {}  # when a run that is followed was last loaded
        self._troubles: dict[str, str] = {}  # what was told of a run that could not be brought to where it should be
        self._readying: asyncio.Task[None] | None = None
        self._aside: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()

    # the loop

    async def recall(self) -> None:
        """Know again what was served before: requests for it are answered from now on, loaded as they ask."""
        await file_work(self.store.remove_unknown)
        self.runs = await file_work(self.store.runs)
        self.passed_over = await file_work(self.store.passed_over)
        await self.mixes.recall(self.runs.pop(MIXES, Run(MIXES)), self.base.folder, self._changes)
        self._unsettled |= self.runs.keys()

    @property
    def held(self) -> bool:
        return self._changes.held

    async def hold(self) -> None:
        """Change nothing from now on, and go on answering: another server takes over."""
        await self._changes.hold()

    def resume(self) -> None:
        """It did not."""
        self._changes.resume()

    async def close(self) -> None:
        """Let go of the store, when `run` has ended."""
        tasks = [*self._aside, *self._following.values(), *([self._readying] if self._readying else ())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._leaving.close()
        await self._guard.close()
        await self.residency.close()
        await self.mixes.close()
        await file_work(self.store.close)

    async def run(self) -> None:
        """Look and converge for ever."""
        trouble = None
        while True:
            try:
                await self._look()
                trouble = None
            except Exception as error:  # one bad moment must not end the watching
                named = str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
                if named != trouble:
                    self.events.tell("failed", f"will be tried again: {named}")
                trouble = named
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.poll):
                    await self._wake.wait()
            self._wake.clear()

    async def wake_on_events(self) -> None:
        """Look sooner when the file system says that something changed; polling goes on whatever happens here."""
        from watchfiles import awatch

        folders = await file_work(self._folders)
        with contextlib.suppress(OSError):  # no inotify here, or no more of it
            async for _ in awatch(*folders, debounce=50, step=20, ignore_permission_denied=True):
                self._wake.set()

    def _folders(self) -> list[str]:
        return [path for path in (*self.settings.watch, *self.settings.adapters.values()) if Path(path).is_dir()]

    async def step(self) -> None:
        """Look once, and wait until all that follows from it is done."""
        await self._look()
        while tasks := [*self._following.values(), *([self._readying] if self._readying else ())]:
            await asyncio.gather(*tasks)

    async def _look(self) -> None:
        """Take in what is finished, and begin to bring the engine and the aliases to where they should be."""
        sights = await self._arrivals.look()
        for group in self._arrivals.in_order(sights):
            for sight in group:
                await self._arrivals.consider(sight)
            self._unsettled |= {sight.candidate.run for sight in group}
            self._begin_to_follow()
        self._begin_to_follow()
        self.mixes.look()
        if not self.converged and self.caught_up and self._readying is None and self._nothing_pending(sights):
            self._readying = asyncio.create_task(self._become_ready())
        await self.splitting.look()

    def _nothing_pending(self, sights: Sequence[Sight]) -> bool:
        """Whether every adapter named at start is settled: a watched folder may hold unfinished ones for ever."""
        settled = {run for run, known in self.runs.items() if known.revisions}
        settled |= {run for (run, _), waiting in self.waiting.items() if waiting.state == "refused"}
        settling = any(sight.look.state == "whole" and not sight.ready for sight in sights)
        return self.settings.adapters.keys() <= settled and not settling

    async def _become_ready(self) -> None:
        """Load what aliases point at, as far as there is place: the rest comes when it is asked for."""
        try:
            while self._following:
                await asyncio.gather(*self._following.values(), return_exceptions=True)
            wanted = [target for run in self.runs.values() for target in self.targets(run)]
            wanted += self.mixes.targets().values()
            for revision in wanted[: self.residency.places]:
                await self._bring_back(revision)
            self.converged = True
            self.events.tell("ready", f"ready: {len(self.runs)} adapters are served", adapters=sorted(self.runs))
        except Exception as error:  # at the next look
            self._tell_trouble("the server", error)
        finally:
            self._readying = None

    # following

    def _begin_to_follow(self) -> None:
        for name in self._unsettled & self.runs.keys() - self._following.keys():
            self._following[name] = asyncio.create_task(self._follow(name))

    async def _follow(self, name: str) -> None:
        """Bring a run to where it should be, for as long as something of it changes."""
        try:
            await self._settle(name)
        finally:
            del self._following[name]

    async def _settle(self, name: str) -> None:
        while name in self._unsettled and (run := self.runs.get(name)) is not None:
            self._unsettled.discard(name)
            try:
                await self._converge(run)
                await self._leaving.let_go(run)
                self._troubles.pop(name, None)
            except (NoSlot, Overtaken, Unreachable):
                self._unsettled.add(name)  # at the next look
                return
            except Exception as error:
                self._unsettled.add(name)
                self._tell_trouble(name, error)
                return

    def _tell_trouble(self, name: str, error: Exception) -> None:
        named = str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
        self._tell_once(name, f"{name} will be tried again: {named}")

    def _tell_once(self, name: str, trouble: str) -> None:
        """Until it is another, or over."""
        if self._troubles.get(name) != trouble:
            self.events.tell("failed", trouble, adapter=name)
        self._troubles[name] = trouble

    async def _converge(self, run: Run) -> None:
        """Prove what the aliases that move by themselves should point at, then move the default one."""
        seen = set(run.revisions)
        while self.runs.get(run.name) is run and (wanted := self._to_move(run)) is not None:
            if (soon := self._moved.get(run.name, -1e9) + self.settings.debounce - time.monotonic()) > 0:
                await asyncio.sleep(soon)  # a run that writes faster is not loaded each time: see what is newest then
                continue
            self._moved[run.name] = time.monotonic()
            seen = set(run.revisions)
            try:
                await self.bring_in(wanted, urgent=True)
                passed = await self._passes(wanted)
            except LoadFailed:
                continue  # it counts no more: see what is next
            async with self._changes.of(run.name):
                current = self._to_move(run) if self.runs.get(run.name) is run else None
                if passed and current is not None and current.id == wanted.id and run.aliases.get("") != wanted.id:
                    await self.move(run, "", wanted, "follow")
        for revision in (latest(run.finishes, self.possible(run)), best(run.finishes, self.possible(run))):
            if revision is not None and revision.id in self._unproven:
                with contextlib.suppress(LoadFailed, NoSlot):
                    await self.bring_in(revision)
        # what no alias points at is proven when it is first asked for
        self._unproven -= seen

    def _to_move(self, run: Run) -> Revision | None:
        """What the default alias should point at and does not yet, or not yet proven."""
        wanted = self.followed(run)
        if wanted is None or (wanted.id not in self._unproven and run.aliases.get("") == wanted.id):
            return None
        return wanted

    async def _passes(self, revision: Revision) -> bool:
        """Whether it answers the smoke prompts; what does not is passed over from then on.

        Raises:
            NoSlot: it can't be asked now.
        """
        if not self._smokes:
            return True
        resident = self.residency.use(revision.name)
        if resident is None:
            raise NoSlot(f"the engine was too busy to ask '{revision.name}' the smoke prompts")
        try:
            reason = await what_fails(resident.engine, resident.engine_name, self._smokes)
        finally:
            self.residency.done(resident)
        if reason is None:
            return True
        if not await resident.engine.alive(now=True):
            raise NoSlot(f"the engine ended while '{revision.name}' was asked the smoke prompts")
        self._pass_over(revision, reason)
        return False

    def _pass_over(self, revision: Revision, reason: str) -> None:
        self.passed_over[revision.id] = reason
        self._unproven.discard(revision.id)
        self._tell_held(revision, reason)

    def _tell_held(self, revision: Revision, reason: str) -> None:
        told = f"{revision.run} does not move to {revision.name}: {reason}"
        self.events.tell("held", told, reason=reason, **about(revision))

    async def _go_back(self, revision: Revision, reason: str) -> None:
        """Let nothing that shares a name with it ask it any more; and point a name that follows at what it pointed at
        before, and never back by itself."""
        await self.splitting.take_out(revision, reason)
        if not self.is_followed_to(revision):
            return
        run = self.runs.get(revision.run)
        before = await self.before(run) if run is not None else None
        if run is None or before is None:
            self._tell_once(revision.run, f"{revision.name} fails, and '{revision.run}' pointed at nothing else before")
            return
        await self._prove(before)
        async with self._changes.of(run.name):
            if self.runs.get(run.name) is run and run.aliases.get("") == revision.id and not run.pinned:
                # what finished in between was never asked by anybody; only what is newer is followed from here
                between = f"it is not newer than {revision.name}, which the name went back from"
                passed_over = dict.fromkeys(finished_between(run, before, revision), between) | {revision.id: reason}
                await self.move(run, "", before, f"automatic rollback: {reason}", passed_over=passed_over)
                self._tell_held(revision, reason)

    # administration

    async def load(self, name: str, folder: Path, *, shown: str = "") -> Revision:
        """Take an adapter in under a name, and point the name at it; `shown` is where it came from, if not from there.

        Raises:
            NotFound: there is no such folder.
            Refused: it is incomplete, it can't be served, or the name can't be one.
            LoadFailed: the engine refused it.
        """
        check_name(name, self.engine.limits.base)
        self.mixes.refuse_taken(name)
        async with self._changes.of(name):
            revision = await self._taken_in(name, folder, shown)
        await self.bring_in(revision, urgent=True)
        async with self._changes.of(name):
            run = self._run_of(revision)
            followed = self.followed(run)
            moves_away = self.settings.follow != "manual" and followed is not None and followed.id != revision.id
            # what a person asked for is not moved away again at the next look
            await self.move(run, "", revision, "load", pinned=True if moves_away else None)
        self._unsettled.add(name)
        return revision

    async def _taken_in(self, name: str, folder: Path, shown: str) -> Revision:
        try:
            candidates = await file_work(candidates_of, folder, name)
        except OSError:
            raise NotFound(f"there is no folder '{folder}'") from None
        revision = None
        for candidate in candidates:
            look = await file_work(look_at, candidate.folder)
            never = why_never_served(look)
            if never or look.state == "incomplete":
                if len(candidates) > 1:
                    continue
                raise (Refused if never else Incomplete)(f"'{candidate.folder}': {never or look.reason}")
            revision = await self._arrivals.take_in(Sight(candidate, look, ready=True, early=True), shown=shown)
        if revision is None:
            raise Incomplete(f"'{folder}' holds no finished adapter")
        return revision

    async def unload(self, name: str) -> None:
        """Forget a name: no request finds it any more, and its revisions leave after their last request.

        Raises:
            NotFound: there is no such name.
        """
        async with self._changes.of(name):
            run = self.run_named(name)
            folders = await file_work(self.store.forget, name)
            del self.runs[name]
            self.events.tell("gone", f"{name} is no longer served", adapter=name)
            for revision in run.revisions.values():
                self.forget_state(revision)
            self._forget(name)
        self._leaving.begin([revision.name for revision in run.revisions.values()], folders)

    def _forget(self, name: str) -> None:
        for of_run in (self._moved, self._troubles):
            of_run.pop(name, None)

    async def catch_up(self, name: str, change: Callable[[], None]) -> None:
        """Serve of a run what the store has of it after a `change` that another server made."""
        await self._catching_up.catch_up(name, change)
        if name not in self.runs:
            self._forget(name)
        self._unsettled.add(name)
        self._wake.set()

    async def set_alias(self, name: str, alias: str, selector: str) -> Revision:
        """Point an alias at whatever names a revision; the default one (empty, or the name) then stays there.

        `latest` for the default alias makes it follow again.

        Raises:
            NotFound: there is no such adapter, or no such revision.
            Refused: the alias can't be one.
        """
        alias = own_alias(name, alias)
        revision = named_in(self.run_named(name), selector, self)
        await self._prove(revision)
        async with self._changes.of(name):
            own = selector.removeprefix(f"{name}@")
            pinned = None if alias else parse_selector(own).alias != self.settings.follow
            await self.move(self._run_of(revision), alias, revision, "set", pinned=pinned)
        self._unsettled.add(name)
        return revision

    async def rollback(self, name: str) -> Revision:
        """Point the default alias at what it pointed at before, or at the main one of those that share it, and keep it
        there.

        Raises:
            NotFound: there is no such adapter, or nothing it pointed at before.
        """
        revision = await self.rolled_back(self.run_named(name))
        if revision is None:
            raise NotFound(f"'{name}' has pointed at nothing else before, so there is nothing to roll back to")
        await self._prove(revision)
        async with self._changes.of(name):
            await self.move(self._run_of(revision), "", revision, "rollback", pinned=True)
        return revision

    async def _prove(self, revision: Revision) -> None:
        """Have it tried out; what was before need not wait for a slot, so that to go back takes effect at once.

        Raises:
            LoadFailed, NoSlot: as `bring_in`.
        """
        if revision.id not in self._proven:
            await self.bring_in(revision, urgent=True)
        elif self.residency.find(revision.name) is None:
            task = asyncio.create_task(self._bring_back(revision))
            self._aside.add(task)
            task.add_done_callback(self._aside.discard)

    async def _bring_back(self, revision: Revision) -> None:
        with contextlib.suppress(LoadFailed, NoSlot):
            await self.bring_in(revision, urgent=True)

    def _run_of(self, revision: Revision) -> Run:
        """Raises NotFound when it was removed meanwhile."""
        run = self.run_named(revision.run)
        if revision.id not in run.revisions:
            raise NotFound(f"'{revision.name}' was removed meanwhile")
        return run
