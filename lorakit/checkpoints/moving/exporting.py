"""`lorakit export`: a checkpoint to a folder, an archive or a bucket, whole or not at all, with digests of its files.

The list of digests is what is written last. In a bucket, where a folder can't be renamed into its place, that list is
the sign that all is there: until then an object says that an export is under way, and `lorakit fetch` takes none such.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.locate import checkpoint_folder
from lorakit.checkpoints.moving.addresses import Address, parse_address
from lorakit.checkpoints.moving.buckets import Bucket
from lorakit.checkpoints.moving.manifest import FILE as MANIFEST
from lorakit.checkpoints.moving.manifest import manifest, parse_manifest
from lorakit.checkpoints.moving.packing import packed
from lorakit.checkpoints.moving.stored import ensure_intact, is_done
from lorakit.checkpoints.moving.trees import (
    Hashing,
    LocalFile,
    Progress,
    copy_files,
    ensure_finished,
    files_of,
    steady,
    told,
)
from lorakit.checkpoints.moving.under_way import refuse_others, under_way, what_is_exported
from lorakit.errors import Conflict, InvalidFile, UsageError, disk_errors_named
from lorakit.files.folders import refuse_existing, sync_folder, temporary_folder, whole_folder

Way = Literal["folder", "archive", "bucket", "bucket archive"]
Digests = dict[str, str]
Steady = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Exported:
    """What is there now, or would be: `digests` by file; `sha256` of the archive, where it is one. `bytes` of the
    files themselves, before they are packed."""

    source: Path
    destination: str
    way: Way
    files: tuple[str, ...]
    bytes: int
    digests: Digests
    sha256: str | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "source": str(self.source), "destination": self.destination, "way": self.way, "files": list(self.files),
            "bytes": self.bytes, "digests": self.digests, "sha256": self.sha256, "seconds": round(self.seconds, 3),
        }  # fmt: skip


def plan_export(reference: str, destination: str, *, unfinished: bool = False) -> Exported:
    """Say what would be written where, and write nothing.

    Raises:
        Conflict, NotFound, UsageError, Refused, Incomplete: as `export`.
    """
    return _planned(reference, destination, unfinished)[0]


def _planned(reference: str, destination: str, unfinished: bool) -> tuple[Exported, Address, list[LocalFile]]:
    source = checkpoint_folder(reference)
    address = parse_address(destination)
    ensure_finished(look_at(source), str(source), unfinished=unfinished or is_done(source))
    files = [file for file in files_of(source) if file.name != MANIFEST]
    match address.way:
        case "url":
            raise UsageError(f"'{address.shown}' can only be fetched from: export to a folder, s3://, gs:// or hf://")
        case "hub":
            raise UsageError(f"'{destination}' is on the hub: lorakit push puts checkpoints there")
        case "bucket":
            bucket = Bucket(address)
            if address.archive and bucket.exists():
                raise Conflict(f"'{bucket.shown}' exists already: remove it, or name another place")
            refuse_others(bucket, what_is_exported(files))
            way: Way = "bucket archive" if address.archive else "bucket"
        case "local":
            refuse_existing(Path(address.path))
            way = "archive" if address.archive else "folder"
    size = sum(file.size for file in files)
    return Exported(source, address.shown, way, tuple(file.name for file in files), size, {}), address, files


def export(reference: str, destination: str, *, unfinished: bool = False, progress: Progress | None = None) -> Exported:
    """Write the files of a checkpoint, all of them, as they are.

    Args:
        reference: A folder or file, a run (its newest), or a name in the store.
        destination: A path, `file://`, `s3://` or `gs://`; one that ends as archives do becomes an archive.

    Raises:
        Conflict: the destination exists.
        NotFound: there is no such checkpoint, or no such bucket.
        Incomplete: it is not finished, or was written to meanwhile.
        Refused: a link leads out of it, or the bucket does not let us.
        OutOfSpace, LorakitError: the destination can't be written. Nothing is left there that looks finished.
    """
    began = time.monotonic()
    planned, address, files = _planned(reference, destination, unfinished)
    source = planned.source
    look = partial(steady, lambda: look_at(source), str(source), unfinished=unfinished or is_done(source))
    digests: Digests = {}
    sha256 = None
    match planned.way:
        case "folder":
            digests = _to_folder(source, files, Path(address.path), look, progress)
        case "bucket":
            digests = _to_bucket(source, files, Bucket(address), look, progress)
        case _:
            blocks = Hashing(_archived(source, files, address, digests, look, progress))
            if planned.way == "archive":
                _write_whole(Path(address.path), blocks)
            else:
                Bucket(address).write("", blocks)
            sha256 = blocks.hexdigest()
    return replace(planned, digests=digests, sha256=sha256, seconds=time.monotonic() - began)


def _to_folder(source: Path, files: list[LocalFile], target: Path, look: Steady, progress: Progress | None) -> Digests:
    with whole_folder(target) as folder:
        with look():
            digests = copy_files(files, folder, progress=progress, with_digests=True)
        _ensure_as_listed(source, digests)
        (folder / MANIFEST).write_text(manifest(digests), encoding="utf-8")
    return digests


def _archived(
    source: Path, files: list[LocalFile], address: Address, digests: Digests, look: Steady, progress: Progress | None
) -> Iterator[bytes]:
    """The archive, which breaks off when its files are found to have changed."""
    assert address.archive is not None
    total, done = sum(file.size for file in files), 0
    with look():
        for block in packed(files, address.archive, digests):
            yield block
            done += len(block)
            if progress is not None:
                progress(min(done, total), total)
    _ensure_as_listed(source, digests)


def _ensure_as_listed(source: Path, digests: Digests) -> None:
    """Raises InvalidFile when the store, or a list of digests in the source itself, says otherwise."""
    ensure_intact(source, digests)
    listed = source / MANIFEST
    if not listed.is_file():
        return
    for name, digest in parse_manifest(listed.read_text(encoding="utf-8", errors="replace"), str(listed)).items():
        if digests.get(name) != digest:
            raise InvalidFile(f"'{source / name}' is not what {MANIFEST} beside it says: it was damaged or changed")


def _write_whole(target: Path, blocks: Iterable[bytes]) -> None:
    """A file that appears whole or not at all, and takes no other's place."""
    refuse_existing(target)
    with disk_errors_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent, f".{target.name}.tmp-") as folder:
            file = folder / "archive"
            with file.open("xb") as stream:
                for block in blocks:
                    stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(file, target)
            except FileExistsError:
                raise Conflict(f"'{target}' exists already: remove it, or name another place") from None
            except OSError:  # a file system without hard links
                refuse_existing(target)
                file.rename(target)
            sync_folder(target.parent)


# a folder in a bucket


def _to_bucket(
    source: Path, files: list[LocalFile], bucket: Bucket, look: Steady, progress: Progress | None
) -> Digests:
    with under_way(bucket, files) as ensure_mine:
        with look():
            digests = _upload(bucket, files, progress)
        _ensure_as_listed(source, digests)
        there = {one.name: one.size for one in bucket.listed()}
        if missing := next((file.name for file in files if there.get(file.name) != file.size), None):
            raise Conflict(
                f"'{bucket.shown}': '{missing}' was taken away or changed meanwhile: is another export at it?"
            )
        ensure_mine()
        bucket.write(MANIFEST, (manifest(digests).encode(),))
    return digests


def _upload(bucket: Bucket, files: list[LocalFile], progress: Progress | None) -> Digests:
    digests: Digests = {}
    total, done = sum(file.size for file in files), 0
    for file in files:
        hashing = Hashing(file.blocks())
        bucket.write(file.name, told(hashing, progress, done, total), new=False)
        digests[file.name] = hashing.hexdigest()
        done += file.size
    return digests
