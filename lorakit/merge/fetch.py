"""A base on the hub, shard by shard: planned from headers alone, and downloaded while earlier shards are merged."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lorakit.errors import Conflict, InvalidFile, OutOfSpace
from lorakit.files.folders import FileState, file_state, free_bytes, read_json
from lorakit.files.hub import HubFiles, NoSuchFile, hub_folder
from lorakit.files.safetensors import MAX_HEADER, Header, StoredTensor, parse_header, read_header
from lorakit.merge.base import HUB_PATTERNS, INDEX, SINGLE, BaseModel, checked_base, read_base, shard_names

if TYPE_CHECKING:
    from lorakit.merge.plan import MergePlan

Found = TypeVar("Found")

ALL_BUT_WEIGHTS = (*(pattern for pattern in HUB_PATTERNS if pattern != "*.safetensors"), "README.md")
FIRST_BYTES = 1 << 18  # most headers are smaller, so one request is enough


class RemoteShards:
    """The shards of one commit: some are in the cache, the others come when they are asked for."""

    def __init__(self, files: HubFiles, folder: Path) -> None:
        self.name = files.name
        self.commit = folder.name
        self._files = files
        self._folder = folder
        self._headers: dict[Path, Header] = {}
        self._states: dict[Path, FileState] = {}
        self._coming: dict[Path, Future[None]] = {}

    def header(self, name: str) -> Header:
        """The head of a shard, from the cache or from the hub."""
        file = self._folder / name
        header = read_header(file) if file.is_file() else self._remote_header(file)
        self._headers[file] = header
        return header

    def _remote_header(self, file: Path) -> Header:
        start, size = self._files.part(file.name, self.commit, 0, FIRST_BYTES)
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else MAX_HEADER + 1
        if length > MAX_HEADER or 8 + length > size:
            raise InvalidFile(f"'{file.name}' of '{self.name}' on the hub is no safetensors file")
        while len(start) < 8 + length:
            more, _ = self._files.part(file.name, self.commit, len(start), 8 + length - len(start))
            if not more:
                raise InvalidFile(f"'{file.name}' of '{self.name}' on the hub is cut short")
            start += more
        head = start[: 8 + length]
        return replace(parse_header(file, head[8:], size), head=head)

    def fetch(self, file: Path) -> None:
        """Download a shard, if it is not in the cache.

        Raises:
            NotFound: the hub can't be reached, or has it no more.
            Conflict: what came is not what was planned with.
        """
        if not file.is_file():
            self._files.download(file.name, self.commit)
        state = file_state(file)
        if replace(read_header(file), head=None) != replace(self._headers[file], head=None):
            raise Conflict(f"'{file.name}' of '{self.name}' is not what its header on the hub said: start anew")
        self._states[file] = state

    def begin(self, files: Iterable[Path]) -> None:
        """Download these in the background, in this order; see `arrival`.

        By a daemon thread, which does not hold up the end of an interrupted merge. What it has by then is in the cache.
        """
        wanted = [file for file in dict.fromkeys(files) if file in self._headers]
        self._coming = {file: Future() for file in wanted}
        threading.Thread(target=self._fetch_all, args=(dict(self._coming),), name="fetch", daemon=True).start()

    def _fetch_all(self, coming: dict[Path, Future[None]]) -> None:
        failed: BaseException | None = None
        for file, arrival in coming.items():
            if not arrival.set_running_or_notify_cancel():
                continue
            try:
                if failed is not None:
                    raise failed
                self.fetch(file)
            except BaseException as error:
                failed = error
                arrival.set_exception(error)
            else:
                arrival.set_result(None)

    def stop(self) -> None:
        """Begin no further download."""
        for arrival in self._coming.values():
            arrival.cancel()

    def arrivals(self, part: object) -> list[Future[None]]:
        """What has to come before this part of a plan can be done."""
        return [self._coming[file] for file in self.files_of(part) if file in self._coming]

    def files_of(self, part: object) -> list[Path]:
        """The shards that this part of a plan reads, in order."""
        return [file for file in dict.fromkeys(stored.file for stored in _stored_in(part)) if file in self._headers]

    def ensure_unchanged(self) -> None:
        """Raises Conflict when a shard was written again since it came."""
        for file, state in self._states.items():
            if file_state(file) != state:
                raise Conflict(f"'{file}' was written again while it was read: start anew")

    def missing_bytes(self, part: object) -> int:
        """How much has to be downloaded before this part of a plan can be done."""
        return sum(self._headers[file].size for file in self.files_of(part) if self.is_missing(file))

    def is_missing(self, file: Path) -> bool:
        """Whether it is a shard that is not in the cache."""
        return file in self._headers and not file.is_file()


def with_values(base: BaseModel, work: Callable[[], Found]) -> Found:
    """Do what needs the headers of a base, and now and then the values of a tensor: then that shard comes first."""
    while True:
        try:
            return work()
        except FileNotFoundError as error:
            file = Path(os.fsdecode(error.filename or ""))
            if base.remote is None or not base.remote.is_missing(file):
                raise
            base.remote.fetch(file)


def ensure_room_for_shards(plan: MergePlan, target: Path, whole: Collection[str]) -> None:
    """Raises OutOfSpace when what is still to download doesn't fit into the cache, beside the result if need be."""
    remote = plan.base.remote
    if remote is None:
        return
    shards = [shard for shard in plan.shards if shard.name not in whole]
    needed = remote.missing_bytes(shards)
    if target.parent.stat().st_dev == plan.base.folder.stat().st_dev:
        needed += sum(shard.target.size for shard in shards)
    free = free_bytes(plan.base.folder)
    if needed > free:
        raise OutOfSpace(
            f"the shards of '{remote.name}' that are not in the cache and the result need {needed / 1e9:.1f} GB at "
            f"'{plan.base.folder}', and {free / 1e9:.1f} GB are free there: free some space, or set HF_HUB_CACHE to "
            f"another place"
        )


def _stored_in(part: Any) -> Iterable[StoredTensor]:
    if isinstance(part, StoredTensor):
        yield part
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _stored_in(item)
    elif is_dataclass(part) and not isinstance(part, Header | type):
        for field in fields(part):
            yield from _stored_in(getattr(part, field.name))


def open_base(reference: str | os.PathLike[str]) -> BaseModel:
    """As `read_base`, but of a base on the hub no weight is downloaded yet."""
    name = os.fspath(reference)
    if Path(name).is_dir() or not HubFiles.can_read_parts():
        return read_base(name)
    folder = hub_folder(name, what="base", patterns=ALL_BUT_WEIGHTS)
    if not (folder / "config.json").is_file():
        return read_base(folder)  # which says what is wrong
    remote = RemoteShards(HubFiles(name), folder)
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else None
    names = [SINGLE] if index is None else shard_names(folder, index)
    try:
        shards = tuple(remote.header(name) for name in names)
    except NoSuchFile as error:
        if index is not None:
            raise InvalidFile(f"base '{name}' is incomplete: its index names more than there is: {error}") from None
        raise InvalidFile(
            f"base '{name}' has no weights as safetensors on the hub, neither {SINGLE} nor {INDEX}: name a revision "
            f"that has them (NAME@REVISION), or save it as safetensors"
        ) from None
    return checked_base(BaseModel(name, folder, read_json(folder / "config.json"), shards, index, (), remote))
