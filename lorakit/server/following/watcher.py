"""Looks at the watched folders, again and again, for checkpoints that are finished.

Polling is right on every file system; file events only make the next look come sooner. Times are this machine's
monotonic clock, never a file's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.checkpoints.finished import MARKERS, QUIET, STALLED, Look, look_at
from lorakit.checkpoints.retention import in_words
from lorakit.checkpoints.runs import Candidate, candidates_in_run, candidates_of, runs_in
from lorakit.checkpoints.writers.layout import ADAPTER, ADAPTER_CONFIG

GLANCES = 250  # settled checkpoints of one run that one scan asks for changes; of more, in turn
NEWEST = 16  # of each run that every scan asks
RELISTED = 10.0  # seconds after which a run of more is listed again, though its folder has not changed
_DECIDING = ("", ADAPTER, ADAPTER_CONFIG, *MARKERS)  # the folder itself: a file comes, goes or is replaced

Times = tuple[int, int, int, int]  # size, last write, last change, inode
Stamp = tuple[tuple[str, Times], ...]
Listing = Callable[[Path, str], list[Candidate]]
Place = tuple[str, Path]  # a run and a folder: the same folder may have been given two names


@dataclass(frozen=True, slots=True)
class Sight:
    """What one candidate looks like now. `ready`: it may be taken in. `early`: it was there at the first scan.
    `stalled`: it is incomplete, and nothing of it was written for `STALLED` seconds. `written`: when one of the files
    that decide was, in seconds since 1970 by the file system's clock."""

    candidate: Candidate
    look: Look
    ready: bool
    early: bool
    stalled: bool = False
    written: float = 0.0


@dataclass(slots=True)
class _Seen:
    stamp: Stamp
    look: Look
    since: float
    early: bool
    settled: bool = False


@dataclass(slots=True)
class _Run:
    """What a folder listed at one moment, and since when its own times are what they are; `unsettled` are positions,
    None until they are found out."""

    candidates: list[Candidate]
    times: Times | None
    since: float
    listed: float
    unsettled: list[int] | None = None


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
        self._runs: dict[Place, _Run] = {}
        self._first = True
        self._scans = 0
        self.missing: dict[str, Path] = {}

    @property
    def places(self) -> Collection[Place]:
        """What was there at the last scan."""
        return self._seen.keys()

    def scan(self) -> list[Sight]:
        """Every candidate that changed since it was settled, each run's in the order of its steps."""
        before, self._runs = self._runs, {}
        self._list(before)
        sights: list[Sight] = []
        for run in self._runs.values():
            for candidate in self._asked(run):
                seen = self._seen.get(candidate.place)
                if seen is None or not seen.settled or _has_changed(candidate, seen.stamp):
                    run.unsettled = None
                    sights.append(self._look(candidate, seen))
        self._forget_gone(before)
        self._first = False
        self._scans += 1
        return sights

    def _asked(self, run: _Run) -> Iterator[Candidate]:
        """The unsettled ones, and those whose turn it is to be asked for changes. What is written again is seen at the
        next scan, in a run of thousands after some scans, except for its newest."""
        count = len(run.candidates)
        rounds = -(-count // GLANCES)
        if rounds <= 1:
            yield from run.candidates
            return
        if run.unsettled is None:
            run.unsettled = [number for number, one in enumerate(run.candidates) if not self._is_settled(one)]
        turn = range(self._scans % rounds, count, rounds)
        for number in sorted({*run.unsettled, *turn, *range(max(0, count - NEWEST), count)}):
            yield run.candidates[number]

    def _is_settled(self, candidate: Candidate) -> bool:
        seen = self._seen.get(candidate.place)
        return seen is not None and seen.settled

    def _forget_gone(self, before: Mapping[Place, _Run]) -> None:
        listed_anew = [place for place, run in before.items() if self._runs.get(place) is not run]
        gone = {one.place for place in listed_anew for one in before[place].candidates}
        runs = [self._runs[place] for place in listed_anew if place in self._runs]
        for candidate_place in gone - {one.place for run in runs for one in run.candidates}:
            self._seen.pop(candidate_place, None)

    def _list(self, before: Mapping[Place, _Run]) -> None:
        def listed(folder: Path, name: str, listing: Listing = candidates_in_run) -> list[Candidate]:
            if (name, folder) not in self._runs:
                self._runs[name, folder] = self._listed(folder, name, listing, before.get((name, folder)))
            return self._runs[name, folder].candidates

        self.missing = {}
        for name, folder in self._named.items():
            try:
                listed(folder, name, candidates_of)
            except OSError:
                self.missing[name] = folder
        for root in self._roots:
            with suppress(OSError):  # unmounted or removed: what was served of it stays served
                runs_in(root, listed)

    def _listed(self, folder: Path, name: str, listing: Listing, known: _Run | None) -> _Run:
        """To list thousands takes longer than to ask whether their folder has changed: its times say so, but on some
        file systems late, and within one tick of the clock not at all."""
        now, times = self._clock(), _times(os.fspath(folder))
        if known is None or known.times != times:
            return _Run(listing(folder, name), times, now, now)
        is_long = len(known.candidates) > GLANCES
        if is_long and now - known.since >= QUIET and now - known.listed < RELISTED:
            return known
        return _Run(listing(folder, name), times, known.since, now)

    def settle(self, sight: Sight) -> None:
        """Look no further at a candidate until one of its files is written again."""
        seen = self._seen.get(sight.candidate.place)
        if seen is not None and seen.look.signature == sight.look.signature:
            seen.settled = True
            for run in self._runs.values():
                run.unsettled = None

    def _look(self, candidate: Candidate, seen: _Seen | None) -> Sight:
        stamp = _stamp(candidate.folder)  # before the look: what changes meanwhile is seen at the next
        look = look_at(candidate.folder)
        now = self._clock()
        unchanged = seen is not None and seen.look.signature == look.signature
        since = seen.since if seen is not None and unchanged else now
        early = self._first or (seen is not None and seen.early and unchanged)
        self._seen[candidate.place] = _Seen(stamp, look, since, early)
        ready = look.state == "finished" or (look.state == "whole" and unchanged and now - since >= self._quiet)
        stalled = look.state == "incomplete" and now - since >= STALLED
        if stalled:
            look = replace(look, reason=f"{look.reason}; nothing was written for more than {in_words(STALLED)}")
        written = max((times[1] for _, times in stamp), default=0) / 1e9
        return Sight(candidate, look, ready, early, stalled, written)


def _stamp(folder: Path) -> Stamp:
    """Of the few files that decide: cheap enough for thousands of folders a second."""
    path = os.fspath(folder)
    found = ((name, _times(f"{path}/{name}")) for name in _DECIDING)
    return tuple((name, times) for name, times in found if times is not None)


def _has_changed(candidate: Candidate, stamp: Stamp) -> bool:
    """Whether anything that was there at that stamp is not as it was; what is new has changed the folder."""
    path = os.fspath(candidate.folder)
    return not stamp or any(_times(f"{path}/{name}") != times for name, times in stamp)


def _times(path: str) -> Times | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
