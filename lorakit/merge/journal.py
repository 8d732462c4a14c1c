"""What an interrupted merge leaves to the next one: the shards that are whole, and what was measured of them."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import Conflict, Refused
from lorakit.files.folders import write_json
from lorakit.merge.plan import PlannedShard

if TYPE_CHECKING:
    from lorakit.merge.rounding import Survival

PART = ".part"
_KEY = ".merge-key.json"
_LINES = ".merge-done.jsonl"


@dataclass(frozen=True, slots=True)
class SurvivalSums:
    """⟨W′-W, Δ⟩, ‖Δ‖² and ‖W‖² of one weight."""

    kept: float
    norm: float
    weight: float

    @property
    def ratio(self) -> float | None:
        """⟨W′-W, Δ⟩ / ‖Δ‖²; None where nothing was rounded."""
        return self.kept / self.norm if self.norm else None


@contextmanager
def take_up_key(folder: Path, key: str, shards: Sequence[PlannedShard]) -> Iterator[list[str]]:
    """While a folder is filled it says what it will be, so that only the very same merge takes it up.

    Gives the names of the shards that are whole already; at the end nothing of this is left in the folder. After an
    error that trying again would only repeat, no merge takes the folder up.
    """
    journal = Journal(folder)
    whole = journal.drop_unfinished(shards)
    if not has_key(folder, key):
        write_json(folder / _KEY, {"key": key})
    try:
        yield whole
    except (Refused, Conflict):
        journal.clear()
        raise
    journal.clear()


def has_key(folder: Path, key: str) -> bool:
    try:
        return bool(json.loads((folder / _KEY).read_text()) == {"key": key})
    except (OSError, ValueError):
        return False


class Journal:
    """One line a finished shard. A shard is whole when it has its own name: it got that after it was synced."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, SurvivalSums]] = {}
        try:
            lines = (folder / _LINES).read_text().splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                name, sums = json.loads(line)
                self._known[name] = {weight: SurvivalSums(*values) for weight, values in sums.items()}
            except (ValueError, TypeError, AttributeError):
                continue  # empty, or the line that a kill cut short

    def whole(self, shards: Sequence[PlannedShard]) -> list[str]:
        """The shards that need no work."""
        return [
            shard.name
            for shard in shards
            if shard.name in self._known
            and (self._folder / shard.name).is_file()
            and (self._folder / shard.name).stat().st_size == shard.target.size
        ]

    def enter(self, shard: str, survivals: Mapping[str, Survival | SurvivalSums]) -> None:
        sums = {name: (one.kept, one.norm, one.weight) for name, one in survivals.items() if one.norm}
        with self._lock:
            self._known[shard] = {name: SurvivalSums(*values) for name, values in sums.items()}
            with (self._folder / _LINES).open("a") as stream:
                stream.write("\n" + json.dumps([shard, sums]) + "\n")  # first an end for a line that was cut short
                stream.flush()
                os.fsync(stream.fileno())

    def survivals(self) -> dict[str, SurvivalSums]:
        return {name: one for sums in self._known.values() for name, one in sums.items()}

    def drop_unfinished(self, shards: Sequence[PlannedShard]) -> list[str]:
        """Remove all that an interrupted run left but the whole shards, and give their names."""
        whole = self.whole(shards)
        for path in self._folder.iterdir():
            if path.name in (_KEY, _LINES, *whole):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        return whole

    def clear(self) -> None:
        """Once all is whole, the result needs no journal; and what can't become whole is for nobody to take up."""
        for name in (_LINES, _KEY):
            (self._folder / name).unlink(missing_ok=True)
