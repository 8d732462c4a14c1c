"""See every checkpoint that appears in an output folder, and hold each one as soon as it is finished.

Level-triggered: what is there is compared with what was held, whenever there may be something new. A checkpoint that
one look can't call finished counts once it was left alone for a while, or its program has ended.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lorakit.checkpoints.finished import QUIET, Look, look_at
from lorakit.checkpoints.places import LocalPlace
from lorakit.checkpoints.recognise import recognise
from lorakit.checkpoints.writers.torch_keys import is_tensor, keys_in
from lorakit.training.capturing.appearing import (
    Spot,
    Stamp,
    is_beside,
    is_checkpoint_name,
    is_weights,
    spots_in,
    stamp_of,
)  # fmt: skip
from lorakit.training.capturing.holding import Held, hold
from lorakit.training.capturing.notices import Notices


@dataclass(frozen=True, slots=True)
class Missed:
    """A checkpoint that is not in the store, by its name in the output folder, with the reason: `lost` was gone before
    it could be kept, `failed` is finished but can't be put there, `left` is not finished; the last two stay in place.
    """

    what: Literal["lost", "failed", "left"]
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """A spot as it is since `since`, on a clock that only goes on; `taken` is the stamp that it was held with last."""

    spot: Spot
    stamp: Stamp
    since: float
    look: Look
    taken: Stamp | None = None

    def is_due(self, now: float, ended: bool) -> bool:
        if self.taken == self.stamp or self.look.state == "incomplete":
            return False
        return self.look.state == "finished" or ended or now - self.since >= QUIET

    @property
    def is_checkpoint(self) -> bool:
        return self.look.writer is not None or is_checkpoint_name(self.spot.path)


class Watch:
    """What of `output` was seen, and held under `holds`.

    `before`: the stamps of what was there already, or was taken by another, by name.
    """

    def __init__(self, output: Path, holds: Path, before: Mapping[str, Stamp]) -> None:
        self.output = output
        self.holds = holds
        self.notices = Notices()
        self.changed = 0.0  # when a checkpoint last differed from what it was, on the clock of `scan`
        self._before = dict(before)
        self._seen: dict[str, _Seen] = {}
        self._written: Counter[Path] = Counter()

    def scan(self, now: float, *, ended: bool = False) -> tuple[list[Held], list[Missed]]:
        """Hold what is finished now, in the order in which it was written; say what went away before it could be.

        Args:
            now: seconds on a clock that only goes on.
            ended: nobody writes any more.

        Raises:
            OSError: nothing can be held there.
        """
        self.notices.watch(self.output)
        self._written += self.notices.written()
        missing = self._overflowed()
        there = {spot.name: stamp for spot in spots_in(self.output) if (stamp := self._see(spot, now)) is not None}
        due = [one for name in there if (one := self._seen[name]).is_due(now, ended)]
        held = []
        for one in sorted(due, key=lambda one: (one.stamp.written, one.spot.own is not None)):
            if (taken := hold(one.spot, one.stamp, self.holds)) is not None:
                held.append(taken)
                self._seen[one.spot.name] = replace(one, taken=one.stamp)
                self._written += self.notices.written()
                missing += self._passed_over(one.spot)
        if ended:
            unheld = (self._seen[name] for name in there)
            missing += [lost for one in unheld if one.is_checkpoint for lost in self._passed_over(one.spot)]
        return held, [*missing, *self._missing(there)]

    def forget(self, name: str, stamp: Stamp) -> None:
        """What was held with that stamp was written to, so what is there now is to be held again."""
        known = self._seen.get(name)
        if known is not None and known.taken == stamp:
            self._seen[name] = replace(known, taken=None)

    def left(self) -> list[Missed]:
        """Checkpoints that are there as the last scan saw them, and were not held: they are not finished."""
        unheld = [one for one in self._seen.values() if one.taken != one.stamp and one.is_checkpoint]
        return [Missed("left", one.spot.name, one.look.reason) for one in unheld]

    def may_be_held(self) -> bool:
        """Whether anything is finished, and could not be held."""
        return any(one.taken != one.stamp and one.look.state != "incomplete" for one in self._seen.values())

    def held(self) -> list[Spot]:
        """What is there and was held as it is."""
        return [one.spot for one in self._seen.values() if one.taken == one.stamp]

    def _see(self, spot: Spot, now: float) -> Stamp | None:
        """How it is now, or was when it began to be removed."""
        stamp = stamp_of(spot)
        if stamp is None:
            return None
        self.notices.watch(spot.path.parent)
        if spot.path.is_dir():
            self.notices.watch(spot.path)
        known = self._seen.get(spot.name)
        taken = known.taken if known else self._before.get(spot.name)
        if taken is not None and (stamp == taken or stamp.is_less_of(taken)):
            self._seen[spot.name] = _Seen(spot, taken, now, known.look if known else look_at(spot.path), taken)
            self._versions(spot)
            return taken
        if known is None or known.stamp != stamp:
            seen = _Seen(spot, stamp, now, _looked_at(spot), taken)
            self.changed = now if seen.is_checkpoint else self.changed
        else:
            seen = replace(known, look=_looked_at(spot))
        self._seen[spot.name] = seen
        return stamp

    def _missing(self, there: dict[str, Stamp]) -> list[Missed]:
        """What went away before it was held as it was last. What appears under the name again is another."""
        gone = [self._seen.pop(name) for name in [name for name in self._seen if name not in there]]
        parts = _of((one.spot for one in self._seen.values()), {one.spot.path for one in gone})  # of a root, by now
        gone = [one for one in gone if one.spot.path not in parts]
        renamed = {file for stamp in there.values() for file in stamp.files} if gone else set()
        lost = [
            Missed("lost", one.spot.name, f"it was removed before it could be held; when last seen: {one.look.reason}")
            for one in gone
            if one.taken != one.stamp and one.is_checkpoint and (not one.stamp.files or one.stamp.files - renamed)
        ]
        lost += [miss for one in gone for miss in self._passed_over(one.spot, last_held=one.taken == one.stamp)]
        spots = [one.spot for one in (*gone, *self._seen.values()) if one.is_checkpoint]
        named = {path for path in self._written if is_checkpoint_name(path) and not path.is_symlink()}
        there_now = {path for path in named if path.exists()}
        lost += [
            Missed("lost", os.path.relpath(path, self.output), "it was written and removed before anybody could look")
            for path in sorted(named - there_now - _of(spots, named))
        ]
        pending = there_now | _of([one.spot for one in self._seen.values()], set(self._written))
        self._written = Counter({path: count for path, count in self._written.items() if path in pending})
        return lost

    def _passed_over(self, spot: Spot, *, last_held: bool = False) -> list[Missed]:
        """What was there before its last version, or with that, since it was held, or this was asked."""
        lost = self._versions(spot) - (not last_held)
        if lost < 1:
            return []
        many = "a version of it was" if lost == 1 else f"{lost} versions of it were"
        return [Missed("lost", spot.name, f"{many} written over or removed before it could be held")]

    def _versions(self, spot: Spot) -> int:
        """How often it was put there, or the same file of its weights was written; from now on that counts anew."""
        written = [path for path in _of([spot], set(self._written)) if path == spot.path or is_weights(path)]
        return max((self._written.pop(path) for path in written), default=0)

    def _overflowed(self) -> list[Missed]:
        if not self.notices.overflowed:
            return []
        self.notices.overflowed = False
        return [Missed("lost", ".", "more was written at once than the kernel could tell of: versions may be missed")]


def _of(spots: Iterable[Spot], paths: set[Path]) -> set[Path]:
    """Those that are one of the spots, or directly in one."""
    own = {spot.path: spot.own for spot in spots}
    inner = {path for path in paths if path.parent in own}
    return paths & own.keys() | {path for path in inner if (names := own[path.parent]) is None or path.name in names}


def _looked_at(spot: Spot) -> Look:
    look = look_at(spot.path)
    if look.kind is not None or look.state not in ("finished", "whole") or _holds_model(spot.path):
        return look
    return replace(look, state="incomplete", writer=None, reason="no model is in it, as far as can be told")


def _holds_model(path: Path) -> bool:
    """Whether a model, or loose tensors, are in it."""
    found, place = recognise(path), LocalPlace(path)
    if found is None or is_beside(path):
        return False
    loose = (is_tensor(value) for name in found.files for value in keys_in(place, name).values())
    return "model" in found.holds or any(loose)
