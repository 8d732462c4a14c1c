"""Looks at the watched folders, again and again, for checkpoints that are finished.

Polling is right on every file system; file events only make the next look come sooner. Times are this machine's
monotonic clock, never a file's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.reading import UNFINISHED, WEIGHTS
from lorakit.checkpoints.finished import MARKERS, QUIET, Look, look_at
from lorakit.checkpoints.runs import Candidate, candidates_of, find_candidates

Stamp = tuple[tuple[int, int, int], ...]
Place = tuple[str, Path]  # a run and a folder: the same folder may have been given two names


@dataclass(frozen=True, slots=True)
class Sight:
    """What one candidate looks like now. `ready`: it may be taken in. `early`: it was there at the first scan."""

    candidate: Candidate
    look: Look
    ready: bool
    early: bool


@dataclass(slots=True)
class _Seen:
    stamp: Stamp
    look: Look
    since: float
    early: bool
    settled: bool = False


class Watcher:
    """Remembers what it saw of each folder; `scan` blocks on the file system, so call it off the event loop.

    `roots` are watched folders; `named` are folders that were given a name: an adapter, or a run. Those that are not
    there are in `missing` after a scan.
    """

    def __init__(
        self,
        roots: Sequence[Path],
        named: Mapping[str, Path] | None = None,
        *,
        quiet: float = QUIET,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._roots = list(roots)
        self._named = dict(named or {})
        self._quiet = quiet
        self._clock = clock
        self._seen: dict[Place, _Seen] = {}
        self._first = True
        self.missing: dict[str, Path] = {}

    @property
    def places(self) -> Collection[Place]:
        """What was there at the last scan."""
        return self._seen.keys()

    def scan(self) -> list[Sight]:
        """Every candidate that changed since it was settled, each run's in the order of its steps."""
        sights: list[Sight] = []
        there: set[Place] = set()
        for candidate in self._candidates():
            there.add(candidate.place)
            sight = self._look(candidate)
            if sight is not None:
                sights.append(sight)
        for gone in self._seen.keys() - there:
            del self._seen[gone]
        self._first = False
        return sights

    def _candidates(self) -> list[Candidate]:
        found: list[Candidate] = []
        self.missing = {}
        for name, folder in self._named.items():
            try:
                found += candidates_of(folder, name)
            except OSError:
                self.missing[name] = folder
        for root in self._roots:
            try:
                found += find_candidates(root)
            except OSError:  # unmounted or removed: what was served of it stays served
                continue
        return found

    def settle(self, sight: Sight) -> None:
        """Look no further at a candidate until one of its files is written again."""
        seen = self._seen.get(sight.candidate.place)
        if seen is not None and seen.look.signature == sight.look.signature:
            seen.settled = True

    def _look(self, candidate: Candidate) -> Sight | None:
        stamp = _stamp(candidate.folder)
        seen = self._seen.get(candidate.place)
        if seen is not None and seen.settled and seen.stamp == stamp:
            return None
        look = look_at(candidate.folder)
        now = self._clock()
        unchanged = seen is not None and seen.look.signature == look.signature
        since = seen.since if seen is not None and unchanged else now
        early = self._first or (seen is not None and seen.early and unchanged)
        self._seen[candidate.place] = _Seen(stamp, look, since, early)
        ready = look.state == "finished" or (look.state == "whole" and unchanged and now - since >= self._quiet)
        return Sight(candidate, look, ready, early)


def _stamp(folder: Path) -> Stamp:
    """Of the few files that decide: cheap enough for thousands of folders a second."""
    stamps = []
    for name in (WEIGHTS, "adapter_config.json", UNFINISHED, *MARKERS):
        try:
            status = (folder / name).stat()
            stamps.append((status.st_size, status.st_mtime_ns, status.st_ino))
        except OSError:
            stamps.append((-1, -1, -1))
    return tuple(stamps)
