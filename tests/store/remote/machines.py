"""Machines that share a bucket: what each has, and how it catches up with the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.store.catalog import Revision, Run
from lorakit.store.remote.shared import SharedStore
from lorakit.store.store import Store

Machine = Callable[..., SharedStore]


def accept(_: Path) -> None: ...


def catch_up(store: SharedStore) -> list[str]:
    """Take over all that others did: the runs of which something was new."""
    behind = store.look()
    for name in behind:
        for recorded in store.missing(name):
            store.bring(recorded.digest, accept)
        store.agree(name)
    return behind


def run_of(store: Store, name: str = "sql") -> Run:
    found = store.run(name)
    assert found is not None
    return found


def meant(store: Store, alias: str = "", name: str = "sql") -> str | None:
    run = store.run(name)
    revision = run.select(alias or None) if run is not None else None
    return revision.name if revision is not None else None


def said(run: Run) -> Any:
    """A run without what is each machine's own."""
    names = {id: revision.name for id, revision in run.revisions.items()}
    facts = {revision.name: (revision.facts, revision.rank, revision.created) for revision in run.revisions.values()}
    splits = {
        alias: (
            {names[id]: share for id, share in split.shares.items()},
            [names[id] for id in split.shadows],
            split.seed,
        )
        for alias, split in run.splits.items()
    }
    return (
        facts, [(names[one.revision], one.attempt) for one in run.finishes],
        {alias: names[id] for alias, id in run.aliases.items()}, run.pinned, splits,
    )  # fmt: skip


def point(store: SharedStore, revision: Revision, alias: str = "", why: str = "set", **more: Any) -> None:
    store.move_alias(revision.run, alias, revision.id, why, **more)
