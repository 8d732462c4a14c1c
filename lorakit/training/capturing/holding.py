"""Hold a checkpoint that is finished, so that its trainer may remove it: links to its files, to copy from at leisure.

A link is made at once, however large the file. It is no copy: what is written into the file shows in it, so what was
held has to be looked at again after it was copied.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import InvalidFile
from lorakit.files.folders import copy_file, read_json, write_json
from lorakit.training.capturing.appearing import OWN, Spot, Stamp, stamp_of, stamp_said

_MAKING = ".making-"
_SAID = "held.json"


@dataclass(frozen=True, slots=True)
class Held:
    """`folder` is what is made for it, `path` the checkpoint in there, with its stamp; `spot` is where it was, `source`
    the stamp that it had there.
    """

    folder: Path
    path: Path
    spot: str
    is_root: bool
    stamp: Stamp
    source: Stamp

    @property
    def is_unchanged(self) -> bool:
        return stamp_of(Spot(self.path, self.spot)) == self.stamp


def hold(spot: Spot, stamp: Stamp, place: Path) -> Held | None:
    """Hold what is there under `place`, on the same file system; None when it is no longer as it was looked at.

    Raises:
        OSError: `place` can't be written.
    """
    making = place / f"{_MAKING}{uuid.uuid4().hex}"
    making.mkdir(parents=True)
    try:
        path = making / spot.path.name
        _link(spot, path)
        held = stamp_of(Spot(path, spot.name))
        if held is None or stamp_of(spot) != stamp:
            return None
        said = {"spot": spot.name, "root": spot.own is not None, "stamp": held.said, "source": stamp.said}
        write_json(making / _SAID, said)
        folder = place / f"{time.time_ns():020}-{uuid.uuid4().hex[:8]}"
        making.rename(folder)
    except FileNotFoundError:  # it was taken away meanwhile
        return None
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return Held(folder, folder / spot.path.name, spot.name, spot.own is not None, held, stamp)


def held_in(place: Path) -> Iterator[Held]:
    """What a process that was killed had held, in the order in which it was; what it had not yet is removed."""
    for folder in sorted(place.iterdir()) if place.is_dir() else []:
        try:
            said = read_json(folder / _SAID)
            path = next(child for child in folder.iterdir() if child.name != _SAID)
            stamp, source = stamp_said(said["stamp"]), stamp_said(said["source"])
            held = Held(folder, path, str(said["spot"]), bool(said["root"]), stamp, source)
        except (InvalidFile, OSError, StopIteration, KeyError, TypeError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        yield held


def release(held: Held) -> None:
    shutil.rmtree(held.folder, ignore_errors=True)


def _link(spot: Spot, target: Path) -> None:
    if not spot.path.is_dir():
        _link_file(spot.path, target)
        return
    target.mkdir()
    for name in os.listdir(spot.path):
        if name.startswith(OWN) or (spot.own is not None and name not in spot.own):
            continue
        inner = Spot(spot.path / name, name)
        if inner.path.is_symlink():
            (target / name).symlink_to(os.readlink(inner.path))
        else:
            _link(inner, target / name)


def _link_file(file: Path, target: Path) -> None:
    try:
        os.link(file, target, follow_symlinks=False)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links, or a file of another user
        copy_file(file, target)
        status = file.stat()
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
