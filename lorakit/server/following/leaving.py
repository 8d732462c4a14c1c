"""What is served no more: gone for requests at once, from the engine after its last one, and then from the disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from lorakit.checkpoints.retention import Retention
from lorakit.server.file_work import file_work
from lorakit.server.following.changes import Changes
from lorakit.server.following.retention import going
from lorakit.server.following.served import Served
from lorakit.store.catalog import Run
from lorakit.store.names import split_model


class Leaving:
    """`retention`: what stays of a run; None for all. The disk is touched in threads, the state on the event loop."""

    def __init__(self, known: Served, changes: Changes, retention: Retention | None) -> None:
        self._known = known
        self._changes = changes
        self._retention = retention
        self._under_way: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Wait for nothing more: the store does not know what has not left yet, and the next start clears it away."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    def begin(self, names: Sequence[str], folders: Sequence[Path]) -> None:
        """These revisions leave the engine, then these folders the disk."""
        task = asyncio.create_task(self._leave(names, folders))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _leave(self, names: Sequence[str], folders: Sequence[Path]) -> None:
        known = self._known
        for name in names:  # again, if a request that had found it before still waited for it
            while known.residency.find(name) is not None and not self._is_served(name):
                await known.residency.leave(name)
        for folder in folders:
            await file_work(known.store.remove_folder, folder)

    def _is_served(self, name: str) -> bool:
        run = self._known.runs.get(split_model(name)[0])
        return run is not None and any(revision.name == name for revision in run.revisions.values())

    async def let_go(self, run: Run) -> None:
        """Have leave what nothing keeps of a run."""
        known = self._known
        if self._retention is None:
            return
        async with self._changes.of(run.name):
            if known.runs.get(run.name) is not run:
                return
            held = await self._held(run)
            gone = [one for one in going(run, self._retention, held, time.time()) if not known.is_busy(one)]
            if not gone:
                return
            finishes = run.finishes
            for revision in gone:
                del run.revisions[revision.id]
            run.finishes = [finish for finish in finishes if finish.revision in run.revisions]
            try:
                removed, folders = await file_work(known.store.remove, [one.id for one in gone])
            except BaseException:
                run.revisions |= {one.id: one for one in gone}
                run.finishes = finishes
                raise
            run.revisions |= {one.id: one for one in gone if one.id not in removed}
            for revision in gone:
                known.forget_state(revision)
            names = ", ".join(one.name for one in gone if one.id in removed)
            known.events.tell("removed", f"{names} left the store, as nothing keeps it", adapter=run.name)
        self.begin([one.name for one in gone], folders)

    async def _held(self, run: Run) -> dict[int, str]:
        """What stays whatever the policies say: what names mean, what a rollback would go to, what is in use."""
        known = self._known
        held = {revision.id: "an alias means it" for revision in known.targets(run)}
        held |= dict.fromkeys(run.aliases.values(), "an alias points at it")
        held |= {revision.id: "it shares an alias" for _, revision in run.split_among()}
        if (final := run.select("final")) is not None:
            held[final.id] = "it is the run's last save"
        if (before := await known.before(run)) is not None:
            held[before.id] = "a rollback goes to it"
        held |= {id: "it is in use" for id, revision in run.revisions.items() if known.is_busy(revision)}
        return held | {id: "it is new" for id in run.revisions if known.is_new(id)}
