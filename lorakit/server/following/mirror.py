"""Between a server and those that share its bucket: what they did is looked for again and again, and taken over.

What this server does itself, its store writes there before it is so here (`store.remote.shared`).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from lorakit.adapters.reading import WEIGHTS, load_adapter
from lorakit.convert.check import check_adapter, check_numbers
from lorakit.errors import Incomplete, LorakitError, Refused
from lorakit.files.finite import look_at_numbers
from lorakit.files.safetensors import read_header
from lorakit.merge.base import BaseModel
from lorakit.server.following.catching_up import WHY
from lorakit.server.following.reconciler import Reconciler
from lorakit.server.settings import Settings
from lorakit.server.sight.events import Event
from lorakit.store.names import check_name, revision_name
from lorakit.store.remote.objects import Unreachable
from lorakit.store.remote.shared import Overtaken, SharedStore, leave_all
from lorakit.store.remote.state import Recorded, RunState
from lorakit.store.store import Store

LOOK = 0.3  # seconds between two looks
FETCHES = 4  # revisions that are brought at the same time
AGAIN = 1.0  # seconds until what could not be brought is asked for again; each time twice as long
REACHED, MENDED = 5.0, 60.0  # at most, where the bucket did not answer, and where files were not what they should be

_T = TypeVar("_T")


def opened_store(settings: Settings, base: str) -> Store:
    """The store that a server was told to serve from.

    Raises:
        UsageError, LorakitError: its address is none, or what speaks to it is not installed.
    """
    if settings.store:
        return SharedStore(settings.store_home, base, settings.store, or_read=True)
    store = Store(settings.store_home, base, or_read=True)
    if store.unwritable is None:
        leave_all(settings.store_home)
    return store


class Mirror:
    """The bucket is asked in threads of its own; the state changes on the event loop alone."""

    def __init__(self, known: Reconciler, store: SharedStore) -> None:
        self._known = known
        self._store = store
        self._threads = ThreadPoolExecutor(FETCHES + 2, "bucket")
        self._fetching = asyncio.Semaphore(FETCHES)
        self._bringing: dict[str, asyncio.Task[None]] = {}
        self._refused: dict[str, str] = {}  # digests of what is not served here, with the reason
        self._again: dict[str, tuple[float, float]] = {}  # by digest: when it is asked for again, and how long that was
        self._tried: dict[str, str] = {}  # the last change of each run that was taken over as far as it could be
        self._settled: set[str] = set()  # runs whose names mean here what they mean there, as far as that could be
        self._to_pass_over: dict[int, tuple[str, str]] = {}
        self._unreached: set[str] = set()  # digests of what could not be asked for when it was last tried
        self._told: dict[str, str] = {}
        known.events.listeners.append(self._hear)

    async def begin(self) -> None:
        """Raises Refused, NotFound where the bucket can't be one that servers share; one that does not answer may
        later."""
        with contextlib.suppress(Unreachable):
            await self._in_thread(self._store.objects.ensure_conditions)

    async def run(self) -> None:
        """Look for ever."""
        while True:
            try:
                await self.look()
            except LorakitError as error:
                self._tell_trouble(error)
            except Exception as error:  # one bad moment must not end the looking
                self._tell_once("the bucket", f"will be tried again: {type(error).__name__}: {error}")
            await asyncio.sleep(LOOK)

    async def close(self) -> None:
        tasks = list(self._bringing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def look(self) -> None:
        """Ask once what has changed, and begin to take it over. At first, note when what names mean is here."""
        if not self._store.is_joined:
            await self._in_thread(self._store.join)
        behind = await self._in_thread(self._store.look)
        self._over()
        for name, reason in self._store.shared.unreadable.items():
            self._tell_once(name, f"{name} is not taken over: {reason}")
        for name in [*self._store.shared.set_back]:
            self._store.shared.set_back.discard(name)
            self._tried.pop(name, None)  # which may be what it was put back to
            self._known.events.tell(
                "failed", f"{name} is older in the bucket than it was: that is taken over", adapter=name
            )
        for name in behind:
            if name not in self._bringing:
                self._bringing[name] = asyncio.create_task(self._brought(name))
        await self._publish()
        if not self._known.caught_up:
            self._known.caught_up = self._bringing.keys() <= self._settled

    def _tell_trouble(self, error: LorakitError) -> None:
        self._store.trouble = error
        self._tell_once("the bucket", f"{error}; what is here is served on, and nothing new is taken in until then")

    def _over(self) -> None:
        if self._store.trouble is not None:
            self._store.trouble = None
            self._told.pop("the bucket", None)
            self._known.events.tell("reached", f"the bucket of '{self._store.objects.address}' answers again")

    def _tell_once(self, about: str, trouble: str) -> None:
        if self._told.get(about) != trouble:
            self._known.events.tell("failed", trouble)
        self._told[about] = trouble

    async def _in_thread(self, ask: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, ask)

    # what others did

    async def _brought(self, name: str) -> None:
        try:
            check_name(name, self._known.engine.limits.base)
            await self._bring(name)
        except Exception as error:
            named = str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
            self._tell_once(name, f"{name} could not be taken over, and will be tried again: {named}")
        finally:
            self._settle(name)
            del self._bringing[name]

    async def _bring(self, name: str) -> None:
        """First what needs no files; then file by file, what names mean before all else."""
        state = self._store.shared.state(name)
        if state is not None and self._tried.get(name) != state.change:
            await self._agree(name)
            self._tried[name] = state.change
        while wanted := self._wanted(name):
            named = (self._store.shared.state(name) or RunState()).named
            first = [recorded for recorded in wanted if recorded.key in named]
            if not first:
                self._settle(name)
            together = (self._fetch(name, recorded) for recorded in (first or wanted)[:FETCHES])
            outcomes = await asyncio.gather(*together, return_exceptions=True)
            await self._agree(name)  # what did arrive is served
            for error in outcomes:
                if error is not None:
                    raise error
        if not self._store.is_behind(name):
            self._told.pop(name, None)

    async def _agree(self, name: str) -> None:
        await self._known.catch_up(name, lambda: self._store.agree(name, self._refused.keys()))

    def _settle(self, name: str) -> None:
        """What names mean was taken over, unless the bucket could not be asked for it."""
        state = self._store.shared.state(name) or RunState()
        if self._unreached.isdisjoint(state.revisions[key].digest for key in state.named):
            self._settled.add(name)

    def _wanted(self, name: str) -> list[Recorded]:
        now = time.monotonic()
        return [
            recorded
            for recorded in self._store.missing(name)
            if recorded.digest not in self._refused and self._again.get(recorded.digest, (now, 0.0))[0] <= now
        ]

    async def _fetch(self, name: str, recorded: Recorded) -> None:
        limits, digest = self._known.engine.limits, recorded.digest
        check = _checks(self._known.base, limits.max_rank)
        async with self._fetching:
            try:
                if recorded.rank > limits.max_rank:
                    raise _NeverHere(
                        f"it has rank {recorded.rank}, more than this server's --max-lora-rank {limits.max_rank}",
                        cause="rank",
                    )
                await self._in_thread(lambda: self._store.bring(digest, check))
                self._again.pop(digest, None)
            except _NeverHere as error:
                self._refused[digest] = str(error)
                self._tell_refused(name, recorded, error)
            except Refused as error:  # not whole yet, or not what it should be: that may be mended
                if self._later(digest, MENDED) or not isinstance(error, Incomplete):
                    self._tell_refused(name, recorded, error)
            except Exception as error:
                self._later(digest, REACHED)
                if isinstance(error, Unreachable):
                    self._unreached.add(digest)
                raise
            self._unreached.discard(digest)

    def _later(self, digest: str, most: float) -> bool:
        """Ask for it again after a while, each time a longer one; whether it was asked for again before."""
        _, waited = self._again.get(digest, (0.0, 0.0))
        wait = min(most, 2 * waited or AGAIN)
        self._again[digest] = (time.monotonic() + wait, wait)
        return waited > 0

    def _tell_refused(self, name: str, recorded: Recorded, error: Refused) -> None:
        shown = revision_name(name, recorded.label, recorded.digest)
        if self._told.get(shown) != str(error):
            self._told[shown] = str(error)
            self._known.events.tell(
                "refused", f"{shown} is refused: {error}", reason=str(error), cause=error.cause, adapter=name,
                revision=shown, step=recorded.facts.step, why=WHY,
            )  # fmt: skip

    # what this server found out

    def _hear(self, event: Event) -> None:
        """What no name moves to by itself here, none moves to anywhere: else two servers would move it to and fro."""
        if event.kind == "held" or (event.kind == "refused" and event.data.get("cause") == "engine"):
            run = self._known.runs.get(event.data["adapter"])
            for revision in run.revisions.values() if run is not None else ():
                if run is not None and revision.name == event.data["revision"]:
                    self._to_pass_over[revision.id] = (run.name, event.data["reason"])

    async def _publish(self) -> None:
        for id, (name, reason) in list(self._to_pass_over.items()):
            await self._in_thread(lambda id=id, name=name, reason=reason: self._pass_over(id, name, reason))  # type: ignore[misc]
            self._to_pass_over.pop(id, None)
            if (run := self._known.runs.get(name)) is not None and id in run.revisions:
                self._known.passed_over.setdefault(id, reason)

    def _pass_over(self, id: int, name: str, reason: str) -> None:
        with contextlib.suppress(Refused, Overtaken):
            self._store.pass_over(name, id, reason)


class _NeverHere(Refused):
    """This server can't serve it, however often it asks."""


def _checks(base: BaseModel, max_rank: int) -> Callable[[Path], None]:
    """What a server makes sure of before anything is served, of what another has made sure of."""

    def check(staged: Path) -> None:
        verdict = check_adapter(load_adapter(staged), base, max_rank=max_rank)
        numbers = check_numbers(look_at_numbers(read_header(staged / WEIGHTS))).problem
        problems = [*verdict.problems, *verdict.open_questions, *verdict.repairs, *([numbers] if numbers else ())]
        if problems:
            wrong = next((check.name for check in verdict.checks if check.problem or check.question), "finite")
            raise _NeverHere("; ".join(problems), cause=wrong)

    return check
