"""A bucket's object, or the objects below an address, into a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lorakit.checkpoints.finished import look_at_url
from lorakit.checkpoints.moving.addresses import Address, archive_named
from lorakit.checkpoints.moving.buckets import Bucket, Stored
from lorakit.checkpoints.moving.from_url import Arrived, ensure_allowed, is_archive, refuse_one_digest
from lorakit.checkpoints.moving.manifest import FILE as MANIFEST
from lorakit.checkpoints.moving.trees import Hashing, Progress, ensure_space, steady, told
from lorakit.checkpoints.moving.under_way import BEGUN
from lorakit.errors import Incomplete, NotFound, Refused
from lorakit.files.archive_members import Members
from lorakit.files.archive_tar import RECORD
from lorakit.files.archives import Limits, extract_stream


def fetch_bucket(
    address: Address, folder: Path, limits: Limits, unfinished: bool, sha256: str | None, progress: Progress | None
) -> Arrived:
    bucket = Bucket(address)
    found = found_in(bucket, address, limits, unfinished)
    if isinstance(found, Stored):
        arrived = _fetch_object(bucket, found, folder, limits, progress)
        twin = f"there is a folder of that name, too, which is '{address.shown}/'"
        return replace(arrived, notes=(twin,)) if bucket.listed() else arrived
    refuse_one_digest(sha256, address)
    ensure_space(sum(one.size for one in found), folder)
    with steady(lambda: look_at_url(address.shown), address.shown, unfinished=unfinished or is_exported(found)):
        digests = _copy_objects(bucket, found, Members(folder, limits), progress)
    return Arrived(None, tuple(one.name for one in found), sum(one.size for one in found), None, digests)


def found_in(bucket: Bucket, address: Address, limits: Limits, unfinished: bool) -> Stored | list[Stored]:
    """The object that the address names, or those below it.

    Raises:
        NotFound, Refused: there is none, or there are more than there may be.
        Incomplete: they are an export that is under way.
    """
    one = bucket.alone()
    if one is not None:
        ensure_allowed(one.size, limits, address.shown)
        return one
    found = bucket.listed()
    if not found:
        raise NotFound(f"there is nothing at '{bucket.shown}'")
    if BEGUN in {each.name for each in found} and not is_exported(found) and not unfinished:
        raise Incomplete(f"'{address.shown}' is an export that has not come to its end: run it again, or wait")
    found = [each for each in found if each.name != BEGUN]
    ensure_allowed(sum(each.size for each in found), limits, address.shown)
    if len(found) > limits.max_files:
        raise Refused(
            f"'{address.shown}' holds {len(found)} objects, more than the {limits.max_files} that are allowed: raise "
            f"--max-files if it is to be trusted"
        )
    return found


def is_exported(found: list[Stored]) -> bool:
    return any(one.name == MANIFEST for one in found)


def _copy_objects(bucket: Bucket, found: list[Stored], members: Members, progress: Progress | None) -> dict[str, str]:
    total, done, digests = sum(one.size for one in found), 0, {}
    for one in found:
        hashing = Hashing(told(bucket.blocks(one), progress, done, total))
        members.file(one.name, hashing, one.size, one.modified / 1e9)
        digests[one.name] = hashing.hexdigest()
        done += one.size
    return digests


def is_archive_there(bucket: Bucket, one: Stored) -> bool:
    return is_archive(one.name, bucket.beginning(one, RECORD))


def _fetch_object(bucket: Bucket, one: Stored, folder: Path, limits: Limits, progress: Progress | None) -> Arrived:
    archived = is_archive_there(bucket, one)
    blocks = Hashing(told(bucket.blocks(one), progress, 0, one.size))
    if archived:
        extracted = extract_stream(_Blocks(iter(blocks)), folder, kind=archive_named(one.name), limits=limits)
        return Arrived(extracted.kind, extracted.files, extracted.bytes, extracted.sha256)
    ensure_space(one.size, folder)
    Members(folder, limits).file(one.name, blocks, one.size)
    return Arrived(None, (one.name,), one.size, blocks.hexdigest())


class _Blocks:
    """Blocks as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = b""

    def read(self, size: int, /) -> bytes:
        self._left = self._left or next(self._blocks, b"")
        piece, self._left = self._left[:size], self._left[size:]
        return piece
