"""What should be served, compared with what is, one safe step at a time.

What should be stands in the store, so whichever process dies, the next one converges to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.runs import Candidate, candidates_of
from lorakit.errors import Incomplete, LorakitError, NotFound, Refused
from lorakit.merge.base import BaseModel
from lorakit.server.engine import Engine, LoadFailed
from lorakit.server.intake import take_in, why_never_served
from lorakit.server.residency import NoSlot
from lorakit.server.served import Served, Waiting, about
from lorakit.server.settings import Settings
from lorakit.server.watcher import Place, Sight, Watcher
from lorakit.store.catalog import Revision, Run, best, latest
from lorakit.store.names import check_alias, check_name, parse_selector
from lorakit.store.store import Store


class Reconciler(Served):
    """Makes what is served what it should be. The disk is touched in threads, the state on the event loop alone."""

    def __init__(self, settings: Settings, engine: Engine, store: Store, base: BaseModel) -> None:
        super().__init__(settings, engine, store)
        self.base = base
        self.converged = False
        self._watcher = Watcher(
            [Path(folder) for folder in settings.watch],
            {name: Path(folder) for name, folder in settings.adapters.items()},
            quiet=settings.quiet,
        )
        self._absent: set[Place] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # intake, convergence and administration, one at a time
        self._wake = asyncio.Event()

    # the loop

    async def recall(self) -> None:
        """Know again what was served before: requests for it are answered from now on, loaded as they ask."""
        await asyncio.to_thread(self.store.remove_unknown)
        self.runs = await asyncio.to_thread(self.store.runs)

    async def close(self) -> None:
        """Let go of the store, when `run` has ended."""
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await asyncio.to_thread(self.store.close)

    async def run(self) -> None:
        """Look and converge for ever."""
        trouble = None
        while True:
            try:
                await self.step()
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

        folders = await asyncio.to_thread(self._folders)
        with contextlib.suppress(OSError):  # no inotify here, or no more of it
            async for _ in awatch(*folders, debounce=50, step=20, ignore_permission_denied=True):
                self._wake.set()

    def _folders(self) -> list[str]:
        return [path for path in (*self.settings.watch, *self.settings.adapters.values()) if Path(path).is_dir()]

    async def step(self) -> None:
        """Look once, take in what is finished, and bring the engine and the aliases to where they should be."""
        async with self._turn:
            sights = await asyncio.to_thread(self._watcher.scan)
            self._drop_vanished()
            for sight in sights:
                await self._consider(sight)
            for run in list(self.runs.values()):
                await self._converge(run)
            if not self.converged and self._nothing_pending(sights):
                await self._bring_back()
                self.converged = True
                self.events.tell("ready", f"ready: {len(self.runs)} adapters are served", adapters=sorted(self.runs))

    def _nothing_pending(self, sights: list[Sight]) -> bool:
        """Whether every adapter named at start is settled: a watched folder may hold unfinished ones for ever."""
        settled = {run for run, known in self.runs.items() if self.usable(known)}
        settled |= {run for (run, _), waiting in self.waiting.items() if waiting.state == "refused"}
        settling = any(sight.look.state == "whole" and not sight.ready for sight in sights)
        return self.settings.adapters.keys() <= settled and not settling

    async def _bring_back(self) -> None:
        """Load what aliases point at, as far as there are slots: the rest comes when it is asked for."""
        wanted = [target for run in self.runs.values() for target in self.targets(run)]
        for revision in wanted[: self.engine.limits.slots]:
            with contextlib.suppress(NoSlot, LoadFailed):
                await self.bring_in(revision)

    def _drop_vanished(self) -> None:
        """Forget what was said of folders that are gone; a named one that is not there has to be said."""
        missing = self._watcher.missing
        for name, folder in self._absent - missing.items():
            self.waiting.pop((name, folder), None)
        self._absent = set(missing.items())
        self.waiting = {
            (run, folder): waiting
            for (run, folder), waiting in self.waiting.items()
            if (run, folder) in self._absent or (run, folder) in self._watcher.places
        }
        for name, folder in missing.items():
            if name not in self.runs:
                self._note(Candidate(folder, name, "plain"), "refused", f"there is no folder '{folder}'")

    # intake

    async def _consider(self, sight: Sight) -> None:
        candidate, look = sight.candidate, sight.look
        if never := why_never_served(look):
            self._note(candidate, "refused", never)
            self._watcher.settle(sight)
            return
        if not sight.ready:
            self._note(candidate, "incomplete", look.reason, stalled=sight.stalled)
            if sight.stalled:
                self._watcher.settle(sight)
            return
        try:
            check_name(candidate.run, self.engine.limits.base)
            await self._take(sight)
        except Incomplete as error:
            self._note(candidate, "incomplete", str(error))
        except Refused as error:
            self._note(candidate, "refused", str(error))
            self._watcher.settle(sight)
        except Exception as error:  # a full disk, a file nobody thought of: the others are served meanwhile
            named = str(error) if isinstance(error, LorakitError | OSError) else f"{type(error).__name__}: {error}"
            self._note(candidate, "incomplete", f"it could not be taken in, and will be tried again: {named}")

    async def _take(self, sight: Sight) -> None:
        candidate, look = sight.candidate, sight.look
        known = await asyncio.to_thread(self.store.source, candidate.run, str(candidate.folder))
        served = candidate.run in self.runs or candidate.run not in self.settings.adapters
        if known and known.signature == look.signature and served:
            self._watcher.settle(sight)
            self.waiting.pop(candidate.place, None)
            return
        rewritten = known is None or known.weights_signature != look.weights_signature
        await self._take_in(candidate, sight, finished=rewritten, late=sight.early and known is None)
        self._watcher.settle(sight)

    async def _take_in(self, candidate: Candidate, sight: Sight, *, finished: bool, late: bool) -> Revision:
        taken = await asyncio.to_thread(
            take_in, self.store, self.base, sight.look, run=candidate.run, kind=candidate.kind, step=candidate.step,
            max_rank=self.engine.limits.max_rank, finished=finished, late=late,
        )  # fmt: skip
        revision = taken.revision
        run = self.runs.setdefault(candidate.run, Run(candidate.run))
        if revision.id not in run.revisions:
            self._unproven.add(revision.id)
            repaired = f", repaired: {revision.repaired}" if revision.repaired else ""
            self.events.tell("found", f"{revision.name} is in the store{repaired}", **about(revision))
        run.revisions[revision.id] = revision
        if taken.finish:
            run.finishes.append(taken.finish)
        self.waiting.pop(candidate.place, None)
        return revision

    def _note(self, candidate: Candidate, state: str, reason: str, *, stalled: bool = False) -> None:
        before = self.waiting.get(candidate.place)
        if before is None or (before.state, before.reason) != (state, reason):
            self.waiting[candidate.place] = Waiting(candidate, state, reason)
            if state == "refused" or stalled:
                kind = "stalled" if stalled else state
                name = candidate.run if candidate.step is None else f"{candidate.run}@step-{candidate.step}"
                self.events.tell(kind, f"{name} is {kind}: {reason}", adapter=candidate.run, reason=reason)

    # convergence

    async def _converge(self, run: Run) -> None:
        """Prove what the aliases that move by themselves should point at, then move the default one."""
        while True:
            wanted = self.followed(run)
            if wanted is None:
                break
            if wanted.id in self._unproven or run.aliases.get("") != wanted.id:
                try:
                    await self.bring_in(wanted)
                except LoadFailed:
                    continue  # it counts no more: see what is next
                except NoSlot:
                    return  # at the next tick
            if run.aliases.get("") != wanted.id:
                await self.move(run, "", wanted, "follow")
            break
        for revision in (latest(run.finishes, self.possible(run)), best(run.finishes, self.possible(run))):
            if revision is not None and revision.id in self._unproven:
                with contextlib.suppress(LoadFailed, NoSlot):
                    await self.bring_in(revision)
        # what no alias points at is proven when it is first asked for
        self._unproven -= run.revisions.keys()

    # administration

    async def load(self, name: str, folder: Path) -> Revision:
        """Take an adapter in under a name, and point the name at it.

        Raises:
            NotFound: there is no such folder.
            Refused: it is incomplete, it can't be served, or the name can't be one.
            LoadFailed: the engine refused it.
        """
        check_name(name, self.engine.limits.base)
        async with self._turn:
            return await self._load(name, folder)

    async def _load(self, name: str, folder: Path) -> Revision:
        try:
            candidates = await asyncio.to_thread(candidates_of, folder, name)
        except OSError:
            raise NotFound(f"there is no folder '{folder}'") from None
        revision = None
        for candidate in candidates:
            look = await asyncio.to_thread(look_at, candidate.folder)
            never = why_never_served(look)
            if never or look.state == "incomplete":
                if len(candidates) > 1:
                    continue
                raise (Refused if never else Incomplete)(f"'{candidate.folder}': {never or look.reason}")
            sight = Sight(candidate, look, ready=True, early=False)
            revision = await self._take_in(candidate, sight, finished=True, late=False)
        if revision is None:
            raise Incomplete(f"'{folder}' holds no finished adapter")
        run = self.runs[name]
        await self.bring_in(revision)
        await self.move(run, "", revision, "load")
        followed = self.followed(run)
        if followed is not None and followed.id != revision.id:
            await self.pin(run, True)  # what a person asked for is not moved away again at the next look
        return revision

    async def unload(self, name: str) -> None:
        """Forget a name: no request finds it any more, and its revisions leave after their last request.

        Raises:
            NotFound: there is no such name.
        """
        async with self._turn:
            run = self.run_named(name)
            folders = await asyncio.to_thread(self.store.forget, name)
            del self.runs[name]
            self.events.tell("gone", f"{name} is no longer served", adapter=name)
            for revision in run.revisions.values():
                self._unproven.discard(revision.id)
                self._failed.pop(revision.id, None)
        task = asyncio.create_task(self._leave([revision.name for revision in run.revisions.values()], folders))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, names: list[str], folders: list[Path]) -> None:
        for name in names:
            await self.residency.leave(name)
        for folder in folders:
            await asyncio.to_thread(self.store.remove_folder, folder)

    async def set_alias(self, name: str, alias: str, selector: str) -> Revision:
        """Point an alias at whatever names a revision; the default one (empty, or the name) then stays there.

        `latest` for the default alias makes it follow again.

        Raises:
            NotFound: there is no such adapter, or no such revision.
            Refused: the alias can't be one.
        """
        if alias in ("", name, "default"):
            alias = ""
        else:
            check_alias(alias)
        async with self._turn:
            run = self.run_named(name)
            selector = selector.removeprefix(f"{name}@")  # to `sql`, `sql@step-500` and `step-500` are the same
            revision = run.select(selector, self.possible(run))
            if revision is None:
                raise NotFound(f"'{name}' has no revision '{selector}'")
            await self.bring_in(revision)
            await self.move(run, alias, revision, "set")
            if not alias:
                await self.pin(run, parse_selector(selector).alias != self.settings.follow)
            return revision

    async def rollback(self, name: str) -> Revision:
        """Point the default alias at what it pointed at before, and keep it there.

        Raises:
            NotFound: there is no such adapter, or nothing it pointed at before.
        """
        async with self._turn:
            run = self.run_named(name)
            before = await asyncio.to_thread(self.store.previous, name, "")
            revision = self.possible(run).get(before) if before is not None else None
            if revision is None:
                raise NotFound(f"'{name}' has pointed at nothing else before, so there is nothing to roll back to")
            await self.bring_in(revision)
            await self.move(run, "", revision, "rollback")
            await self.pin(run, True)
            return revision
