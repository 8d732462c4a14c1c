"""A machine's store that stands for a shared one: each change is made in the bucket first, and then here.

What others change there is taken in run by run: files first, and then the record, by `bring` and `agree`.
"""

from __future__ import annotations

import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from lorakit.errors import Conflict, Incomplete, LorakitError
from lorakit.files.folders import write_json
from lorakit.store.catalog import Facts, Finish, Label, Revision
from lorakit.store.mixes import RUN as MIXES
from lorakit.store.remote.address import parse_store
from lorakit.store.remote.agreeing import agree, state_here
from lorakit.store.remote.contents import fetch_revision, send_revision
from lorakit.store.remote.objects import Objects, Unreachable
from lorakit.store.remote.runs import SharedRuns
from lorakit.store.remote.state import Move, Recorded, RunState, key_of
from lorakit.store.splits import Split
from lorakit.store.store import Source, Store

JOINED = "joined"  # a folder of files, one for each bucket and base that all of a home is in
_BY_ITSELF = (
    "follow",
    "automatic rollback",
    "shadow dropped",
)  # what begins the reason of a move that nobody asked for


class Overtaken(Conflict):
    """Another machine has changed the same meanwhile: what it left is to be looked at first."""


class SharedStore(Store):
    """As `Store`, for several machines. Nothing is written to the bucket before `join`.

    Raises, from all that changes something:
        Unreachable: the bucket does not answer; nothing is changed here.
        Overtaken: a move that nobody asked for was decided on what holds no more.
    """

    def __init__(self, home: Path, base: str, address: str, *, or_read: bool = False) -> None:
        super().__init__(home, base, or_read=or_read)
        self.objects = Objects(parse_store(address))
        self.shared = SharedRuns(self.objects, base)
        self.is_joined = False
        self.trouble: LorakitError | None = None  # why the bucket could not be reached when it was asked last
        self._id = uuid.uuid4().hex
        self._agreed: dict[str, str] = {}  # the last change of each run that all here is by
        self._taken: dict[str, str] = {}  # the same, as far as the files are here
        self._lock = threading.Lock()

    # with the bucket

    def join(self) -> None:
        """Look at all that is there; and where this home was never part of it, or the bucket has nothing of a run, send
        what is here.

        Raises:
            Unreachable, NotFound, Refused: as `Objects`; or the bucket knows no conditional writes.
        """
        self.objects.ensure_conditions()
        self.shared.look()
        file = self._joined_file()
        for name in self.runs().keys() - {MIXES}:
            known = self.shared.state(name)
            if not self.unwritable and (known is None or not file.is_file()) and name not in self.shared.unreadable:
                self._send_all(name)
        self.is_joined = True
        if not self.unwritable and not file.is_file():
            file.parent.mkdir(exist_ok=True)
            write_json(file, {"store": str(self.objects.address), "base": self.base})

    def _send_all(self, name: str) -> None:
        local = state_here(self._database, self.base, name)
        known = self.shared.state(name)
        for digest in local.digests - (known.digests if known is not None else set()):
            send_revision(self.objects, self._folder(digest))
        self.shared.change(name, lambda state: state.joined_by(local))

    def _joined_file(self) -> Path:
        named = hashlib.sha256(f"{self.objects.address}\n{self.base}".encode()).hexdigest()
        return self.home / JOINED / f"{named[:32]}.json"

    def look(self) -> list[str]:
        """Ask what has changed: the runs that this machine is behind in."""
        self.shared.changed()
        with self._lock:
            for name in list(self.shared.set_back):  # to what may have been taken over once
                self._agreed.pop(name, None)
                self._taken.pop(name, None)
        return [name for name in self.shared.names if self.is_behind(name)]

    def is_behind(self, name: str) -> bool:
        state = self.shared.state(name)
        return state is not None and self._agreed.get(name) != state.change

    def missing(self, name: str) -> list[Recorded]:
        """The revisions of a run whose files are not here: first those that aliases need, then the newest."""
        state = self.shared.state(name) or RunState()
        order = {one.key: number for number, one in enumerate(state.finishes)}
        absent = [one for one in state.revisions.values() if not self._folder(one.digest).is_dir()]
        return sorted(absent, key=lambda one: (one.key not in state.named, -order.get(one.key, -1)))

    def bring(self, digest: str, check: Callable[[Path], None]) -> None:
        """Have the files of a revision here. `check` may refuse them, by raising, before they are.

        Raises:
            Incomplete: they are not all in the bucket yet, or did not all arrive.
            InvalidFile: they are not what the digest says.
        """
        with self.staging() as staged:
            fetch_revision(self.objects, digest, staged)
            check(staged)
            self.keep(staged)

    def agree(self, name: str, refused: Collection[str] = ()) -> None:
        """Have the record of a run here be as the bucket's, as far as its files are; `refused` are digests that are not
        to come."""
        with self._lock:
            state = self.shared.state(name)
            if state is None:
                return
            lacking = self._write(name, state)
            self._taken[name] = state.change
            if lacking <= set(refused):
                self._agreed[name] = state.change

    def _write(self, name: str, state: RunState) -> set[str]:
        """The digests of what could not be, as its files are not here."""
        if state.forgotten:
            super().forget(name)
            return set()
        with self._database.change() as db:
            here = {digest for digest in state.digests if self._folder(digest).is_dir()}  # none leaves meanwhile
            agree(db, self.base, name, state, here)
        return state.digests - here

    def _folder(self, digest: str) -> Path:
        return self.home / "revisions" / digest

    # changes

    def ensure_reachable(self) -> None:
        if self.trouble is not None:
            raise self.trouble
        self._ensure_joined()

    def _ensure_joined(self) -> None:
        if self.unwritable is not None:
            raise self.unwritable
        if not self.is_joined:
            raise self.trouble or Unreachable(f"'{self.objects.address}' was not looked at yet: try again in a moment")

    def _change(self, name: str, transition: Callable[[RunState], RunState]) -> None:
        """In the bucket, and then here; whoever asked for it brings memory in line."""
        self._ensure_joined()
        before, after = self.shared.change(name, transition)
        with self._lock:
            latest = self.shared.state(name) or after  # which is newer, if others were quick
            self._write(name, latest)
            for known in (self._agreed, self._taken):
                if latest is after and known.get(name, "") == before.change:
                    known[name] = after.change

    def add(
        self, run: str, kind: Label, digest: str, facts: Facts, *, rank: int, size: int, path: str, source: Source,
        repaired: str | None, finished: bool, late: bool = False,
    ) -> tuple[Revision, Finish | None]:  # fmt: skip
        self._ensure_joined()
        if not self._folder(digest).is_dir():
            raise Incomplete(f"the files of {digest[:8]} were removed while they were taken in: try again")
        send_revision(self.objects, self._folder(digest))
        key, looked_before = key_of(kind, facts.step, digest), self.source(run, path) is not None
        recorded = Recorded(kind, digest, facts, rank, size, path, time.time(), uuid.uuid4().hex, repaired)
        finishes: list[int] = []

        def with_it(state: RunState) -> RunState:
            added = state.with_added(
                run, recorded, finished=finished, late=late, by=self._id, stamp=source.weights_signature,
                looked_before=looked_before,
            )  # fmt: skip
            finishes[:] = [one.attempt for one in added.finishes[len(state.finishes) :]]
            return added

        self._change(run, with_it)
        with self._database.change() as db:
            db.execute(
                "INSERT OR REPLACE INTO sources (base, run, path, signature, weights_signature) VALUES (?, ?, ?, ?, ?)",
                (self.base, run, path, source.signature, source.weights_signature),
            )
        found = self._by_key(run).get(key)
        if found is None:
            raise Incomplete(f"{digest[:8]} was removed again by another server: try again")
        return found, Finish(found.id, finishes[0]) if finishes else None

    def move_alias(
        self, run: str, alias: str, revision: int, why: str, *, pinned: bool | None = None,
        passed_over: Mapping[int, str] | None = None, split: Split | None = None,
    ) -> None:  # fmt: skip
        here = state_here(self._database, self.base, run)
        keys = {id: self._key(id) for id in {revision, *(passed_over or ()), *(split.members if split else ())}}
        shares = {keys[id]: min(1.0, share) for id, share in split.shares.items()} if split is not None else {}
        shadows = tuple(keys[id] for id in split.shadows) if split is not None else ()
        over = {keys[id]: reason for id, reason in (passed_over or {}).items()}
        move = Move(keys[revision], why, time.time())
        needed = [here.revisions[key] for key in (move.key, *shares, *shadows) if key in here.revisions]
        by_itself = why.startswith(_BY_ITSELF)

        def with_it(state: RunState) -> RunState:
            if state.forgotten or (by_itself and not _is_as_decided(state, here, alias, move.key)):
                raise Overtaken(f"another server has changed '{run}' meanwhile: look again")
            return state.with_moved(
                alias, move, pinned=pinned, passed_over=over, shares=shares, shadows=shadows,
                seed=split.seed if split is not None else 0, lost=needed,
            )  # fmt: skip

        known = self.shared.state(run)
        if by_itself and known is not None and self._taken.get(run) != known.change:
            raise Overtaken(f"another server has changed '{run}' meanwhile: look again")
        self._change(run, with_it)

    def pass_over(self, run: str, revision: int, reason: str) -> None:
        """Have no alias move there by itself, on no machine."""
        key = self._key(revision)
        self._change(run, lambda state: state.with_passed_over(key, reason))

    def forget(self, run: str) -> list[Path]:
        folders = {revision.folder for revision in self._by_key(run).values()}
        self._change(run, lambda state: state.forgotten_now())
        return sorted(folders)

    def remove(self, revisions: Collection[int]) -> tuple[list[int], list[Path]]:
        rows = self._database.rows(
            f"SELECT id, run, digest FROM revisions WHERE id IN ({','.join('?' * len(revisions))})", tuple(revisions)
        )
        for run in {row[1] for row in rows}:
            keys = {self._key(row[0]) for row in rows if row[1] == run}
            self._change(run, lambda state, keys=keys: state.without(keys))  # type: ignore[misc]
        left = {id for run in {row[1] for row in rows} for id in (one.id for one in self._by_key(run).values())}
        gone = [row for row in rows if row[0] not in left]
        return [row[0] for row in gone], sorted({self._folder(row[2]) for row in gone})

    def _by_key(self, run: str) -> dict[str, Revision]:
        found = self.run(run)
        revisions = found.revisions.values() if found is not None else ()
        return {key_of(one.kind, one.facts.step, one.digest): one for one in revisions}

    def _key(self, revision: int) -> str:
        """Raises Overtaken where it was removed meanwhile."""
        rows = self._database.rows("SELECT kind, step, digest FROM revisions WHERE id = ?", (revision,))
        if not rows:
            raise Overtaken("another server has removed the revision meanwhile: look again")
        return key_of(*rows[0])


def _is_as_decided(state: RunState, here: RunState, alias: str, target: str) -> bool:
    """Whether a move that nobody asked for may be made of it: nothing that it was decided on is another."""
    there, known = state.aliases.get(alias), here.aliases.get(alias)
    same = there is known if there is None or known is None else there.means_as(known)
    return same and state.pinned == here.pinned and target not in state.passed_over and target in state.revisions


def leave_all(home: Path) -> None:
    """A server without a shared store runs on this home: what it takes in is in no bucket, and is sent by the next that
    joins one."""
    for file in (home / JOINED).glob("*.json"):
        file.unlink(missing_ok=True)
