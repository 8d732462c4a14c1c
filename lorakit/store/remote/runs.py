"""The runs of one base in a bucket: one small object each, changed by conditional writes.

Beside them stands one object more, the head, which says what changed last: whoever has seen it need only ask whether it
is another. It is a hint. A writer may die before it is written, so a list of all, with their etags, is asked for every
few seconds as well.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
import uuid
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

from lorakit.errors import Incomplete, LorakitError, Refused
from lorakit.store.names import check_name
from lorakit.store.remote.objects import Lost, Objects, Stored, Unreachable
from lorakit.store.remote.state import RunState, Transition, ensure_whole, read_state, written

ATTEMPTS = 40  # to write what others write at the same time
CHANGES = 64  # that the head remembers
LOOK = 5.0  # seconds between two lists of all runs
AT_ONCE = 8  # objects that are read


class SharedRuns:
    """Remembers what was read. Its methods block, and may be called from any thread.

    Raises, wherever the bucket is asked:
        Unreachable, NotFound, Refused: as `Objects` does.
    """

    def __init__(self, objects: Objects, base: str) -> None:
        self.objects = objects
        self.base = base
        self._folder = f"bases/{hashlib.sha256(base.encode()).hexdigest()[:32]}"
        self._read: dict[str, tuple[Stored, RunState]] = {}
        self._lock = threading.Lock()
        self._head: Stored | None = None
        self._count = -1
        self._looked = -LOOK
        self.unreadable: dict[str, str] = {}  # runs whose object is none, with the reason
        self.set_back: set[str] = set()  # runs that were put back in the bucket, or begun anew, and are taken as that
        self._older: dict[str, str] = {}  # the etags of older ones that the last list named

    def state(self, name: str) -> RunState | None:
        """What was read last; None for a run that is not there."""
        found = self._read.get(name)
        return found[1] if found is not None else None

    @property
    def names(self) -> list[str]:
        """The runs that were read, those that are forgotten among them."""
        return list(self._read)

    def change(self, name: str, transition: Transition) -> tuple[RunState, RunState]:
        """Make a change of a run as it stands in the bucket: what it was before, and what it is now.

        Where another machine was first, the change is made of what that left; `transition` may raise where it is none
        any more. One that changes nothing is not written.
        """
        self._refuse_unreadable(name)
        for attempt in range(ATTEMPTS):
            stored, before = self._read.get(name) or self._fresh(name)
            after = transition(before)
            if after == before:
                return before, before
            after = replace(after, version=before.version + 1, change=uuid.uuid4().hex)
            try:
                ensure_whole(after)
            except ValueError as error:
                raise LorakitError(
                    f"'{name}' was not changed in '{self.objects.address}', as no server could read what it would be: "
                    f"{error}: look again, and report this where it goes on"
                ) from None
            try:
                now = self.objects.write(self._object(name), written(after, self.base), over=stored)
            except Lost:
                found, state = self._fresh(name)
                if state.change != after.change:  # else it was an attempt of our own
                    time.sleep(random.uniform(0, min(0.5, 0.01 * 2 ** min(attempt, 6))))
                    continue
                assert found is not None
                now = found
            self._remember(name, now, after)
            with suppress(LorakitError):  # a list tells of it as well
                self._tell(name)
            return before, after
        raise Unreachable(f"'{name}' was changed in '{self.objects.address}' by others, again and again: try again")

    def changed(self) -> set[str]:
        """The runs that are others than when they were read last, read again. Cheap when there are none."""
        if time.monotonic() - self._looked >= LOOK:
            return self.look()
        head = self.objects.read(f"{self._folder}/head.json", self._head)
        if head is None or head is self._head:
            return set()
        count, last = _read_head(head)
        if count - self._count > len(last) or count < self._count:
            return self.look()
        names = dict.fromkeys(name for number, name in last if number > self._count)
        found = self._refreshed(names)
        self._head, self._count = head, count
        return found

    def look(self) -> set[str]:
        """The same by a list of all."""
        head = self.objects.read(f"{self._folder}/head.json")
        listed = self.objects.listed(f"{self._folder}/runs")
        named = {name.removesuffix(".json"): etag for name, etag in listed.items() if name.endswith(".json")}
        for name in self.unreadable.keys() - named.keys():
            self.unreadable.pop(name, None)
        others = [
            name
            for name, etag in named.items()
            if name not in self._read or self._read[name][0].etag != etag or name in self.unreadable
        ]
        before, self._older = self._older, {}
        found = self._refreshed(others)
        for name in [name for name, etag in self._older.items() if before.get(name) == etag]:
            if self._refresh(name, or_older=True):
                self.set_back.add(name)
                found.add(name)
        if head is not None:
            self._head, self._count = head, _read_head(head)[0]
        self._looked = time.monotonic()
        return found

    def _refreshed(self, names: Collection[str]) -> set[str]:
        if len(names) <= 1:
            return {name for name in names if self._refresh(name)}
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return {name for name, is_new in zip(names, pool.map(self._refresh, names), strict=True) if is_new}

    def _refresh(self, name: str, *, or_older: bool = False) -> bool:
        """Whether it is another. An older version is what a bucket may say that is not of one mind; what two lists in
        succession name, somebody has put there."""
        try:
            check_name(name)
            known = self._read.get(name)
            stored = self.objects.read(self._object(name), known[0] if known else None)
            if stored is None:
                return False
            if known is not None and stored is known[0]:
                self.unreadable.pop(name, None)
                return False
            state = read_state(stored.body, self.base, self._shown(name))
            if self._remember(name, stored, state, or_older=or_older):
                return True
            self._older[name] = stored.etag
            self.unreadable.pop(name, None)
            return False
        except (Unreachable, Incomplete):
            raise
        except LorakitError as error:
            self.unreadable[name] = str(error)
            return False

    def _remember(self, name: str, stored: Stored, state: RunState, *, or_older: bool = False) -> bool:
        with self._lock:
            known = self._read.get(name)
            is_older = known is not None and known[1].version >= state.version
            if is_older and (not or_older or self._older.get(name) != stored.etag):
                return False
            self._read[name] = replace(stored, body=b""), state  # of many runs, what it says is enough
            self.unreadable.pop(name, None)
            return True

    def _fresh(self, name: str) -> tuple[Stored | None, RunState]:
        stored = self.objects.read(self._object(name))
        if stored is None:
            if name in self._read:
                raise Unreachable(
                    f"'{self._shown(name)}' is not there any more, and no server removes it: put it back, or start "
                    f"this server again, which writes it anew"
                )
            return None, RunState()
        state = read_state(stored.body, self.base, self._shown(name))
        self._remember(name, stored, state)
        return stored, state

    def _tell(self, name: str) -> None:
        """Have the others look at a run."""
        place = f"{self._folder}/head.json"
        for _ in range(ATTEMPTS):
            head = self.objects.read(place)
            count, last = _read_head(head) if head is not None else (0, [])
            said = {"count": count + 1, "last": [*last, (count + 1, name)][-CHANGES:]}
            with suppress(Lost):
                self.objects.write(place, json.dumps(said, separators=(",", ":")).encode(), over=head)
                return

    def _refuse_unreadable(self, name: str) -> None:
        if name in self.unreadable:
            raise Refused(self.unreadable[name])

    def _object(self, name: str) -> str:
        return f"{self._folder}/runs/{name}.json"

    def _shown(self, name: str) -> str:
        return f"{self.objects.address}/{self._object(name)}"


def _read_head(head: Stored) -> tuple[int, list[tuple[int, str]]]:
    """How many changes there were, and the last of them with their numbers; none of what can't be read."""
    try:
        said = json.loads(head.body)
        last: Iterable[tuple[int, str]] = said["last"]
        return int(said["count"]), [(int(number), str(name)) for number, name in last]
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return 0, []
