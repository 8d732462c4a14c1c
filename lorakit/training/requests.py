"""Asking a trainer to save: files in RUN/.lorakit, which whoever asks and the trainer share.

`save-request-<uuid>.json` is written whole by whoever asks. The trainer claims it by renaming it, in one step, to
`….claimed`, saves, writes `save-result-<uuid>.json`, and removes what it claimed: a trainer that dies between leaves a
claimed request without a result, which the next one takes up. axolotl's `axolotl_checkpoint.save` in RUN is claimed
in the same way. Imports no torch.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.checkpoints.finished import CHECKPOINT
from lorakit.errors import Conflict, LorakitError, NotFound, OutOfSpace, Refused, UsageError
from lorakit.files.folders import sync_folder
from lorakit.store.names import check_alias
from lorakit.training.states import copied_from

FOLDER = ".lorakit"
AXOLOTL = "axolotl_checkpoint.save"
LISTENING = "listening.json"
_REQUEST = re.compile(r"save-request-([0-9a-f]{32})\.json")
_CLAIMED = re.compile(r"save-request-([0-9a-f]{32})\.json\.claimed")
_LIKE_A_FILE = re.compile(r"(checkpoint-.*|.*\.[A-Za-z]+)", re.S)
_LONGEST = 1 << 16  # bytes of a request: what is longer is not one
_POLL = 0.1  # seconds


@dataclass(frozen=True, slots=True)
class Request:
    """`time` in seconds since 1970; `name` is what the checkpoint shall be called besides."""

    uuid: str
    time: float
    name: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """Where a request was answered: `path` within the run, `seconds` from when the trainer took it up.

    `name` is None when none was asked for, or when it could not be given: `note` says why.
    """

    uuid: str
    step: int
    path: str
    seconds: float
    name: str | None = None
    note: str | None = None


# whoever asks


def ask(run: Path, *, name: str | None = None, reason: str | None = None) -> Request:
    """Ask the trainer of `run` to save.

    Raises:
        NotFound, UsageError: there is no such run, or it is one checkpoint of a run; or the reason is too long.
        Refused, Conflict: as `check_name`.
        OutOfSpace, LorakitError: the run can't be written.
    """
    check_run(run)
    if name is not None:
        check_name(run, name)
    request = Request(uuid.uuid4().hex, time.time(), name, reason)
    if len(_encoded(asdict(request))) > _LONGEST:
        raise UsageError(f"the reason is too long: a request has at most {_LONGEST >> 10} KiB")
    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        _write_whole(request_file(run, request), asdict(request))
    except OSError as error:
        why = f"'{run}' can't be asked: nothing can be written into '{folder}': {os.strerror(error.errno or 0).lower()}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfSpace(f"{why}; free some space") from error
        raise LorakitError(f"{why}; ask as the user whose run it is") from error
    return request


def request_file(run: Path, request: Request) -> Path:
    return run / FOLDER / f"save-request-{request.uuid}.json"


def result_file(run: Path, request: Request) -> Path:
    return run / FOLDER / f"save-result-{request.uuid}.json"


def check_run(run: Path) -> None:
    """Raises NotFound or UsageError when `run` is no folder that a trainer writes checkpoints into."""
    if not run.is_dir():
        raise NotFound(f"there is no folder '{run}': name the one that the trainer writes its checkpoints into")
    if CHECKPOINT.fullmatch(Path(os.path.abspath(run)).name) or CHECKPOINT.fullmatch(run.resolve().name):
        raise UsageError(f"'{run}' is one checkpoint: name the run that it is in")


def check_name(run: Path, name: str) -> None:
    """What a checkpoint can be called in its run.

    Raises:
        Refused: it is no name, is reserved, or looks like a file's or a checkpoint's own.
        Conflict: there is something of that name in the run.
    """
    try:
        check_alias(name)
    except Refused as error:
        raise Refused(f"{str(error).partition('; ')[0]}; choose another word") from None
    if _LIKE_A_FILE.fullmatch(name):
        raise Refused(f"the name '{name}' looks like that of a file or a checkpoint; choose another word")
    if os.path.lexists(run / name):
        raise Conflict(f"'{run / name}' exists already: choose another name, or remove it")


def withdraw(run: Path, request: Request) -> bool:
    """Whether the request was taken back; False when a trainer has claimed it already."""
    try:
        request_file(run, request).unlink()
    except FileNotFoundError:
        return False
    return True


def wait_for(run: Path, request: Request, seconds: float) -> Receipt | None:
    """The receipt, as soon as it is there; None when it is not after so many seconds."""
    end = time.monotonic() + seconds
    while (receipt := receipt_of(run, request)) is None and (left := end - time.monotonic()) > 0:
        time.sleep(min(_POLL, left))
    return receipt


def receipt_of(run: Path, request: Request) -> Receipt | None:
    """None when there is none, or what is there is none: its path is a checkpoint of the run, or the name asked for."""
    found = _read(result_file(run, request))
    try:
        receipt = Receipt(**found)
    except TypeError:
        return None
    words = (receipt.name, receipt.note)
    is_one = (
        receipt.uuid == request.uuid
        and type(receipt.step) is int
        and type(receipt.seconds) in (int, float)
        and isinstance(receipt.path, str)
        and (receipt.path == request.name or CHECKPOINT.fullmatch(receipt.path) is not None)
        and all(word is None or isinstance(word, str) for word in words)
    )
    return receipt if is_one else None


def listener(run: Path) -> dict[str, Any] | None:
    """What the trainer that listens in `run` says of itself; None when none does, as far as can be told."""
    file = run / FOLDER / LISTENING
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(file)
    except OSError:  # a file system without locks can't tell
        return None
    finally:
        os.close(handle)
    return None


# the trainer


@contextmanager
def listening(run: Path) -> Iterator[bool]:
    """Hold the place of the trainer that answers in `run`; False when another one has it, or somebody asks just now who
    does.

    Raises:
        OSError: the run can't be written.
    """
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / LISTENING, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with io.FileIO(handle, "r+") as place:
        alone = _locked(handle)
        if alone:
            _PLACES.add(place)
            said = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(said).encode(), 0)
        try:
            yield alone
        finally:
            _PLACES.discard(place)
            if alone:
                _unlock(place)


_PLACES: set[io.FileIO] = set()  # that this process holds


def _in_a_forked_process() -> None:
    """A worker that loads data may outlive its trainer; it holds no place for it."""
    for place in _PLACES:
        place.close()


os.register_at_fork(after_in_child=_in_a_forked_process)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: then nobody else has it, either
        pass
    return True


def _unlock(place: io.FileIO) -> None:
    """Closing alone leaves the lock to a process that was forked just now, until it has closed its own."""
    with suppress(OSError, ValueError):  # closed already, in a process that was forked
        fcntl.flock(place, fcntl.LOCK_UN)


def claim(run: Path) -> Iterator[Request]:
    """Take every open request, so that no other trainer does.

    Raises:
        OSError: the folder can't be read, or a request can't be renamed: it stays where it is, and the others come
            first.
    """
    folder, failed = run / FOLDER, None
    yield from _claim_axolotl(run)
    for identity in [match[1] for name in _names(folder) if (match := _REQUEST.fullmatch(name))]:
        request = Request(identity, 0.0)
        try:
            request_file(run, request).rename(_claimed_file(run, request))
        except FileNotFoundError:  # withdrawn, or another trainer was first
            continue
        except OSError as error:
            failed = error
            continue
        yield _claimed(folder, identity)
    if failed is not None:
        raise failed


def left_unanswered(run: Path) -> list[Request]:
    """What a trainer that died had claimed.

    Raises:
        OSError: the folder can't be read.
    """
    folder = run / FOLDER
    names = [name for name in _names(folder) if (folder / name).is_file()]
    found = [_claimed(folder, match[1]) for name in names if (match := _CLAIMED.fullmatch(name))]
    for request in found:
        if receipt_of(run, request):  # it died between writing the result and this
            _claimed_file(run, request).unlink(missing_ok=True)
    return [request for request in found if receipt_of(run, request) is None]


def answer(run: Path, receipt: Receipt) -> None:
    """Write the result, and be done with the request.

    Raises:
        OSError: the folder can't be written.
    """
    request = Request(receipt.uuid, 0.0)
    _write_whole(result_file(run, request), asdict(receipt))
    _claimed_file(run, request).unlink(missing_ok=True)


def _claim_axolotl(run: Path) -> list[Request]:
    """Its trigger has no content, and may lie in a run where nobody has asked otherwise."""
    trigger = run / AXOLOTL
    try:
        if not stat.S_ISREG(trigger.lstat().st_mode):
            return []
        request = Request(uuid.uuid4().hex, time.time(), reason=AXOLOTL)
        (run / FOLDER).mkdir(exist_ok=True)
        trigger.rename(_claimed_file(run, request))
    except FileNotFoundError:
        return []
    return [request]


def _claimed_file(run: Path, request: Request) -> Path:
    file = request_file(run, request)
    return file.with_name(f"{file.name}.claimed")


def _claimed(folder: Path, identity: str) -> Request:
    """As it was asked; what its file says amiss is left out, as the wish to save is in its name."""
    said = _read(folder / f"save-request-{identity}.json.claimed")
    when, name, reason = said.get("time"), said.get("name"), said.get("reason")
    return Request(
        identity,
        float(when) if isinstance(when, int | float) else time.time(),
        name if isinstance(name, str) else None,
        reason if isinstance(reason, str) else None,
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _read(file: Path) -> dict[str, Any]:
    """A small JSON object; an empty one for anything else: whoever may write here may write what they like."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return {}
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return {}
        said = json.loads(os.read(handle, _LONGEST))
    except (OSError, ValueError, RecursionError):
        return {}
    finally:
        os.close(handle)
    return said if isinstance(said, dict) else {}


def _encoded(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _write_whole(file: Path, value: dict[str, Any]) -> None:
    """Beside its place, synced and renamed."""
    beside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with beside.open("xb") as stream:
            stream.write(_encoded(value))
            stream.flush()
            os.fsync(stream.fileno())
        beside.rename(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


# names


def checkpoint_named(run: Path, name: str) -> str | None:
    """The checkpoint that RUN/`name` is a link to or a copy of; None when it is neither."""
    place = run / name
    if place.name != name:
        return None
    found = os.readlink(place) if place.is_symlink() else copied_from(place)
    return found if found and CHECKPOINT.fullmatch(found) else None


def name_checkpoint(run: Path, name: str, checkpoint: str) -> str | None:
    """Link RUN/`name` to a checkpoint in the run; what a link in a run leads to is not pruned. None, or why it is not.

    A name that leads there already is as good as given.
    """
    link = run / name
    try:
        if checkpoint_named(run, name) == checkpoint:
            return None
        check_name(run, name)
        link.symlink_to(checkpoint, target_is_directory=True)
        sync_folder(run)
    except (LorakitError, OSError) as error:
        return f"the checkpoint is there, but could not be named: {error}"
    return None
