"""`lorakit fetch`: a checkpoint from wherever it is into a folder, whole or not at all, and what it is."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapters.reading import UNFINISHED
from lorakit.checkpoints.finished import look_at, look_at_url
from lorakit.checkpoints.locate import find_checkpoint, nothing_named
from lorakit.checkpoints.metadata import Metadata
from lorakit.checkpoints.moving.addresses import Address, archive_named, hub_address, parse_address
from lorakit.checkpoints.moving.buckets import Bucket, Stored
from lorakit.checkpoints.moving.described import described, writer_of
from lorakit.checkpoints.moving.download import Patience
from lorakit.checkpoints.moving.from_bucket import fetch_bucket, found_in, is_archive_there, is_exported
from lorakit.checkpoints.moving.from_url import (
    Arrived,
    ensure_allowed,
    fetch_url,
    innermost,
    is_archive,
    is_begun,
    look_ahead,
    refuse_one_digest,
    unwrap,
)
from lorakit.checkpoints.moving.hub import commit_of, ensure_as_on_hub, hub_listing, snapshot
from lorakit.checkpoints.moving.manifest import FILE as MANIFEST
from lorakit.checkpoints.moving.manifest import verify_manifest
from lorakit.checkpoints.moving.stored import content_digest, ensure_intact, is_done
from lorakit.checkpoints.moving.trees import (
    LocalFile,
    Progress,
    copy_files,
    ensure_finished,
    ensure_space,
    files_of,
    steady,
)
from lorakit.checkpoints.trainer_state import FILE as TRAINER_STATE
from lorakit.errors import InvalidFile, NotFound
from lorakit.files.archive_tar import RECORD
from lorakit.files.archives import Limits, extract_stream
from lorakit.files.folders import refuse_existing, whole_folder
from lorakit.files.hub import looks_like_hub_id
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.files.provenance import write_provenance

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came, and what it is.

    Attributes:
        out: The folder that it is in.
        source: Where it came from, without secrets.
        checkpoint: What is known of it.
        writer: Whose files they are.
        files: Names of the files, those that lorakit adds not among them.
        bytes: Of these files.
        sha256: Of the archive or the single file that it came as.
        seconds: That it took.
        resumed: How often a broken connection was gone on with.
        notes: What a person should know.
    """

    out: Path
    source: str
    checkpoint: Metadata
    writer: str | None
    files: tuple[str, ...]
    bytes: int
    sha256: str | None
    seconds: float
    resumed: int = 0
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As an entry of `lorakit ls --json`, with what the fetch adds."""
        return {
            **self.checkpoint.as_dict(),
            "writer": self.writer,
            "source": self.source,
            "files": list(self.files),
            "sha256": self.sha256,
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """What would come: `kind` is "archive", "file" or "folder"; `size` and `files` as far as the source tells."""

    source: str
    out: Path
    kind: str
    name: str
    size: int | None
    files: tuple[str, ...] | None
    resumable: bool

    def as_dict(self) -> dict[str, Any]:
        files = None if self.files is None else list(self.files)
        return {
            "source": self.source, "out": str(self.out), "kind": self.kind, "name": self.name, "size": self.size,
            "files": files, "resumable": self.resumable,
        }  # fmt: skip


def plan_fetch(
    reference: str | Address,
    out: Path,
    *,
    sha256: str | None = None,
    limits: Limits | None = None,
    patience: Patience | None = None,
    unfinished: bool = False,
) -> FetchPlan:
    """Ask what there is, and write nothing.

    Raises:
        Conflict: `out` exists.
        NotFound, Refused, Incomplete, UsageError, LorakitError: as `fetch`, as far as the source tells.
    """
    refuse_existing(out)
    address, limits = source_address(reference), limits or Limits()
    match address.way:
        case "url":
            ahead = look_ahead(address, patience or Patience())
            ensure_allowed(ahead.size or 0, limits, address.shown)
            return FetchPlan(address.shown, out, ahead.kind, ahead.name, ahead.size, None, ahead.resumable)
        case "bucket":
            bucket = Bucket(address)
            found = found_in(bucket, address, limits, unfinished)
            if isinstance(found, Stored):
                kind = "archive" if is_archive_there(bucket, found) else "file"
                return _plan(address, out, kind, {found.name: found.size})
            ensure_finished(look_at_url(address.shown), address.shown, unfinished=unfinished or is_exported(found))
            return _plan(address, out, "folder", {one.name: one.size for one in found}, sha256)
        case "hub":
            listed = hub_listing(address)
            ensure_allowed(sum(size or 0 for size in listed.values()), limits, address.shown)
            return _plan(address, out, "folder", listed, sha256)
        case "local":
            source = Path(address.path)
            if _is_archive_here(source):
                return _plan(address, out, "archive", {source.name: source.stat().st_size})
            files = _files_here(source, address, limits)
            ensure_finished(look_at(source), str(source), unfinished=unfinished or is_done(source))
            sizes = {file.name: file.size for file in files}
            return (
                _plan(address, out, "folder", sizes, sha256) if source.is_dir() else _plan(address, out, "file", sizes)
            )


def _plan(
    address: Address, out: Path, kind: str, sizes: Mapping[str, int | None], sha256: str | None = None
) -> FetchPlan:
    if kind == "folder":
        refuse_one_digest(sha256, address)
    known = [size for size in sizes.values() if size is not None]
    size = sum(known) if len(known) == len(sizes) else None
    return FetchPlan(address.shown, out, kind, address.name, size, tuple(sizes) if kind == "folder" else None, True)


def source_address(reference: str | Address) -> Address:
    """What is meant: a URL or another address; else a path, a name in the store, a hub id, in this order.

    A run stands for its newest finished checkpoint. What is local has the path of the checkpoint itself.

    Raises:
        NotFound: it is none of these.
        UsageError: as `parse_address`.
    """
    address = parse_address(reference) if isinstance(reference, str) else reference
    if address.way != "local":
        return address
    found = find_checkpoint(address.path)
    if found is not None:
        return replace(address, path=os.path.abspath(found))
    if address.text == address.path and looks_like_hub_id(address.text):
        return hub_address(address.text)
    raise nothing_named(address.path)


def fetch(
    reference: str | Address,
    out: Path,
    *,
    sha256: str | None = None,
    limits: Limits | None = None,
    patience: Patience | None = None,
    unfinished: bool = False,
    with_digest: bool = True,
    progress: Progress | None = None,
    through: httpx.BaseTransport | None = None,
) -> Fetched:
    """Get a checkpoint into the folder `out`, which appears whole or not at all.

    Args:
        sha256: What the archive or the single file has to have.
        unfinished: Take a checkpoint that its writer is not done with, too.
        through: The one way to a URL.

    Raises:
        Conflict: `out` exists.
        NotFound: there is nothing there.
        Refused: the URL has expired; or an archive is refused, as by `extract_stream`.
        Incomplete: the checkpoint is not finished, or was written to meanwhile.
        InvalidFile: what came is damaged, or not of the digest that it should have.
        OutOfSpace, LorakitError: the disk is full, or the source can't be reached. Nothing is left of it.
    """
    began = time.monotonic()
    refuse_existing(out)
    address = source_address(reference)
    limits, patience = limits or Limits(), patience or Patience()
    with whole_folder(out, take_up=lambda folder: is_begun(folder, address)) as folder:
        match address.way:
            case "url":
                arrived = fetch_url(
                    address, folder, limits=limits, patience=patience, sha256=sha256, progress=progress,
                    through=through,
                )  # fmt: skip
            case "bucket":
                arrived = fetch_bucket(address, folder, limits, unfinished, sha256, progress)
            case "hub":
                arrived = _fetch_hub(address, folder, limits, sha256, progress)
            case "local":
                arrived = _fetch_local(address, folder, limits, unfinished, sha256, progress)
        _check_digest(arrived, sha256, address)
        top, vouched, doubt = _as_it_came(arrived, folder, address, unfinished)
        listed = verify_manifest(folder)
        writer = writer_of(folder)  # before lorakit's own file is there
        if vouched and not unfinished and not (folder / PROVENANCE).exists():
            write_provenance(folder, "fetch", [_parent(address, arrived)], {})
    checkpoint = described(out, top and os.path.basename(top), with_digest=with_digest)
    files = tuple(name.removeprefix(f"{top}/") if top else name for name in arrived.files)
    return Fetched(
        out, address.shown, checkpoint, writer, files, arrived.bytes, arrived.sha256, time.monotonic() - began,
        arrived.resumed, (*arrived.notes, *doubt, *_what_is_verified(files, listed)),
    )  # fmt: skip


def _as_it_came(
    arrived: Arrived, folder: Path, address: Address, unfinished: bool
) -> tuple[str | None, bool, tuple[str, ...]]:
    """What was unwrapped, whether lorakit may vouch for what it is, and what speaks against that.

    Raises:
        Incomplete: it is of a checkpoint that was not finished when it was packed.
    """
    one_file = arrived.kind is None and len(arrived.files) == 1
    inner = innermost(folder) if arrived.kind is not None else folder
    look = look_at(inner)  # under the name that it had, which may tell its step
    begun = look.state == "incomplete" and (look.writer is not None or (inner / UNFINISHED).exists())
    if begun and arrived.kind is not None:
        ensure_finished(look, address.shown, unfinished=unfinished)
    if arrived.kind is None:
        return None, not begun or one_file, ()
    doubtful = look.state == "whole" and (inner / TRAINER_STATE).exists()  # its trainer's last word is of another save
    doubt = (f"nothing says that its writer was done when it was packed: {look.reason}",) if doubtful else ()
    return unwrap(folder), not (begun or doubtful), doubt


def _what_is_verified(files: tuple[str, ...], listed: frozenset[str] | None) -> list[str]:
    if listed is None:
        return []
    others = sorted(set(files) - listed - {MANIFEST, PROVENANCE})
    if not others:
        return [f"every file is as {MANIFEST} says"]
    some = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
    return [f"the files that {MANIFEST} names are as it says; it does not name {some}"]


def _parent(address: Address, arrived: Arrived) -> dict[str, str]:
    """As `lorakit.json` names what a folder was made of."""
    here = address.way == "local" and os.path.exists(address.shown)
    said = {"path": os.path.abspath(address.shown) if here else address.shown}
    if arrived.commit is not None:
        said["commit"] = arrived.commit
    if arrived.sha256 is not None:
        said["sha256"] = arrived.sha256
    elif arrived.digests is not None:
        said["content_sha256"] = content_digest(arrived.digests)
    return said


def _check_digest(arrived: Arrived, sha256: str | None, address: Address) -> None:
    if sha256 is not None and address.way != "url" and arrived.sha256 != sha256:  # of that, the download knows more
        raise InvalidFile(
            f"'{address.shown}': its sha256 is {arrived.sha256}, and should be {sha256}: it is damaged, or another one"
        )


def _files_here(source: Path, address: Address, limits: Limits) -> list[LocalFile]:
    files = files_of(source)
    ensure_allowed(sum(file.size for file in files), limits, address.shown)
    return files


def _is_archive_here(source: Path) -> bool:
    if not source.is_file():
        return False
    with source.open("rb") as stream:
        return is_archive(source.name, stream.read(RECORD))


def _fetch_local(
    address: Address, folder: Path, limits: Limits, unfinished: bool, sha256: str | None, progress: Progress | None
) -> Arrived:
    source = Path(address.path)
    if _is_archive_here(source):
        size = source.stat().st_size
        with source.open("rb") as stream:
            extracted = extract_stream(
                stream, folder, kind=archive_named(source.name), limits=limits,
                progress=progress and (lambda done: progress(done, size)),
            )  # fmt: skip
        return Arrived(extracted.kind, extracted.files, extracted.bytes, extracted.sha256)
    if source.is_dir():
        refuse_one_digest(sha256, address)
    files = _files_here(source, address, limits)
    ensure_space(sum(file.size for file in files), folder)
    with steady(lambda: look_at(source), str(source), unfinished=unfinished or is_done(source)):
        digests = copy_files(files, folder, progress=progress, with_digests=True)
    ensure_intact(source, digests)
    return _arrived(files, digests, digests[files[0].name] if source.is_file() else None)


def _fetch_hub(
    address: Address, folder: Path, limits: Limits, sha256: str | None, progress: Progress | None
) -> Arrived:
    refuse_one_digest(sha256, address)
    with suppress(NotFound):  # without the hub, its cache may have all
        ensure_allowed(sum(size or 0 for size in hub_listing(address).values()), limits, address.shown)
    source = snapshot(address)
    files = _files_here(source, address, limits)
    ensure_space(sum(file.size for file in files), folder)
    digests = copy_files(files, folder, progress=progress, with_digests=True)
    ensure_as_on_hub(files, folder)
    return replace(_arrived(files, digests, None), commit=commit_of(source))


def _arrived(files: list[LocalFile], digests: Mapping[str, str], sha256: str | None) -> Arrived:
    return Arrived(None, tuple(file.name for file in files), sum(file.size for file in files), sha256, digests)
