"""Put a checkpoint that is on disk into the store, as `lorakit capture` does with each that appears."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lorakit.checkpoints.described import describe
from lorakit.checkpoints.finished import QUIET, Look, last_change, look_at
from lorakit.checkpoints.locate import candidate_at
from lorakit.errors import Incomplete
from lorakit.store.catalog import label_of
from lorakit.store.kept import Described, Kept, keep_checkpoint


@dataclass(frozen=True, slots=True)
class Addition:
    """A finished checkpoint that is to be kept, and `without` what in its folder, such as the others of its run."""

    path: Path
    run: str
    described: Described
    without: frozenset[str]
    look: Look

    @property
    def name(self) -> str:
        """Its ID, less the digest, which its copy has."""
        label = label_of(self.described.place, self.described.step)
        return f"{self.run}@{label}" if label else self.run

    def as_dict(self) -> dict[str, object]:
        return {"path": str(self.path), "name": self.name, "run": self.run, "kind": self.described.kind}


def to_add(path: Path, run: str | None = None) -> Addition:
    """Look at a folder or file, for as long as it takes to see that it is finished.

    Args:
        run: what its run is called in the store; as its folder's without.

    Raises:
        Incomplete: it is not finished, or can't be read.
    """
    place = Path(os.path.realpath(path))
    look = _finished(place)
    candidate = candidate_at(place)
    final = candidate.kind == "final"
    name = candidate.run if run is None else run
    return Addition(place, name, describe(place, name, final=final), _beside(place) if final else frozenset(), look)


def add_checkpoint(addition: Addition, home: Path) -> Kept:
    """Raises as `keep_checkpoint`."""
    return keep_checkpoint(
        home, addition.path, addition.described, run=addition.run, without=addition.without,
        unchanged=lambda: look_at(addition.path).signature == addition.look.signature,
    )  # fmt: skip


def _finished(path: Path) -> Look:
    look = look_at(path)
    if look.state == "whole":
        now = time.time()
        time.sleep(max(0.0, QUIET - (now - last_change(path, now))))
        again = look_at(path)
        if again.signature != look.signature:
            raise Incomplete(f"'{path}' was written to just now: wait for its writer")
    if look.state == "incomplete":
        raise Incomplete(f"'{path}' can't be kept: {look.reason}")
    return look


def _beside(root: Path) -> frozenset[str]:
    """What is in a run's own folder beside the files of its last save."""
    with os.scandir(root) as entries:
        return frozenset(entry.name for entry in entries if not entry.is_file(follow_symlinks=False))
