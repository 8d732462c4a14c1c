"""Objects in a bucket, through fsspec: listed, read as they arrive, and written so that each appears whole."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from lorakit.checkpoints.moving.addresses import BUCKETS, Address
from lorakit.checkpoints.places import remote_entry
from lorakit.errors import Conflict, Incomplete, InvalidFile, LorakitError, NotFound, Refused

_BLOCK = 8 << 20  # of what is read, and of the parts that a large object is sent in


@dataclass(frozen=True, slots=True)
class Stored:
    """One object: its name below the address, its key, and its version as far as the bucket tells."""

    name: str
    key: str
    size: int
    modified: int
    version: str | int
    md5: bytes | None = None


class Bucket:
    """What is below one address.

    Raises, wherever the bucket is asked:
        NotFound, Refused, LorakitError: it has nothing there, does not let us, or can't be reached.
    """

    def __init__(self, address: Address) -> None:
        import fsspec

        self.shown = address.shown
        self.named_as_folder = address.path.endswith("/")
        scheme = address.shown.partition("://")[0]
        try:
            self.files, self.path = fsspec.core.url_to_fs(address.shown.rstrip("/"), use_listings_cache=False)
        except ImportError:
            raise LorakitError(
                f"'{self.shown}': what speaks {scheme}:// is not installed: pip install 'lorakit[{BUCKETS[scheme]}]'"
            ) from None

    def listed(self) -> list[Stored]:
        """Every object below the address, in the order of names."""
        with self._errors_named():
            infos = self.files.find(self.path, detail=True)
        return [
            self._stored(key.removeprefix(f"{self.path}/"), key, info)
            for key, info in sorted(infos.items())
            if key.startswith(f"{self.path}/") and info.get("type") != "directory" and not key.endswith("/")
        ]

    def alone(self) -> Stored | None:
        """The one object that the address names; None for a folder, which may have an empty object of its own name."""
        if self.named_as_folder or "/" not in self.path:
            return None
        with self._errors_named():
            if not self.files.isfile(self.path):
                return None
            info = self.files.info(self.path, refresh=True)
            if not info.get("size") and self.listed():
                return None
        return self._stored(self.path.rpartition("/")[2], self.path, info)

    def exists(self, name: str = "") -> bool:
        """Whether an object is there, or anything below it."""
        with self._errors_named():
            return bool(self.files.exists(f"{self.path}/{name}" if name else self.path))

    def blocks(self, stored: Stored) -> Iterator[bytes]:
        """The bytes of an object. Raises Incomplete when it was written again meanwhile, at the end."""
        md5 = hashlib.md5(usedforsecurity=False)
        with self._errors_named():
            with self.files.open(stored.key, "rb", block_size=_BLOCK, cache_type="readahead") as stream:
                while block := stream.read(_BLOCK):
                    md5.update(block)
                    yield block
            after = self._stored(stored.name, stored.key, self.files.info(stored.key))
        if (after.size, after.version, after.modified) != (stored.size, stored.version, stored.modified):
            raise Incomplete(f"'{self.shown}': {stored.name} was written to while it was copied: try again")
        if stored.md5 is not None and md5.digest() != stored.md5:
            raise InvalidFile(f"'{self.shown}': {stored.name} arrived damaged: its md5 is another; try again")

    def beginning(self, stored: Stored, count: int) -> bytes:
        """The first bytes of an object."""
        with self._errors_named():
            return bytes(self.files.cat_file(stored.key, start=0, end=min(count, stored.size))) if stored.size else b""

    def read(self, name: str) -> bytes | None:
        """A small object; None when it is not there."""
        with self._errors_named():
            try:
                return bytes(self.files.cat_file(f"{self.path}/{name}"))
            except FileNotFoundError:
                return None

    def write(self, name: str, blocks: Iterable[bytes], *, new: bool = True) -> int:
        """An object that appears whole or not at all: its size. An empty name is the address itself.

        Raises:
            Conflict: it is there, where it has to be new.
        """
        key = f"{self.path}/{name}" if name else self.path
        if new and self.exists(name):
            raise _there(f"{self.shown}/{name}".rstrip("/"))
        size = 0
        with self._errors_named():
            writer = self.files.open(key, "xb" if new else "wb", block_size=_BLOCK, autocommit=False)
            try:
                for block in blocks:
                    writer.write(block)
                    size += len(block)
                writer.flush(force=True)
                writer.commit()
                writer.closed = True
            except BaseException:
                writer.closed = True  # or the end of the object would send what there is
                with suppress(Exception):
                    writer.discard()
                raise
            written = int(self.files.info(key, refresh=True)["size"])
        if written != size:
            raise InvalidFile(f"'{self.shown}': of '{name}' {written} bytes arrived, and {size} were sent: try again")
        return size

    def remove(self, names: Iterable[str]) -> None:
        """Take away what was begun; what can't be stays."""
        for name in names:
            with suppress(Exception):
                self.files.rm_file(f"{self.path}/{name}")

    def _stored(self, name: str, key: str, info: dict[str, Any]) -> Stored:
        entry = remote_entry(info)
        md5 = info.get("md5Hash")
        known = base64.b64decode(md5) if md5 else None
        return Stored(name, key, entry.size, entry.written, entry.identity, known)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except LorakitError:
            raise
        except FileExistsError:
            raise _there(self.shown) from None
        except FileNotFoundError:
            raise NotFound(f"there is nothing at '{self.shown}'") from None
        except PermissionError as error:
            raise Refused(f"'{self.shown}': the bucket does not let you: {_line(error)}; check your login") from None
        except OSError as error:
            if error.errno is not None and error.filename is not None:  # of this machine's disk
                raise
            if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                raise _there(self.shown) from None
            raise LorakitError(f"'{self.shown}': the bucket: {_line(error)}") from None
        except Exception as error:  # the libraries' own have no base in common
            if type(error).__module__.partition(".")[0] not in _LIBRARIES:
                raise
            raise LorakitError(f"'{self.shown}' can't be used: {type(error).__name__}; check your login") from None


_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "boto3", "google", "gcsfs", "s3fs", "requests", "urllib3"}


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _there(shown: str) -> Conflict:
    return Conflict(f"'{shown}' exists already: remove it, or name another place")
