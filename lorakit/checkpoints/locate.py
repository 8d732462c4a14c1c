"""From what a person types to a checkpoint: a folder or file, a run, a name in the store, a hub id."""

from __future__ import annotations

import filecmp
import logging
import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.reading import WEIGHTS, load_adapter
from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.metadata import newest_finished
from lorakit.checkpoints.runs import Candidate, checkpoints_in, checkpoints_of
from lorakit.errors import InvalidFile, NotFound, UsageError
from lorakit.files.addresses import without_secrets
from lorakit.files.hub import hub_folder, looks_like_hub_id
from lorakit.store.catalog import Revision
from lorakit.store.kept import Kept, find_kept, kept_in
from lorakit.store.names import split_model
from lorakit.store.store import bases_in, default_home, open_store

HUB_PATTERNS = ("adapter_*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
SHOWN = 5  # names in an error
VERIFY = "`lorakit store verify` says what else is damaged in the store"

log = logging.getLogger("lorakit.checkpoints")  # the command line shows what is said here on stderr


def open_adapter(reference: str) -> Adapter:
    """Open the adapter that `reference` names: as `checkpoint_folder`, or `hub-id` and `hub-id@revision`.

    Raises:
        NotFound: there is nothing of that name, here or on the hub; or it is a run without a finished checkpoint.
        UsageError: the store has that name for several bases.
        Incomplete, InvalidFile: as `load_adapter`.
    """
    path = find_checkpoint(reference)
    if path is None:
        if not looks_like_hub_id(reference):
            raise nothing_named(reference, "adapter folder")
        return load_adapter(on_hub(reference, what="adapter", patterns=HUB_PATTERNS))
    if not path.is_dir():
        hint = f"name its folder, '{path.parent}'" if path.name.startswith("adapter_") else "name the folder of one"
        raise InvalidFile(f"'{path}' is a file, and an adapter is a folder: {hint}")
    return load_adapter(path)


def checkpoint_folder(reference: str) -> Path:
    """The folder, or the single file, of the checkpoint that `reference` names.

    A run stands for its newest finished checkpoint; a run whose own folder holds what its trainer saved last, for that;
    and which of them it is, is said. A name in the store stands for the folder there.

    Raises:
        NotFound: there is nothing of that name, with the nearest there is; or it is a run without a finished
            checkpoint, or a folder of runs.
        UsageError: the store has that name for several bases.
        InvalidFile: what the store has of it is damaged.
    """
    path = find_checkpoint(reference)
    if path is None:
        raise nothing_named(reference)
    return path


def find_checkpoint(reference: str) -> Path | None:
    """As `checkpoint_folder`; None when there is neither a path of that name, nor such a name in the store."""
    path = Path(reference)
    if path.is_dir():
        return _of_folder(path)
    if path.exists():
        return path
    found = find_stored(reference)
    return None if found is None else content_of(found)


def _of_folder(folder: Path) -> Path:
    try:
        found = checkpoints_of(folder)
    except NotFound:
        if checkpoints_in(folder):
            raise
        return folder  # whoever asked knows better what is missing in it
    except PermissionError:  # and whether it may be read
        return folder
    others = [candidate for candidate in found if not is_at(candidate, folder)]
    if not others:
        return folder
    if len(others) < len(found) and look_at(folder).state in ("finished", "whole"):
        newest_other = os.path.relpath(others[-1].folder, folder)
        log.info("'%s' stands for what its trainer saved last, not for %s in it", folder, newest_other)
        return folder
    newest = newest_finished(folder).folder
    log.info("'%s' is a run: its newest finished checkpoint is %s", folder, os.path.relpath(newest, folder))
    return newest


def candidate_at(path: Path) -> Candidate:
    """What the checkpoint at that very path is in the run that it belongs to, if it does to one."""
    try:
        found = checkpoints_of(path)
    except (NotFound, PermissionError):
        found = []
    alone = Candidate(path, Path(os.path.abspath(path)).name, "plain")
    return next((candidate for candidate in found if is_at(candidate, path)), alone)


def is_at(candidate: Candidate, path: Path) -> bool:
    """Whether a candidate is the very folder or file of that path."""
    return os.path.abspath(candidate.folder) == os.path.abspath(path)


def find_stored(reference: str, home: Path | None = None) -> Kept | Revision | None:
    """What a name means in the store. Of two that it means, the one that was kept as it was written; which is said.

    Raises:
        UsageError: as `stored_revision`.
    """
    home = home or default_home()
    kept = find_kept(reference, home)
    if kept is None:
        return stored_revision(reference, home)
    try:
        revision = stored_revision(reference, home)
    except UsageError:
        return kept
    if revision is not None and not _same_weights(kept.folder, revision.folder):
        log.info("'%s' is twice in the store: %s, which is meant here, and %s", reference, kept.id, revision.name)
    return kept


def content_of(stored: Kept | Revision) -> Path:
    """Its folder in the store, or the one file that was kept alone.

    Raises:
        InvalidFile: there is nothing in it, or it can't be read.
    """
    try:
        entries = list(os.scandir(stored.folder))
    except OSError as error:
        raise InvalidFile(f"'{stored.folder}' can't be read ({error.strerror}): {VERIFY}") from None
    if not entries:
        raise InvalidFile(f"'{stored.folder}' is empty: {VERIFY}")
    return stored.folder if len(entries) > 1 or entries[0].is_dir() else Path(entries[0].path)


def _same_weights(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one / WEIGHTS, other / WEIGHTS, shallow=False)
    except OSError:
        return False


def stored_revision(reference: str, home: Path | None = None) -> Revision | None:
    """What a name such as `sql@best` or `sql@step-500` means among a server's revisions; None when nothing.

    Raises:
        UsageError: it means different adapters for different bases.
    """
    home = home or default_home()
    name, selector = split_model(reference)
    found: dict[str, tuple[str, Revision]] = {}
    for base in bases_in(home):
        with open_store(home, base) as store:
            run = store.runs().get(name)
        revision = run.select(selector) if run else None
        if revision is not None:
            found.setdefault(revision.digest, (base, revision))
    if len(found) > 1:
        bases = ", ".join(f"'{base}'" for base, _ in found.values())
        raise UsageError(f"the store has '{reference}' for several bases ({bases}): give the folder instead")
    return next((revision for _, revision in found.values()), None)


def on_hub(reference: str, *, what: str, patterns: Sequence[str]) -> Path:
    """As `hub_folder`, for what is neither here nor in the store: the error has the nearest name that is."""
    try:
        return hub_folder(reference, what=what, patterns=patterns)
    except NotFound as error:
        raise NotFound(f"{error}{_did_you_mean(reference, _names_in_store(default_home()))}") from None


def nothing_named(reference: str, what: str = "folder or file") -> NotFound:
    """The error for a name that means nothing, with the nearest that mean something."""
    shown = without_secrets(reference)
    if "://" in reference:
        return NotFound(f"'{shown}' is an address, and this is done here: fetch it first, lorakit fetch '…' --out DIR")
    said = f"there is no {what} '{shown}', and no such name in the store"
    run = split_model(reference)[0]
    names = _names_in_store(default_home())
    if run in names:
        return NotFound(f"{said}: of '{run}' it has {_some(names[run])}")
    return NotFound(f"{said}{_did_you_mean(reference, names)}")


def _did_you_mean(reference: str, in_store: Iterable[str]) -> str:
    path = Path(reference)
    beside = [str(path.parent / name) for name in get_close_matches(path.name, _listed(path.parent), n=1)]
    near = beside or get_close_matches(split_model(reference)[0], in_store, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _names_in_store(home: Path) -> dict[str, list[str]]:
    """The names of all that the store has, by run, the newest last."""
    found: dict[str, list[str]] = {}
    for base in bases_in(home):
        with open_store(home, base) as store:
            for name, run in store.runs().items():
                found.setdefault(name, []).extend(revision.name for revision in run.revisions.values())
    for kept in kept_in(home):
        found.setdefault(kept.run, []).append(kept.id)
    return found


def _some(names: Iterable[str]) -> str:
    every = list(dict.fromkeys(names))
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return f"{', '.join(every[-SHOWN:])}{more}"


def _listed(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        return []
