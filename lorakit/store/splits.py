"""What an alias means where it means several revisions, each for a share of the requests."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, replace
from math import fsum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.store.catalog import Revision
    from lorakit.store.database import Database

ROUNDING = 0.001  # by which each share may be off


@dataclass(frozen=True, slots=True)
class Split:
    """Revisions by id. `shares` are those that answer, in the order in which they were given; 1 together, and where it
    is one alone, there are `shadows`: they answer as well, and are only recorded. By `seed` it is settled whom each
    revision answers."""

    shares: Mapping[int, float]
    shadows: tuple[int, ...] = ()
    seed: int = 0

    @property
    def main(self) -> int:
        """The largest share, of equals the last."""
        return max(reversed(list(self.shares)), key=lambda id: self.shares[id])

    @property
    def is_plain(self) -> bool:
        """Whether it is no more than any alias is."""
        return len(self.shares) == 1 and not self.shadows

    @property
    def members(self) -> tuple[int, ...]:
        return (*self.shares, *self.shadows)

    def as_in(self, other: Split) -> set[int]:
        """The members that answer clients in both, or nobody in both."""
        return (self.shares.keys() & other.shares.keys()) | (set(self.shadows) & set(other.shadows))

    def can_spare(self, id: int) -> bool:
        """Whether there is something to answer without it, which there is with it, too."""
        return id in self.shadows or (id in self.shares and len(self.shares) > 1)

    def without(self, id: int) -> Split:
        """With the share of one that it can spare at the main revision; where it was that, at the largest other."""
        if id not in self.shares:
            return replace(self, shadows=tuple(shadow for shadow in self.shadows if shadow != id))
        left = replace(self, shares={other: share for other, share in self.shares.items() if other != id})
        return replace(left, shares={**left.shares, left.main: left.shares[left.main] + self.shares[id]})

    def among(self, there: Container[int]) -> Split | None:
        """With those alone that are there; None when none of them is to answer."""
        left = self
        for id in self.members:
            if id not in there and not left.can_spare(id):
                return None
            left = left if id in there else left.without(id)
        return left if left.shares else None


def split_said(split: Split, revisions: Mapping[int, Revision]) -> dict[str, Any]:
    """A split as it is told, by the revisions' names."""
    return {
        "shares": [{"revision": revisions[id].name, "share": share} for id, share in split.shares.items()],
        "shadow": [revisions[id].name for id in split.shadows],
        "seed": split.seed,
    }


def are_whole(shares: Collection[float]) -> bool:
    """Whether they are 1 together, but for what each may have been rounded by."""
    return abs(fsum(shares) - 1) <= ROUNDING * len(shares)


# rows


def read_splits(database: Database, base: str) -> dict[tuple[str, str], Split]:
    """All of a base, by run and alias."""
    rows = database.rows(
        "SELECT s.run, s.alias, s.seed, r.revision, r.share FROM splits s JOIN split_revisions r"
        " ON r.base = s.base AND r.run = s.run AND r.alias = s.alias WHERE s.base = ? ORDER BY r.id",
        (base,),
    )
    found: dict[tuple[str, str], Split] = {}
    for run, alias, seed, revision, share in rows:
        split = found.get((run, alias), Split({}, seed=seed))
        if share is None:
            found[run, alias] = replace(split, shadows=(*split.shadows, revision))
        else:
            found[run, alias] = replace(split, shares={**split.shares, revision: share})
    return found


def write_split(db: sqlite3.Connection, alias: tuple[str, str, str], split: Split | None) -> None:
    """Of a base, a run and an alias: its split from now on. Revisions in the trash are out of it again."""
    db.execute("DELETE FROM splits WHERE base = ? AND run = ? AND alias = ?", alias)
    if split is None:
        return
    db.execute("INSERT INTO splits (base, run, alias, seed) VALUES (?, ?, ?, ?)", (*alias, split.seed))
    for id in split.members:
        db.execute("UPDATE revisions SET trashed = NULL WHERE id = ?", (id,))
        db.execute(
            "INSERT INTO split_revisions (base, run, alias, revision, share) VALUES (?, ?, ?, ?, ?)",
            (*alias, id, split.shares.get(id)),
        )
