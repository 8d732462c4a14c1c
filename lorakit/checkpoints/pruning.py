"""Remove the checkpoints of a run that nothing keeps: look, decide, look again, rename away, remove.

Only folders `checkpoint-N` directly in the run are looked at. One that is still being written, or that can't be called
finished, stays; so do links, what a link in the run leads to, and what an alias of the store points at.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorakit.adapters.reading import UNFINISHED
from lorakit.checkpoints.finished import CHECKPOINT, MARKERS, STALLED, Look, look_at
from lorakit.checkpoints.retention import Checkpoint, KeepBest, Retention, in_words
from lorakit.checkpoints.trainer_state import read_facts
from lorakit.errors import LorakitError, NotFound, disk_errors_named
from lorakit.files.folders import clear_abandoned, sync_folder
from lorakit.store.catalog import Facts, own_eval_loss
from lorakit.store.store import bases_in, default_home, open_store
from lorakit.store.trash import trash_path
from lorakit.store.trash_folders import HIDDEN, Taken, put_back

ABANDONED = 86_400.0  # seconds without a change after which nobody is taken to be writing any more

State = Literal["finished", "unfinished", "abandoned", "link"]
Entry = tuple[str, int, int, int]  # path within the folder, size, time of the last write, inode


@dataclass(frozen=True, slots=True)
class Contents:
    """All that is in a folder: bytes, when anything of it last changed, and what differs after any rewrite."""

    size: int = 0
    changed: float = 0.0  # seconds since 1970; a copy that keeps its source's times has changed now
    entries: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class Sighted:
    """A `checkpoint-N` in the run: what it is worth to the policies, and whether it is finished, with the reason."""

    folder: Path
    checkpoint: Checkpoint
    state: State
    reason: str
    contents: Contents


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a checkpoint stays, and every reason for it."""

    sighted: Sighted
    stays: bool
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.sighted.checkpoint.name

    @property
    def size(self) -> int:
        return self.sighted.checkpoint.size

    def as_dict(self) -> dict[str, Any]:
        checkpoint = self.sighted.checkpoint
        return {
            "name": self.name,
            "path": str(self.sighted.folder),
            "step": checkpoint.step,
            "size": self.size,
            "state": self.sighted.state,
            "metrics": {name: value if math.isfinite(value) else None for name, value in checkpoint.metrics.items()},
            "stays": self.stays,
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """What becomes of every checkpoint of a run, in the order of steps."""

    run: Path
    retention: Retention
    home: Path
    verdicts: tuple[Verdict, ...]

    @property
    def going(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if not verdict.stays)

    @property
    def staying(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.stays)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was done: names that were removed, names that stayed after all with the reason, what is out of the run but
    could not be removed wholly, and, of what lies in the run's trash, the uid by name."""

    removed: tuple[str, ...]
    spared: Mapping[str, str]
    left: tuple[Path, ...]
    trashed: Mapping[str, str]


def plan_prune(run: Path, retention: Retention, *, home: Path | None = None, now: float | None = None) -> PrunePlan:
    """Say what becomes of every checkpoint of a run; writes nothing there.

    Args:
        home: the store whose aliases are heeded; by default the one that all use.
        now: seconds since 1970; by default the clock's.

    Raises:
        NotFound: there is no such folder, it holds no checkpoints, or the best are to be kept by a metric that none
            has, and some would go.
    """
    home, now = home or default_home(), time.time() if now is None else now
    found = _sighted_in(run, now)
    if not found:
        raise NotFound(
            f"'{run}' holds no checkpoint-N folder, and no others are pruned: name the folder that the Trainer writes "
            f"them into, or remove single ones with lorakit rm"
        )
    held = _held(run, home)
    finished = [one.checkpoint for one in found if one.state == "finished"]
    certain = {one.checkpoint.name: _certain(one, held.get(_real(one.folder), ())) for one in found}
    beside = sum(one.checkpoint.size for one in found if one.state != "finished" and certain[one.checkpoint.name])
    decided = certain | retention.decide(finished, now=now, held=certain, beside=beside)
    verdicts = tuple(_verdict(one, decided[one.checkpoint.name]) for one in found)
    _refuse_unmeasured(run, retention, verdicts)
    return PrunePlan(run, retention, home, verdicts)


def execute_prune(plan: PrunePlan, *, now: float | None = None, to_trash: bool = False) -> Pruned:
    """Remove what the plan says goes, if it would still go and is as it was when the plan was made.

    Each is renamed to a hidden name first, in one step, and then removed: a crash leaves no half checkpoint, and what
    it does leave the next call removes. With `to_trash` it is moved to the run's trash, to be taken back from there.

    Raises:
        NotFound: the run went away.
        LorakitError: the run can't be written; all that was removed so far was removed wholly.
    """
    again = plan_prune(plan.run, plan.retention, home=plan.home, now=now)
    current = {verdict.name: verdict for verdict in again.verdicts}
    removed, spared, left, trashed = [], {}, [], {}
    with disk_errors_named(plan.run):
        clear_abandoned(plan.run, HIDDEN)
        for verdict in plan.going:
            latest = current.get(verdict.name)
            if latest is None:
                spared[verdict.name] = "it is gone already"
            elif latest.stays:
                spared[verdict.name] = "; ".join(latest.reasons)
            elif (trash := _removed(verdict.sighted, plan.home if to_trash else None)) is None:
                spared[verdict.name] = "it was written to, or taken away, since it was looked at"
            else:
                removed.append(verdict.name)
                if to_trash:
                    trashed[verdict.name] = trash.parent.name
                elif trash.exists():
                    left.append(trash)
    return Pruned(tuple(removed), spared, tuple(left), trashed)


def _removed(sighted: Sighted, home: Path | None) -> Path | None:
    """The name under which it was removed, or lies in the trash that a store knows of; None, and nothing changed, when
    it is not what it was.

    Locked all the while, so that no other prune takes it for what a killed one left.
    """
    try:
        lock = os.open(sighted.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another prune has it
            return None
        except OSError:  # a file system without locks: then no other prune takes what it finds for left behind, either
            pass
        if home is not None:
            return _in_trash(sighted, home)
        trash = _taken_out(sighted)
        if trash is not None:
            shutil.rmtree(trash, ignore_errors=True)
        return trash
    finally:
        os.close(lock)


def _taken_out(sighted: Sighted) -> Path | None:
    """The checkpoint under a hidden name; None, and nothing changed, when it is not what it was."""
    folder, trash = sighted.folder, sighted.folder.with_name(f"{HIDDEN}{sighted.folder.name}-{uuid.uuid4().hex[:12]}")
    if not _is_unchanged(folder, sighted.contents):
        return None
    try:
        folder.rename(trash)
    except FileNotFoundError:
        return None
    if not _is_unchanged(trash, sighted.contents):  # a writer came between the look and the rename
        _put_back(trash, folder)
        return None
    sync_folder(trash.parent)
    return trash


def _in_trash(sighted: Sighted, home: Path) -> Path | None:
    """Where it lies in the run's trash, in a folder named by its uid; None, and nothing changed, when it is not what it
    was."""
    if not _is_unchanged(sighted.folder, sighted.contents):
        return None
    try:
        taken = trash_path(sighted.folder, home).held
    except NotFound:
        return None
    assert isinstance(taken, Taken)
    if not _is_unchanged(taken.content, sighted.contents):  # a writer came between the look and the rename
        put_back(taken)
        return None
    return taken.content


def _put_back(trash: Path, folder: Path) -> None:
    try:
        trash.rename(folder)
    except OSError as error:
        raise LorakitError(
            f"'{folder}' was written to while it was being removed, and there is another one by now: "
            f"what was there before is '{trash}'; move it to where you want it, or the next prune removes it"
        ) from error


def _is_unchanged(folder: Path, before: Contents) -> bool:
    try:
        return not folder.is_symlink() and _contents(folder).entries == before.entries
    except OSError:
        return False


# what is there


def _sighted_in(run: Path, now: float) -> list[Sighted]:
    """Every folder and link `checkpoint-N` of the run, in the order of steps."""
    try:
        names = [(int(match[1]), name) for name in os.listdir(run) if (match := CHECKPOINT.fullmatch(name))]
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"there is no folder '{run}'") from None
    sighted = (_sighted(run / name, step, now) for step, name in sorted(names))
    return [one for one in sighted if one is not None]


def _sighted(folder: Path, step: int, now: float) -> Sighted | None:
    """None for what is no folder, or went away meanwhile: a trainer removes checkpoints too."""
    if folder.is_symlink():
        return Sighted(folder, Checkpoint(folder.name, step), "link", "it is a link", Contents())
    if not folder.is_dir():
        return None
    look = look_at(folder)
    try:
        contents = _contents(folder)
    except OSError as error:
        unread = Sighted(folder, Checkpoint(folder.name, step), "unfinished", f"can't be read: {error}", Contents())
        return unread if folder.is_dir() else None
    state, reason = _state(look, contents, now)
    checkpoint = Checkpoint(folder.name, step, contents.size, _written(contents), _metrics(read_facts(folder, step)))
    return Sighted(folder, checkpoint, state, reason, contents)


def _contents(folder: Path) -> Contents:
    """Raises OSError when a part of it can't be read."""
    entries, size, changed = [], 0, 0.0
    for path, status in _statuses(folder):
        changed = max(changed, status.st_mtime, status.st_ctime)
        if path != folder:
            is_file = stat.S_ISREG(status.st_mode)
            size += status.st_size if is_file else 0
            name = str(path.relative_to(folder))
            entries.append((name, status.st_size if is_file else -1, status.st_mtime_ns, status.st_ino))
    return Contents(size, changed, tuple(sorted(entries)))


def _statuses(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    yield folder, folder.lstat()
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                yield from _statuses(Path(entry.path))
            else:
                yield Path(entry.path), entry.stat(follow_symlinks=False)


def _state(look: Look, contents: Contents, now: float) -> tuple[State, str]:
    """Finished, or not with the reason."""
    quiet = now - contents.changed
    if look.state == "finished":
        return "finished", look.reason
    if look.state == "whole" and quiet >= STALLED:
        return "finished", f"whole, and unchanged for {in_words(quiet)}"
    if look.state == "refused" and look.vouched_by:
        return "finished", f"{look.vouched_by} is there, its writer's last file"
    if look.state in ("whole", "refused"):
        return "unfinished", f"it can't be called finished: {look.reason}"
    if quiet >= ABANDONED and _is_adapter_cut_short(look, contents):
        return "abandoned", f"unfinished, and unchanged for {in_words(quiet)}: {look.reason}"
    return "unfinished", f"unfinished: {look.reason}"


def _is_adapter_cut_short(look: Look, contents: Contents) -> bool:
    """Whether a writer that was killed explains it all. What is of an unknown kind, or can't be read, is not that."""
    names = {name for name, *_ in contents.entries}
    if UNFINISHED in names or not names:
        return True
    return look.kind == "adapter" and bool(look.signature) and not names.intersection(MARKERS)


def _written(contents: Contents) -> float:
    """When its writer was done: what is put into a checkpoint later makes it no younger."""
    times = {name: written for name, _, written, _ in contents.entries}
    marker = next((name for name in MARKERS if name in times), None)
    return (times[marker] if marker else max(times.values(), default=0)) / 1e9


def _metrics(facts: Facts) -> dict[str, float]:
    loss = own_eval_loss(facts)
    return {**facts.metrics, **({} if loss is None else {"eval_loss": loss})}


# what holds it


def _held(run: Path, home: Path) -> dict[str, list[str]]:
    """Why checkpoints stay whatever the policies say, by their real paths."""
    held: dict[str, list[str]] = {}
    for entry in sorted(run.iterdir()):
        if entry.is_symlink():
            held.setdefault(_real(entry), []).append(f"the link '{entry.name}' leads to it")
    for base in bases_in(home):
        with open_store(home, base) as store:
            runs = store.runs()
        for name, revision in (pair for known in runs.values() for pair in known.pointed_at()):
            if revision.source:
                held.setdefault(_real(Path(revision.source)), []).append(f"the store's '{name}' points at it")
    return held


def _real(path: Path) -> str:
    return os.path.realpath(path)


def _certain(sighted: Sighted, held: Sequence[str]) -> tuple[str, ...]:
    """Why it stays whatever the policies say."""
    if sighted.state == "link":
        return (sighted.reason,)
    return (*([sighted.reason] if sighted.state == "unfinished" else []), *held)


def _verdict(sighted: Sighted, reasons: tuple[str, ...]) -> Verdict:
    if reasons:
        return Verdict(sighted, True, reasons)
    return Verdict(sighted, False, (sighted.reason if sighted.state == "abandoned" else "nothing keeps it",))


def _refuse_unmeasured(run: Path, retention: Retention, verdicts: tuple[Verdict, ...]) -> None:
    """Raises NotFound when the best were to be kept, none can be told, and others would go."""
    of_finished = [verdict for verdict in verdicts if verdict.sighted.state == "finished"]
    if all(verdict.stays for verdict in of_finished):
        return
    finished = [verdict.sighted.checkpoint for verdict in of_finished]
    for policy in retention.policies:
        if isinstance(policy, KeepBest) and not policy.measured(finished):
            known = ", ".join(sorted({name for checkpoint in finished for name in checkpoint.metrics}))
            raise NotFound(
                f"no checkpoint of '{run}' has the metric '{policy.metric}', measured at its own step, "
                f"so none is best: {f'there are {known}' if known else 'leave --keep-best out'}"
            )
