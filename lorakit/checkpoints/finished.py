"""Is a folder or file a checkpoint, of which kind, and is it finished? One rule for every writer, on any file system.

Finished at one look: the file that its writer writes last is there, parses, and is no older than what it covers.
Else what is whole in itself has to stay as it is for a while before it counts: `QUIET` seconds for whoever watches, and
for whoever looks once `STALLED` seconds by the times on the disk.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lorakit.adapters.reading import UNFINISHED
from lorakit.checkpoints.places import LocalPlace, Place, RemotePlace, entry_of
from lorakit.checkpoints.retention import in_words
from lorakit.checkpoints.trainer_state import FILE as TRAINER_STATE
from lorakit.checkpoints.whole import read_object, what_is_cut_short
from lorakit.checkpoints.writers import written_by
from lorakit.checkpoints.writers.layout import (
    ADAPTER,
    ADAPTER_CONFIG,
    CHECKPOINT,
    PICKLED,
    Kind,
    LastWord,
    Layout,
    Writer,
    WriterName,
    folders,
)
from lorakit.errors import InvalidFile
from lorakit.files.provenance import FILE as PROVENANCE

__all__ = [
    "CHECKPOINT", "MARKERS", "NO_PERMISSION", "PICKLED", "QUIET", "STALLED", "Look", "is_adapter",
    "last_change", "look_at", "look_at_url", "look_once", "settled",
]  # fmt: skip

QUIET = 2.0  # seconds
STALLED = 3600.0  # seconds without a change after which an unfinished one is taken for given up

State = Literal["finished", "whole", "incomplete", "refused"]
ANYBODYS = ("STABLE", ".done", "commit_success.txt")  # last files that say nothing but that
MARKERS = (TRAINER_STATE, *ANYBODYS)
_TEMPORARY = r"\.tmp.*|.*\.(tmp|partial|part|incomplete)"
_TEMPORARY_FILE = re.compile(_TEMPORARY)
_TEMPORARY_FOLDER = re.compile(rf"{_TEMPORARY}|tmp-checkpoint-.*|.*\.orbax-checkpoint-tmp.*")
NO_PERMISSION = (
    "permission denied (safetensors 0.8 and later write files with mode 0600, for their own user alone: "
    "run both as one user, or chmod the file)"
)


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a folder or file showed. `finished` needs no other; `whole` counts after quiet time; `refused`
    is never opened here. `signature` changes whenever a file that counts is written again; `vouched_by` is the file
    that says the writing is done, `outdated` the one that would, were nothing newer than it."""

    path: Path
    state: State
    reason: str
    kind: Kind | None = None
    writer: WriterName | None = None
    signature: str = ""
    weights_signature: str = ""
    vouched_by: str | None = None
    outdated: str | None = None


def look_at(path: Path) -> Look:
    """Judge a folder or file by what is there now. Never waits; what goes away meanwhile is incomplete."""
    return _looked_at(LocalPlace(path), path)


def look_once(path: Path) -> Look:
    """As `look_at`, for whoever looks no second time: what was left alone for long enough is finished, too."""
    return settled(look_at(path))


def settled(look: Look) -> Look:
    """What is whole is finished when nothing of it was written for `STALLED` seconds; till then, with what helps."""
    if look.state != "whole":
        return look
    now = time.time()
    try:
        quiet = now - last_change(Path(os.path.realpath(look.path)), now)
    except OSError as error:
        return replace(look, state="incomplete", reason=f"a file went away or can't be read yet: {error}")
    if quiet >= STALLED:
        return replace(look, state="finished", reason=f"whole, and unchanged for {in_words(quiet)}")
    if look.outdated:
        marker = look.path / look.outdated
        return replace(look, reason=f"{look.reason}; if it is a copy, `touch {shlex.quote(str(marker))}`")
    cure = f"`lorakit check` waits and sees, and after {in_words(STALLED)} it counts"
    return replace(look, reason=f"{look.reason}; {cure}")


def last_change(path: Path, now: float) -> float:
    """When a file, or anything in a folder, changed last, in seconds since 1970: a copy that keeps its source's times
    changed when it was made, and a write to come is none, where the change is not. The checkpoints in a run's own
    folder are others. Raises OSError."""
    status = path.lstat()
    newest = _changed(status, now)
    if stat.S_ISLNK(status.st_mode):
        with suppress(OSError):  # it leads nowhere
            newest = max(newest, _changed(path.stat(), now))
    elif stat.S_ISDIR(status.st_mode):
        with os.scandir(path) as entries:
            for entry in entries:
                if not CHECKPOINT.fullmatch(entry.name):
                    with suppress(FileNotFoundError):
                        newest = max(newest, last_change(Path(entry.path), now))
    return newest


def _changed(status: os.stat_result, now: float) -> float:
    return max(min(status.st_ctime, now), status.st_mtime if status.st_mtime <= now else 0.0)


def examine(path: Path) -> tuple[Look, Layout | None]:
    """As `look_at`, and what was found there."""
    place = LocalPlace(path)
    look = _looked_at(place, path)
    try:
        found = written_by(place)
    except OSError:
        found = None
    return look, found[1] if found else None


def look_at_url(url: str, **options: Any) -> Look:
    """The same of `s3://…`, `gs://…` or whatever fsspec knows; `options` are that file system's.

    Raises:
        ImportError: there is no support for such addresses here.
    """
    return _looked_at(RemotePlace.of(url, **options), Path(url))


def _looked_at(place: Place, path: Path) -> Look:
    try:
        return _judged(place, path)
    except PermissionError as error:
        name = Path(error.filename).name if error.filename else path.name
        return Look(path, "incomplete", f"{name} can't be read: {NO_PERMISSION}")
    except OSError as error:
        return Look(path, "incomplete", f"a file went away or can't be read yet: {error}")


def _judged(place: Place, path: Path) -> Look:
    everything = _signature(place, place.entries) or "empty"
    if _TEMPORARY_FOLDER.fullmatch(place.name):
        return Look(path, "incomplete", f"its name, {place.name}, says that it is being written", signature=everything)
    if UNFINISHED in place.entries:
        reason = f"the trainer is still writing it: {UNFINISHED} is there"
        return Look(path, "incomplete", reason, signature=everything)
    found = written_by(place)
    if found is None:
        return Look(path, "incomplete", "no file of a checkpoint is there yet", signature=everything)
    writer, layout = found
    words = list(_words(place, writer, layout))
    state, reason, vouched_by, outdated = _state(place, layout, words)
    if layout.refusal:
        state, reason = "refused", layout.refusal
    if state == "incomplete":
        everything = _signature(place, (*place.entries, *layout.files))
        return Look(path, state, reason, layout.kind, layout.writer, everything)
    counted = (*layout.files, *(word.file for word in words))
    return Look(
        path, state, reason, layout.kind, layout.writer,
        _signature(place, counted), _signature(place, layout.weights), vouched_by, outdated,
    )  # fmt: skip


def _state(place: Place, layout: Layout, words: list[LastWord]) -> tuple[State, str, str | None, str | None]:
    """State, reason, the file that vouches for it, and the one that is too old to."""
    if problem := _what_is_missing(place, layout):
        return "incomplete", problem, None, None
    newest = _newest(place, layout.covered)
    against = [_against(word, newest) for word in words]
    vouching = [word for word, complaint in zip(words, against, strict=True) if complaint is None]
    if writing := _being_written(place, max((word.written for word in vouching), default=newest[0])):
        return "incomplete", f"{writing} is being written", None, None
    if vouching:
        return "finished", f"{vouching[0].file} is there, its writer's last file", vouching[0].file, None
    if partly := next((word.against for word in words if word.partly), None):
        return "incomplete", partly, None, None
    outdated = next((word.file for word in words if word.against is None), None)
    return "whole", next(filter(None, against), "nothing says yet that its writer is done"), None, outdated


def _what_is_missing(place: Place, layout: Layout) -> str | None:
    if layout.missing:
        return f"{layout.missing[0]} is not there yet"
    problems = (what_is_cut_short(place, name) for name in layout.files)
    if problem := next(filter(None, problems), None):
        return problem
    if layout.kind is None and layout.writer not in ("torch", "lightning"):
        return _where_it_is(place) or "neither an adapter nor a model is there yet"
    return None


def _where_it_is(place: Place) -> str | None:
    """PEFT gives a folder to an adapter that is not called `default`."""
    inner = next((name for name in folders(place) if ADAPTER_CONFIG in place.inside(name).entries), None)
    return f"its adapter is in {inner}/: name '…/{place.name}/{inner}'" if inner else None


def _words(place: Place, writer: Writer, layout: Layout) -> Iterable[LastWord]:
    """Whatever there says that the writing is done, its writer's own word first."""
    own = writer.last_word(place, layout)
    if own is not None:
        yield own
    for name in ANYBODYS:
        if name in place.entries:
            yield LastWord(name, place.entries[name].written)
    if PROVENANCE in place.entries:
        yield _provenance(place, layout)


def _provenance(place: Place, layout: Layout) -> LastWord:
    """lorakit's own folders appear whole; a copy of one need not have its times in order."""
    written = place.entries[PROVENANCE].written
    try:
        read_object(place, PROVENANCE)
    except InvalidFile:
        return LastWord(PROVENANCE, written, f"{PROVENANCE} is only partly there")
    return LastWord(PROVENANCE, written, timeless=layout.writer == "lorakit")


def _against(word: LastWord, newest: tuple[int, str]) -> str | None:
    if word.against or word.timeless or newest[0] <= word.written:
        return word.against
    return f"{newest[1]} is newer than {word.file}, its writer's last file"


def _newest(place: Place, names: Iterable[str]) -> tuple[int, str]:
    """When the newest of these files was written, and which it is."""
    entries = ((entry_of(place, name), name) for name in names)
    return max(((entry.written, name) for entry, name in entries if entry is not None), default=(0, ""))


def _being_written(place: Place, since: int) -> str | None:
    """A temporary file that nobody has finished since: what a killed writer left is older than what came after it."""
    for name, entry in place.entries.items():
        if _TEMPORARY_FILE.fullmatch(name) and not entry.is_folder and entry.written > since:
            return name
    return None


def _signature(place: Place, names: Iterable[str]) -> str:
    """Sizes, times and inodes: cheap, and different after any rewrite."""
    stamps = ((name, entry_of(place, name)) for name in sorted(set(names)))
    return ";".join(f"{name}:{entry.stamp}" for name, entry in stamps if entry is not None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, finished or not."""
    return (folder / ADAPTER_CONFIG).exists() or (folder / ADAPTER).exists()
