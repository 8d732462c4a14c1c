"""An export into a bucket that is under way: an object there says so, and whose it is, until its end.

A folder in a bucket can't be locked, nor renamed into its place. Who exports rewrites the object every few seconds; so
another sees whether it lives, and goes on in its place when it was killed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lorakit import __version__
from lorakit.checkpoints.moving.buckets import Bucket
from lorakit.checkpoints.moving.manifest import FILE as MANIFEST
from lorakit.checkpoints.moving.trees import LocalFile
from lorakit.errors import Conflict, LorakitError

BEGUN = "lorakit.export.json"
BEAT = 4.0  # seconds
KILLED = 15.0  # seconds without a beat

log = logging.getLogger("lorakit.checkpoints")


@contextmanager
def under_way(bucket: Bucket, files: Sequence[LocalFile]) -> Iterator[Callable[[], None]]:
    """Gives what raises Conflict when another export has taken this one's place; to be asked before the last step.

    After an error nothing is left of what was written, as long as it is this one's.

    Raises:
        Conflict: another is at it.
    """
    mine, what = uuid.uuid4().hex, what_is_exported(files)
    _wait_for_the_end_of_another(bucket, what)
    ended = threading.Event()
    write = _writer(bucket, mine, what)
    write(not bucket.exists(BEGUN))
    beating = threading.Thread(target=_beat, args=(bucket, mine, write, ended), daemon=True)
    beating.start()

    def ensure_mine() -> None:
        if not _is_of(bucket, mine):
            raise Conflict(f"'{bucket.shown}': another export has taken the place of this one: leave it to that")

    try:
        ensure_mine()
        yield ensure_mine
    except BaseException:
        _end(ended, beating)
        if _is_of(bucket, mine):
            written = [] if bucket.exists(MANIFEST) else [file.name for file in files]
            bucket.remove([*written, BEGUN])
        raise
    _end(ended, beating)
    bucket.remove([BEGUN])


def what_is_exported(files: Sequence[LocalFile]) -> str:
    """The same for another try with the same checkpoint."""
    return hashlib.sha256(repr([(file.name, file.state[:2]) for file in files]).encode()).hexdigest()


def refuse_others(bucket: Bucket, what: str) -> None:
    """Raises Conflict when something is there, but for what an export of the same checkpoint began."""
    if not bucket.exists():
        return
    begun = bucket.read(BEGUN)
    if begun is None or bucket.exists(MANIFEST):
        raise Conflict(f"'{bucket.shown}' exists already: remove it, or name another place")
    if _said(begun).get("files") != what:
        raise Conflict(
            f"at '{bucket.shown}' an export of another checkpoint is under way, or was killed: remove it, or name "
            f"another place"
        )


def _wait_for_the_end_of_another(bucket: Bucket, what: str) -> None:
    refuse_others(bucket, what)
    first = bucket.read(BEGUN)
    if first is None:
        return
    log.info("at '%s' an export was begun: looking for %g s whether it lives", bucket.shown, KILLED)
    until = time.monotonic() + KILLED
    while time.monotonic() < until:
        time.sleep(min(BEAT, KILLED) / 4)
        if bucket.read(BEGUN) != first:
            raise Conflict(f"'{bucket.shown}' is being exported to by another: leave it to that, or name another place")
    refuse_others(bucket, what)


def _writer(bucket: Bucket, mine: str, what: str) -> Callable[[bool], None]:
    beats = 0

    def write(new: bool) -> None:
        nonlocal beats
        beats += 1
        said = {"lorakit": __version__, "operation": "export", "files": what, "id": mine, "beat": beats}
        bucket.write(BEGUN, (json.dumps(said).encode(),), new=new)

    return write


def _beat(bucket: Bucket, mine: str, write: Callable[[bool], None], ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        try:
            if not _is_of(bucket, mine):
                return
            write(False)
        except LorakitError:  # whoever writes the files meets the same, and says so
            continue


def _end(ended: threading.Event, beating: threading.Thread) -> None:
    ended.set()
    beating.join()


def _is_of(bucket: Bucket, mine: str) -> bool:
    begun = bucket.read(BEGUN)
    return begun is not None and _said(begun).get("id") == mine


def _said(begun: bytes) -> dict[str, object]:
    try:
        said = json.loads(begun)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
