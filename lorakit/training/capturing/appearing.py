"""What in the folder that a program writes its checkpoints into is one: a folder, a single file, the folder's own root.

Each folder is one checkpoint, whatever it is called, unless it holds checkpoints itself, as a run's does. Files beside
one another in the root are one where a writer is known to leave them so, else each is one of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.checkpoints.places import LocalPlace
from lorakit.checkpoints.writers import folder_written_by, written_by
from lorakit.checkpoints.writers.deepspeed import is_tag

DEPTH = 4  # folders of folders of checkpoints; Lightning's stand in lightning_logs/version_0/checkpoints
OWN = ".lorakit"  # begins the names of what lorakit itself puts there
_NUMBERED = re.compile(r"(model[_-])?(checkpoint|epoch|step|iter|global_step)[-_=]?\d+.*")
_UNFINISHED = re.compile(r"(\.|tmp-).*|.*\.(tmp|part|partial|incomplete|lock)")
_SINGLE = re.compile(r"(?!adapter_model\.safetensors|.*-\d{5}-of-\d{5}\.).*\.(pt|pth|bin|ckpt|safetensors)")
_BESIDE = re.compile(r"(optimizer|scheduler|scaler|rng|random|training_args).*")  # files that go with a root's model
_PART = re.compile(r"pytorch_model_fsdp.*|optimizer.*|zero|global_step\d+.*")  # folders that a checkpoint consists of

Entry = tuple[str, int, int, int]  # path within the spot, size, time of the last write, inode


@dataclass(frozen=True, slots=True)
class Stamp:
    """Of all files of a checkpoint: `digest` differs after any rewrite, `written` is when the last was, in ns."""

    digest: str
    written: int
    entries: frozenset[Entry] = field(default=frozenset(), compare=False)

    def is_less_of(self, other: Stamp) -> bool:
        """Whether all that differs is that files are gone: it is being removed."""
        return self.entries < other.entries

    @property
    def said(self) -> list[Any]:
        """As JSON; see `stamp_said`."""
        return [self.digest, self.written, sorted(self.entries)]

    @property
    def files(self) -> frozenset[tuple[int, int, int]]:
        """Its files whatever they are called: a new one may get the inode of one that was removed."""
        return frozenset((size, written, inode) for _, size, written, inode in self.entries)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a checkpoint is, or will be. `name` is relative to the output folder, `.` for what is in its own root;
    `own` are, for a root, the names that belong to it.
    """

    path: Path
    name: str
    own: frozenset[str] | None = None


def spots_in(output: Path) -> list[Spot]:
    """Every spot below a folder, those of a run before its root; a folder that goes away meanwhile has none."""
    return list(_spots(output, output, DEPTH))


def is_checkpoint_name(path: Path) -> bool:
    """Whether what appeared under this name, and is gone, was a checkpoint as far as anybody can tell."""
    name = path.name
    named = bool(_NUMBERED.fullmatch(name) or _SINGLE.fullmatch(name))
    return named and not _UNFINISHED.fullmatch(name) and not is_beside(path)


def is_beside(path: Path) -> bool:
    """Whether a file's name says that it is of use beside a model alone: an optimizer's, a random state's."""
    return bool(_BESIDE.fullmatch(path.name))


def stamp_of(spot: Spot) -> Stamp | None:
    """By names, sizes, times and inodes; None when it went away."""
    try:
        found = sorted(_entries(str(spot.path), "", spot.own))
    except OSError:
        return None
    digest = hashlib.sha256(repr(found).encode(errors="surrogateescape")).hexdigest()
    return Stamp(digest, max((written for _, _, written, _ in found), default=0), frozenset(found))


def stamp_said(said: Sequence[Any]) -> Stamp:
    """Raises TypeError or ValueError when it is none."""
    digest, written, entries = said
    named = ((name, size, at, inode) for name, size, at, inode in entries)
    return Stamp(str(digest), int(written), frozenset(named))


def is_weights(path: Path) -> bool:
    """Whether a file is called as those that a model is in, of which a checkpoint's writer writes each once."""
    return path.name == "adapter_model.safetensors" or (bool(_SINGLE.fullmatch(path.name)) and not is_beside(path))


def _spots(folder: Path, output: Path, depth: int) -> Iterator[Spot]:
    folders, files = _listed(folder)
    own = _own(folder, files)
    for child in folders:
        path = folder / child
        if child in own:
            continue
        if depth and not _NUMBERED.fullmatch(child) and _holds_checkpoints(path):
            yield from _spots(path, output, depth - 1)
        else:
            yield Spot(path, os.path.relpath(path, output))
    if own:
        yield Spot(folder, os.path.relpath(folder, output), own)
    for name in files:
        if name not in own and _SINGLE.fullmatch(name):
            yield Spot(folder / name, os.path.relpath(folder / name, output))


def _own(folder: Path, files: list[str]) -> frozenset[str]:
    """The names that are one checkpoint in a folder itself; none where each file is one, or there is none yet."""
    try:
        layout = folder_written_by(LocalPlace(folder)) if files else None
    except OSError:
        return frozenset()
    if layout is None or layout.kind is None or "model" not in layout.holds or layout.writer == "deepspeed":
        return frozenset()
    if layout.missing and any(_SINGLE.fullmatch(name) for name in layout.weights):
        return frozenset()
    parts = {name.partition("/")[0] for name in layout.files}
    return frozenset(parts | {name for name in files if _BESIDE.fullmatch(name) or not _SINGLE.fullmatch(name)})


def _holds_checkpoints(folder: Path) -> bool:
    """Whether a folder is not one checkpoint but holds some: numbered ones, `.ckpt` files, or folders of such alone."""
    folders, files = _listed(folder)
    if "latest" in files and "trainer_state.json" not in files and any(is_tag(name) for name in folders):
        return True  # what DeepSpeed saves into
    if any(_PART.fullmatch(name) for name in folders):
        return False
    if any(_NUMBERED.fullmatch(name) for name in folders):
        return True
    if saved := [name for name in files if _SINGLE.fullmatch(name)]:
        return all(name.endswith(".ckpt") for name in saved)
    return not files and any(_holds_any(folder / name) for name in folders)


def _holds_any(folder: Path) -> bool:
    try:
        known = written_by(LocalPlace(folder)) is not None
    except OSError:
        return False
    return known or _holds_checkpoints(folder) or any(_SINGLE.fullmatch(name) for name in _listed(folder)[1])


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in it; without links and what is only being made."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_file(follow_symlinks=False))
                           for entry in entries)  # fmt: skip
    except OSError:
        return [], []
    named = [one for one in found if one[0] == ".metadata" or not _UNFINISHED.fullmatch(one[0])]
    return [name for name, is_folder, _ in named if is_folder], [name for name, _, is_file in named if is_file]


def _entries(path: str, within: str, own: frozenset[str] | None) -> Iterator[Entry]:
    """Raises OSError when it is not there."""
    status = os.lstat(path)
    if not stat.S_ISDIR(status.st_mode):
        yield within, status.st_size, status.st_mtime_ns, status.st_ino
        return
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(OWN) or (own is not None and entry.name not in own):
                continue
            inner = f"{within}/{entry.name}" if within else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path, inner, None)
            else:
                found = entry.stat(follow_symlinks=False)
                yield inner, found.st_size, found.st_mtime_ns, found.st_ino
