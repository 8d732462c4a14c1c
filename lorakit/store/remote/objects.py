"""Objects of a bucket, read if they have changed and written if they have not: what an S3-compatible store does whole.

A request that fails for a reason that may pass is asked again a few times, each time later by chance; then it is
`Unreachable`. What a bucket says in an error is told without what may be secret in it.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from lorakit.errors import Incomplete, LorakitError, NotFound, Refused
from lorakit.files.addresses import without_queries
from lorakit.store.remote.address import StoreAddress, parse_store

_T = TypeVar("_T")

# Of a small object, and of a file: seconds to connect, seconds without a byte, attempts.
_SMALL = (3, 5, 3)
_FILE = (3, 60, 5)
_PAGE = 1000  # objects that one answer lists
_PROBES = 3  # until it is believed that a bucket takes no conditional writes
_PASSING = {408, 429, 500, 502, 503, 504}
_NO_CONDITIONS = {400, 405, 501}


class Unreachable(LorakitError):
    """The bucket does not answer, or fails, for longer than a request waits."""


class Lost(Exception):
    """An object was not as it had to be for a write: somebody else has written it."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as it was read or written; `etag` names this version of it."""

    body: bytes
    etag: str


class Objects:
    """What is below one address. Its methods block, and may be called from any thread.

    Raises, wherever the bucket is asked:
        Unreachable: it does not answer, or fails, again and again.
        NotFound: there is no such bucket.
        Refused: it does not let us.
        Incomplete: what it sent arrived damaged.
    """

    def __init__(self, address: StoreAddress) -> None:
        self.address = address
        self._small, self._files = _file_system(*_SMALL), _file_system(*_FILE)

    def read(self, name: str, known: Stored | None = None) -> Stored | None:
        """A small object; `known` itself where it is still that; None where there is none."""

        async def get() -> Stored | None:
            more = {"IfNoneMatch": known.etag} if known is not None else {}
            try:
                answer = await self._small._call_s3("get_object", **self._named(name), **more)
            except Exception as error:
                if _status(error) == 304:
                    return known
                if _code(error) == "NoSuchKey" or (_status(error) == 404 and _code(error) != "NoSuchBucket"):
                    return None
                raise
            async with answer["Body"] as stream:
                return Stored(await stream.read(), answer["ETag"])

        return self._asked(self._small, get)

    def write(self, name: str, body: bytes, *, over: Stored | None) -> Stored:
        """A small object, in the place of what it was when it was read, or where there was none.

        Raises:
            Lost: it is another by now, or there is one; or the bucket says so of an attempt of our own that it had
                answered to nobody: only a look at the object tells.
        """

        async def put() -> Stored:
            condition = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over.etag}
            try:
                answer = await self._small._call_s3("put_object", **self._named(name), Body=body, **condition)
            except Exception as error:
                if _status(error) in (409, 412) or (over is not None and _code(error) == "NoSuchKey"):
                    raise Lost(name) from None
                raise
            return Stored(body, answer["ETag"])

        return self._asked(self._small, put)

    def listed(self, folder: str) -> dict[str, str]:
        """The names of the objects below a folder, each with its etag."""

        async def ask() -> dict[str, str]:
            found: dict[str, str] = {}
            prefix, more = self._key(f"{folder}/"), dict[str, str]()
            while True:
                place = {"Bucket": self.address.bucket, "Prefix": prefix, "MaxKeys": _PAGE}
                answer = await self._small._call_s3("list_objects_v2", **place, **more)
                for one in answer.get("Contents", ()):
                    found[one["Key"].removeprefix(prefix)] = one["ETag"]
                if not answer.get("IsTruncated"):
                    return found
                more = {"ContinuationToken": answer["NextContinuationToken"]}

        return self._asked(self._small, ask)

    def remove(self, name: str) -> None:
        async def delete() -> None:
            await self._small._call_s3("delete_object", **self._named(name))

        self._asked(self._small, delete)

    def send(self, file: Path, name: str) -> None:
        """A file as an object, in parts where it is large; it appears whole."""
        self._asked(self._files, lambda: self._files._put_file(str(file), self._path(name)))

    def fetch(self, name: str, file: Path) -> bool:
        """An object into a file: whether there is one. Of one that is cut off, the file may hold the beginning."""
        try:
            self._asked(self._files, lambda: self._files._get_file(self._path(name), str(file)))
        except FileNotFoundError:
            return False
        return True

    def ensure_conditions(self) -> None:
        """Raises Refused where the bucket does not hold a write to what was said of it: then two servers that move the
        same alias at once would not know of one another."""
        if not any(self._keeps_conditions(f"probe/{uuid.uuid4().hex}") for _ in range(_PROBES)):
            raise Refused(
                f"'{self.address}' takes no conditional writes (If-None-Match and If-Match of PUT), without which "
                f"servers that share it would undo each other's changes: use a store that has them"
            )

    def _keeps_conditions(self, name: str) -> bool:
        """False also of a bucket that does, where an answer was lost and the write asked for again."""
        try:
            first = self.write(name, b"1", over=None)
            try:
                kept = self._is_refused(name, None) and self._is_refused(name, Stored(b"", '"0"'))
                self.write(name, b"2", over=first)
            finally:
                self.remove(name)
        except (Lost, _Unconditional):
            return False
        return kept

    def _is_refused(self, name: str, over: Stored | None) -> bool:
        try:
            self.write(name, b"0", over=over)
        except Lost:
            return True
        return False

    def _key(self, name: str) -> str:
        return f"{self.address.prefix}/{name}" if self.address.prefix else name

    def _path(self, name: str) -> str:
        return f"{self.address.bucket}/{self._key(name)}"

    def _named(self, name: str) -> dict[str, str]:
        return {"Bucket": self.address.bucket, "Key": self._key(name)}

    def _asked(self, files: Any, ask: Callable[[], Awaitable[_T]]) -> _T:
        from fsspec.asyn import sync

        try:
            found: _T = sync(files.loop, ask)
        except (LorakitError, Lost):
            raise
        except Exception as error:
            raise self._named_error(error) from None
        return found

    def _named_error(self, error: Exception) -> Exception:
        status, code = _status(error), _code(error)
        library = type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "fsspec")
        if code == "NoSuchBucket":
            return NotFound(f"there is no bucket '{self.address.bucket}': make it, or name another --store")
        if status in (401, 403) or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
            return Refused(
                f"the bucket of '{self.address}' does not let this server in ({_line(error)}): see its credentials in "
                f"the environment, and what they may do"
            )
        if isinstance(error, FileNotFoundError):
            return error
        if type(error).__name__ == "FlexibleChecksumError":  # botocore's, of what arrived
            return Incomplete(f"what '{self.address}' sent arrived damaged: {_line(error)}")
        if status in _NO_CONDITIONS:
            return _Unconditional(f"'{self.address}': the bucket: {_line(error)}")
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            return error  # of this machine's disk
        if status in _PASSING or library or isinstance(error, OSError):
            return Unreachable(f"the bucket of '{self.address}' does not answer: {_line(error)}")
        return error


def ensure_usable(address: str) -> None:
    """Without asking it anything.

    Raises:
        UsageError: it is no address of a bucket.
        LorakitError: what speaks to it is not installed.
    """
    parse_store(address)
    if find_spec("s3fs") is None:
        raise LorakitError(_MISSING)


_MISSING = "what speaks s3:// is not installed: pip install 'lorakit[s3]'"


class _Unconditional(LorakitError):
    """The bucket does not know what it was asked."""


def _file_system(connect: int, read: int, attempts: int) -> Any:
    import fsspec

    patience = {
        "connect_timeout": connect, "read_timeout": read,
        "retries": {"mode": "standard", "total_max_attempts": attempts},
    }  # fmt: skip
    try:
        files = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=patience)
    except ImportError:
        raise LorakitError(_MISSING) from None
    files.retries = 1  # those of botocore are enough
    return files


def _answer(error: BaseException) -> dict[str, Any]:
    for one in (error, error.__cause__):
        if isinstance(answer := getattr(one, "response", None), dict):
            return answer
    return {}


def _status(error: BaseException) -> int:
    return int(_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: BaseException) -> str:
    return str(_answer(error).get("Error", {}).get("Code", ""))


def _line(error: Exception) -> str:
    said = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
    return without_queries(said)[:200]
