"""What the store keeps, as the same rows that checkpoints on disk have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from lorakit.adapters.config import read_config
from lorakit.checkpoints.locate import content_of
from lorakit.checkpoints.metadata import Metadata, aliases_of
from lorakit.errors import InvalidFile
from lorakit.store.catalog import Revision, Run
from lorakit.store.kept import Kept, find_kept, kept_in
from lorakit.store.store import bases_in, open_store


def rows_in_store(home: Path, run: str | None = None) -> list[Metadata]:
    """All that the store has, or what it has of one run: run by run, in the order of steps, the last save last."""
    rows = [*_kept_rows(home, run), *_revision_rows(home, run)]
    return sorted(
        rows, key=lambda row: (row.run, "@final" in row.id, -1 if row.step is None else row.step, row.created or 0.0)
    )


def row_of(stored: Kept | Revision, home: Path) -> Metadata:
    """The row of one of them."""
    if isinstance(stored, Kept):
        return _kept_row(stored, _kept_aliases(home, stored.run).get(stored.uid, ()))
    runs = (run for run in _served_runs(home, stored.run) if stored in run.revisions.values())
    return _revision_row(stored, aliases_of(next(runs)).get(stored.id, ()))


def _kept_rows(home: Path, run: str | None) -> list[Metadata]:
    every = [kept for kept in kept_in(home) if run in (None, kept.run)]
    aliases: dict[str, tuple[str, ...]] = {}
    for name in {kept.run for kept in every}:
        aliases |= _kept_aliases(home, name)
    return [_kept_row(kept, aliases.get(kept.uid, ())) for kept in every]


def _kept_aliases(home: Path, run: str) -> dict[str, tuple[str, ...]]:
    """What follows by itself, by uid."""
    found: dict[str, tuple[str, ...]] = {}
    for alias in ("latest", "best"):
        if (target := find_kept(f"{run}@{alias}", home)) is not None:
            found[target.uid] = (*found.get(target.uid, ()), alias)
    return found


def _kept_row(kept: Kept, aliases: tuple[str, ...]) -> Metadata:
    path, reason = _content(kept)
    return Metadata(
        kept.id, path, kept.run, **asdict(kept.facts), kind=kept.kind, base=kept.base, rank=kept.rank, size=kept.size,
        digest=kept.digest, created=kept.created, state="refused" if reason else "finished", reason=reason,
        aliases=aliases,
    )  # fmt: skip


def _revision_rows(home: Path, run: str | None) -> list[Metadata]:
    rows = []
    for each in _served_runs(home, run):
        aliases = aliases_of(each)
        rows += [_revision_row(revision, aliases.get(id, ())) for id, revision in each.revisions.items()]
    return rows


def _served_runs(home: Path, run: str | None) -> Iterator[Run]:
    for base in bases_in(home):
        with open_store(home, base) as store:
            runs = list(store.runs().values())
        yield from (each for each in runs if run in (None, each.name))


def _revision_row(revision: Revision, aliases: tuple[str, ...]) -> Metadata:
    path, reason = _content(revision)
    return Metadata(
        revision.name, path, revision.run, **asdict(revision.facts), kind="adapter", base=_base_of(revision),
        rank=revision.rank, size=revision.size, digest=revision.digest, created=revision.created,
        state="refused" if reason else "finished", reason=reason, aliases=aliases,
    )  # fmt: skip


def _content(stored: Kept | Revision) -> tuple[str, str | None]:
    """Where it is, and why it can't be used."""
    try:
        return str(content_of(stored)), None
    except InvalidFile as error:
        return str(stored.folder), str(error)


def _base_of(revision: Revision) -> str | None:
    try:
        return read_config(revision.folder).base
    except (InvalidFile, OSError):
        return None
