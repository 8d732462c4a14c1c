"""The folder of one capture, `$LORAKIT_HOME/captures/<id>`: locked while its process lives, cleared when all is kept.

capture.json   the run, and where the program writes its checkpoints: `output` here, or a folder that was named
output/        the program's, where none was named
input/         the checkpoint that the program was to start from
held/          what is finished and not in the store yet; beside the output where that was named
taken          stamps of what was in the output before, or is in the store, a line of JSON each
trainer.lock   locked while the program lives, and whatever it started
told           instead of capture.json: nothing there can be kept, which was said
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import InvalidFile, disk_errors_named
from lorakit.files.folders import abandoned_folders, locked_folder, read_json, sync_folder, sync_tree, write_json
from lorakit.training.capturing.appearing import OWN, Spot, Stamp, spots_in, stamp_of, stamp_said

FOLDER = "captures"
_SAID, _TOLD = "capture.json", "told"


@dataclass(frozen=True, slots=True)
class Captured:
    """A capture's folder; `is_own` when its program writes into that, too; `run` is empty where that can't be read."""

    folder: Path
    run: str
    output: Path
    is_own: bool

    @property
    def input(self) -> Path:
        return self.folder / "input"

    @property
    def holds(self) -> Path:
        """On the output's own file system, for links."""
        return self.folder / "held" if self.is_own else self.output / OWN / f"capture-{self.folder.name}"

    def trainer_lock(self) -> int:
        """An open file for the program to inherit, locked while any process has it."""
        lock = os.open(self.folder / "trainer.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    @property
    def trainer_lives(self) -> bool:
        """Whether the program that was started lives on, or what it started, wherever that went."""
        with suppress(FileNotFoundError), (self.folder / "trainer.lock").open("rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def record(self, spot: str, stamp: Stamp) -> None:
        """Remember what is in the store; a line that can't be written, or is lost, costs one more copy."""
        with suppress(OSError), (self.folder / "taken").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps([spot, stamp.said]) + "\n")

    def recorded(self) -> dict[str, Stamp]:
        found = {}
        with suppress(OSError):
            for line in (self.folder / "taken").read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError):
                    spot, stamp = json.loads(line)
                    found[spot] = stamp_said(stamp)
        return found

    def forget(self) -> None:
        """Nothing there can be kept any more: it stays, and no later capture names it again."""
        with suppress(OSError):
            (self.folder / _SAID).rename(self.folder / _TOLD)

    def clear(self, kept: Iterable[Spot], *, all_kept: bool) -> bool:
        """Remove what is in the store from the program's own folder, and the capture with it if nothing else is there.

        Whether it is gone; a folder that was named stays as it is.
        """
        shutil.rmtree(self.input, ignore_errors=True)
        if self.is_own:
            for spot in kept:
                _remove(spot)
            _remove_empty(self.output)
        gone = all_kept and not (self.is_own and self.output.exists())
        if gone:
            shutil.rmtree(self.holds, ignore_errors=True)
            with suppress(OSError):
                (self.output / OWN).rmdir()
            shutil.rmtree(self.folder, ignore_errors=True)
        return gone


@contextmanager
def new_capture(home: Path, run: str, output: Path | None) -> Iterator[Captured]:
    """Make the folder; it is locked until the block ends, and stays.

    Raises:
        LorakitError: it, or `output`, can't be made.
    """
    place = home / FOLDER
    with disk_errors_named(place):
        place.mkdir(parents=True, exist_ok=True)
        folder, lock = locked_folder(place, "")
        try:
            captured = Captured(folder, run, output.absolute() if output else folder / "output", output is None)
            with disk_errors_named(captured.output):
                captured.output.mkdir(parents=True, exist_ok=True)
            for spot in spots_in(captured.output):
                if (stamp := stamp_of(spot)) is not None:
                    captured.record(spot.name, stamp)
            said = {"run": run, "output": str(captured.output), "own": captured.is_own}
            write_json(folder / f"{_SAID}.tmp", said)
            sync_tree(folder)
            (folder / f"{_SAID}.tmp").rename(folder / _SAID)
            sync_folder(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            raise
    try:
        yield captured
    finally:
        os.close(lock)


def abandoned_captures(home: Path) -> Iterator[Captured]:
    """Those whose process was killed, or that something was left in; each is locked while it is looked at."""
    for folder, lock in abandoned_folders(home / FOLDER, ""):
        try:
            if (folder / _TOLD).exists():
                continue
            said = read_json(folder / _SAID)
            yield Captured(folder, str(said["run"]), Path(str(said["output"])), bool(said["own"]))
        except (InvalidFile, KeyError):
            if any((folder / "output").glob("*")):
                yield Captured(folder, "", folder / "output", is_own=True)
            else:  # killed before its program was started
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _remove(spot: Spot) -> None:
    for path in [spot.path] if spot.own is None else [spot.path / name for name in spot.own]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _remove_empty(folder: Path) -> None:
    for path, _, _ in os.walk(folder, topdown=False):
        with suppress(OSError):
            os.rmdir(path)
