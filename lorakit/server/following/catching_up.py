"""What another server did to a run, taken over: into what is served, in one step that no request sees half of."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lorakit.server.file_work import file_work
from lorakit.server.following.changes import Changes
from lorakit.server.following.leaving import Leaving
from lorakit.server.following.served import Served, about, split_text
from lorakit.server.sharing.comparison import Comparison
from lorakit.store.catalog import Revision, Run
from lorakit.store.names import model_name
from lorakit.store.splits import split_said

WHY = "another server"


class CatchingUp:
    """The disk is touched in threads, the state on the event loop alone."""

    def __init__(self, known: Served, changes: Changes, leaving: Leaving, comparison: Comparison) -> None:
        self._known = known
        self._changes = changes
        self._leaving = leaving
        self._comparison = comparison

    async def catch_up(self, name: str, change: Callable[[], None]) -> None:
        """Serve of a run what the store has of it after a `change`. What is served no more ends its requests first."""
        store = self._known.store

        def changed() -> tuple[Run | None, dict[int, str], dict[int, str]]:
            before = store.passed_over()
            change()
            return store.run(name), before, store.passed_over()

        async with self._changes.of(name):
            fresh, before, passed_over = await file_work(changed)
            for id in before.keys() - passed_over.keys():
                self._known.passed_over.pop(id, None)
            gone = self._forgotten(name) if fresh is None else self._taken_over(fresh, passed_over)
        if gone:
            self._leaving.begin([one.name for one in gone], [one.folder for one in gone])

    def _forgotten(self, name: str) -> list[Revision]:
        run = self._known.runs.pop(name, None)
        if run is None:
            return []
        for revision in run.revisions.values():
            self._known.forget_state(revision)
        self._known.events.tell("gone", f"{name} is no longer served", adapter=name, why=WHY)
        return list(run.revisions.values())

    def _taken_over(self, fresh: Run, passed_over: Mapping[int, str]) -> list[Revision]:
        """The revisions that are served no more. The run stays the same object, by which others know it."""
        known = self._known
        run = known.runs.setdefault(fresh.name, Run(fresh.name))
        gone = [revision for id, revision in run.revisions.items() if id not in fresh.revisions]
        new = [revision for id, revision in fresh.revisions.items() if id not in run.revisions]
        for revision in gone:
            del run.revisions[revision.id]
            known.forget_state(revision)
        run.revisions |= fresh.revisions
        run.finishes, run.pinned = fresh.finishes, fresh.pinned
        known.passed_over |= {id: reason for id, reason in passed_over.items() if id in run.revisions}
        for revision in new:
            known.found(revision, {})
            known.events.tell("found", f"{revision.name} is in the store", why=WHY, **about(revision))
        for id in {*fresh.aliases.values(), *(one.id for _, one in fresh.split_among())}:
            known.vouched_for(run.revisions[id])  # whoever pointed a name at it
        if gone:
            names = ", ".join(revision.name for revision in gone)
            known.events.tell("removed", f"{names} left the store", adapter=run.name, why=WHY)
        self._take_over_aliases(run, fresh)
        return gone

    def _take_over_aliases(self, run: Run, fresh: Run) -> None:
        before = run.aliases, run.splits
        run.aliases, run.splits = fresh.aliases, fresh.splits
        for alias, target in fresh.aliases.items():
            split, was = fresh.splits.get(alias), before[1].get(alias)
            if (before[0].get(alias), was) == (target, split):
                continue
            revision, shown = run.revisions[target], model_name(run.name, alias)
            said = split_said(split, run.revisions) if split is not None else {}
            kind, now = ("split", split_text(said)) if split is not None else ("alias", revision.name)
            self._known.events.tell(kind, f"{shown} is now {now}", alias=shown, why=WHY, **said, **about(revision))
            if split is not None:
                self._comparison.begin(run.name, alias, split.as_in(was) if was is not None else ())
