"""Remove what a person names: a checkpoint of a run, or an id of the store; into the trash, or for good."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from lorakit.checkpoints.finished import CHECKPOINT, look_at
from lorakit.checkpoints.recognise import recognise
from lorakit.errors import Conflict, Incomplete, NotFound, Refused
from lorakit.store.names import model_name
from lorakit.store.serving import in_use
from lorakit.store.store import bases_in, open_store
from lorakit.store.trash import (
    Stored,
    Trashed,
    find_stored,
    purge,
    refuse_held,
    refuse_unprintable,
    remove_path,
    spelled,
    trash_path,
    trash_stored,
)
from lorakit.store.trash_folders import FOLDER, size_of

IN_WORK = 3_600.0  # seconds without a change for which an unfinished checkpoint is taken to be in work


@dataclass(frozen=True, slots=True)
class Removal:
    """What a reference means, and that it may go; `size` in bytes."""

    name: str
    size: int
    what: Stored | Path


def plan_removal(
    reference: str, home: Path, *, force: bool = False, at_once: bool = False, now: float | None = None
) -> Removal:
    """Say what a path or an id means, and make sure that it may go.

    Raises:
        NotFound: there is neither such a path nor such an id.
        UsageError: the id means several.
        Refused: it is no checkpoint, or a run, or being written to; the last not with `force`.
        Conflict: a running server may be asked for it, or have to read what is to go `at_once`; or, unless `force`, an
            alias or a link points at it.
    """
    path = spelled(Path(reference))
    if not reference or not os.path.lexists(path):
        stored = find_stored(reference, home)
        refuse_held(stored, home, force=force, at_once=at_once)
        return Removal(stored.name, stored.size, stored)
    _refuse_no_checkpoint(path, home)
    if not force:
        _refuse_in_work(path, time.time() if now is None else now)
        _refuse_pointed_at(path, home)
    return Removal(str(path), size_of(path), path)


def execute_removal(removal: Removal, home: Path, *, force: bool = False, at_once: bool = False) -> Trashed | None:
    """Remove it: what lies in the trash now; None when it is gone `at_once`, for good.

    Raises:
        NotFound: it went away meanwhile.
        Conflict: it is held by now.
        LorakitError: it can't be removed, and is where it was.
    """
    if isinstance(removal.what, Stored):
        trashed = trash_stored(removal.what, home, force=force, at_once=at_once)
        if at_once:
            purge([trashed], home)
        return None if at_once else trashed
    if at_once:
        remove_path(removal.what, home)
        return None
    return trash_path(removal.what, home)


def _refuse_no_checkpoint(path: Path, home: Path) -> None:
    refuse_unprintable(path)
    if f"/{FOLDER}/" in str(path):
        raise Refused(
            f"'{path}' is in the trash already: `lorakit undelete` lists it, and `lorakit store gc` empties the trash"
        )
    if path.is_symlink():
        raise Refused(f"'{path}' is a link: name what it leads to, or remove the link by hand")
    if path.resolve().is_relative_to(home.resolve()):
        raise Refused(f"'{path}' is the store's own: name it by its id (`lorakit ls --store`)")
    if path.is_dir() and any(CHECKPOINT.fullmatch(name) for name in os.listdir(path)):
        raise Refused(f"'{path}' is a run: name its checkpoints one by one, or see `lorakit prune '{path}' --help`")
    if CHECKPOINT.fullmatch(path.name) is None and recognise(path) is None:
        raise Refused(f"'{path}' is no checkpoint that lorakit knows: remove it by hand")


def _refuse_in_work(path: Path, now: float) -> None:
    look = look_at(path)
    quiet = now - _changed(path)
    if look.state == "incomplete" and quiet < IN_WORK:
        raise Incomplete(
            f"'{path}' is not finished ({look.reason}), and was written to {max(quiet, 0):.0f} s ago: wait for its "
            f"trainer, or remove it all the same with --force"
        )


def _refuse_pointed_at(path: Path, home: Path) -> None:
    """The store has a copy of its own of what it serves; so this guards against the wrong name, no more."""
    real = os.path.realpath(path)
    for beside in sorted(path.parent.iterdir()):
        if beside.is_symlink() and os.path.realpath(beside) == real:
            raise Conflict(f"the link '{beside.name}' leads to '{path}': remove the link first, or give --force")
    serving = in_use(home)
    for base in bases_in(home):
        with open_store(home, base) as store:
            runs = store.runs()
        for run in runs.values():
            pointed_at = [*run.aliases.items(), *((alias, revision.id) for alias, revision in run.split_among())]
            aliased = {id: f"'{model_name(run.name, alias)}'" for alias, id in pointed_at}
            for id, revision in run.revisions.items():
                if not revision.source or os.path.realpath(revision.source) != real:
                    continue
                if user := serving.get((base, id)):
                    raise Conflict(f"'{path}' is in use: {user}; point that at another first, or give --force")
                if id in aliased:
                    raise Conflict(
                        f"the store's {aliased[id]} points at '{path}': point it at another, or give --force"
                    )


def _changed(path: Path) -> float:
    """When anything of it last changed, in seconds since 1970."""
    try:
        times = [path.lstat().st_ctime]
    except OSError:
        raise NotFound(f"'{path}' is gone") from None
    for folder, _, names in os.walk(path):
        for name in (".", *names):
            try:
                times.append(os.lstat(os.path.join(folder, name)).st_ctime)
            except OSError:  # its writer is at work
                return time.time()
    return max(times)
