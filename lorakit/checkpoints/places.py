"""Where a checkpoint's files are, so that one rule judges them all: a folder, a single file, or an object store."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from lorakit.files.regular import at_once


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as it is now, or that there is a folder. `identity` differs once another has its name: inode or ETag."""

    size: int  # bytes
    written: int  # nanoseconds since 1970, by the clock of whoever keeps the file
    changed: int  # the same, of its last change of any sort
    identity: str | int
    is_folder: bool = False

    @property
    def stamp(self) -> str:
        """Differs after any rewrite."""
        return f"{self.size}:{self.written}:{self.identity}"


class Place(Protocol):
    """A folder's files, or a single file, by their names; looked up once, so one look sees one moment's listing."""

    @property
    def name(self) -> str:
        """The last part of its path."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is directly in it; of a single file, that. Raises OSError."""

    @property
    def is_file(self) -> bool:
        """Whether it is a single file. Raises OSError."""

    @property
    def above(self) -> Place:
        """The folder that it is in."""

    def inside(self, name: str) -> Place:
        """A folder in it."""

    def read(self, name: str, start: int = 0, count: int | None = None) -> bytes:
        """Bytes of a file in it, to its end without `count`. Raises OSError."""

    def local(self, name: str) -> Path | None:
        """Where this file is on this machine, if it is."""


def entry_of(place: Place, name: str) -> Entry | None:
    """What `name` or `folder/name` is; None when it is not there."""
    holder, last = within(place, name)
    try:
        return holder.entries.get(last)
    except (FileNotFoundError, NotADirectoryError):
        return None


def within(place: Place, name: str) -> tuple[Place, str]:
    """The folder that `folder/name` or `../name` is in, and the name there."""
    *folders, last = name.split("/")
    for folder in folders:
        place = place.above if folder == ".." else place.inside(folder)
    return place, last


class LocalPlace:
    """A folder or file of this machine, NFS among them: one listing for each folder."""

    def __init__(self, path: str | Path, *, above: LocalPlace | None = None) -> None:
        self.path = os.fspath(path)
        self._above = above
        self._inside: dict[str, LocalPlace] = {}

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))

    @cached_property
    def is_file(self) -> bool:
        return os.path.isfile(self.path)

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        if self.is_file:
            return {self.name: _entry(os.stat(self.path))}
        found = {}
        with os.scandir(self.path) as listed:
            for each in listed:
                try:
                    if each.is_dir():  # what is in it counts, and costs a look of its own
                        found[each.name] = Entry(0, 0, 0, each.inode(), is_folder=True)
                    elif each.is_file():  # a pipe would be waited for
                        found[each.name] = _entry(each.stat())
                except FileNotFoundError:  # a link to nowhere, or gone since
                    continue
                except OSError:
                    if not each.is_symlink():  # one that leads in a circle hides nothing
                        raise
        return found

    @property
    def above(self) -> LocalPlace:
        if self._above is None:
            self._above = LocalPlace(os.path.dirname(os.path.abspath(self.path)))
        return self._above

    def inside(self, name: str) -> LocalPlace:
        if name not in self._inside:
            self._inside[name] = LocalPlace(os.path.join(self.path, name), above=self)
        return self._inside[name]

    def read(self, name: str, start: int = 0, count: int | None = None) -> bytes:
        with open(self.local(name), "rb", opener=at_once) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise OSError(errno.EINVAL, "a pipe or a device, not a file", stream.name)
            stream.seek(start)
            return stream.read(-1 if count is None else count)

    def local(self, name: str) -> Path:
        return Path(self.path if self.is_file else os.path.join(self.path, name))


def _entry(status: os.stat_result) -> Entry:
    return Entry(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


class RemotePlace:
    """A folder or object of an fsspec file system: s3, gs, memory. Its times have whole seconds, mostly."""

    def __init__(self, files: Any, path: str) -> None:
        self.files = files
        self.path = path.rstrip("/")
        self._inside: dict[str, RemotePlace] = {}

    @classmethod
    def of(cls, url: str, **options: Any) -> RemotePlace:
        """`s3://bucket/run/checkpoint-500`; `options` are fsspec's for that protocol."""
        import fsspec

        files, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        return cls(files, path)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @cached_property
    def is_file(self) -> bool:
        if not self.files.isfile(self.path):
            return False  # a folder may have an empty object of its own name
        return all(str(info["name"]).rstrip("/") == self.path for info in self._listed())

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        listed = {str(info["name"]).rstrip("/"): info for info in self._listed()}
        return {
            path.rpartition("/")[2]: remote_entry(info)
            for path, info in listed.items()
            if self.is_file or path != self.path  # some stores keep an empty object in a folder's own name
        }

    def _listed(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.files.ls(self.path, detail=True, refresh=True)
        return listed

    @cached_property
    def above(self) -> RemotePlace:
        return RemotePlace(self.files, self.path.rpartition("/")[0])

    def inside(self, name: str) -> RemotePlace:
        if name not in self._inside:
            self._inside[name] = RemotePlace(self.files, f"{self.path}/{name}")
        return self._inside[name]

    def read(self, name: str, start: int = 0, count: int | None = None) -> bytes:
        path = self.path if self.is_file else f"{self.path}/{name}"
        end = None if count is None else start + count
        return bytes(self.files.cat_file(path, start=start, end=end))

    def local(self, name: str) -> Path | None:
        return None


# as fsspec's file systems call them
_TIMES = ("mtime", "LastModified", "last_modified", "updated", "created")
_IDENTITIES = ("ETag", "etag", "generation", "md5Hash", "ino")


def remote_entry(info: Mapping[str, Any]) -> Entry:
    """What a listing of fsspec says of one file or folder."""
    written = _nanoseconds(next((info[key] for key in _TIMES if info.get(key)), 0))
    identity = next((info[key] for key in _IDENTITIES if info.get(key)), "")
    return Entry(int(info.get("size") or 0), written, written, str(identity), info.get("type") == "directory")


def _nanoseconds(moment: Any) -> int:
    """Of seconds, a datetime, or ISO 8601, whichever a file system speaks."""
    if isinstance(moment, str):
        from datetime import datetime

        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            return 0
    seconds = moment if isinstance(moment, int | float) else moment.timestamp()
    return int(seconds * 1e9)
