"""What a server says of the bytes behind a URL: how many, of which version, with which digests; or why not."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message

from lorakit.checkpoints.moving.addresses import expires_at
from lorakit.errors import InvalidFile, LorakitError, NotFound, Refused
from lorakit.files.addresses import without_secrets

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})  # may be well the next time
_ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512", "sha256": "sha256", "md5": "md5"}
_CODE = re.compile(rb"<Code>([A-Za-z]{1,64})</Code>")
_ASK = "ask for a new one"


class NotLetIn(Refused):
    """The server does not take the URL, or not any more: with a new one, what arrived is gone on with."""


@dataclass(frozen=True, slots=True)
class Said:
    """The headers that count. What was not said is None or empty.

    Attributes:
        size: Of the whole, in bytes as they travel.
        etag: A strong one: the same for the same bytes alone.
        modified: The time of the last change, as it was written.
        encoding: How the bytes are packed for travelling.
        digests: Name of the algorithm and digest of the whole, as it travels.
        name: What the file should be called.
        parts: Whether a part can be asked for.
    """

    size: int | None = None
    etag: str | None = None
    modified: str | None = None
    encoding: str = ""
    digests: tuple[tuple[str, bytes], ...] = ()
    name: str | None = None
    parts: bool = False

    def condition(self) -> dict[str, str]:
        """Headers that ask for these very bytes; none where nothing tells them from others."""
        if self.etag is not None:
            return {"if-match": self.etag}
        return {"if-unmodified-since": self.modified} if self.modified is not None else {}

    def is_changed_in(self, later: Said) -> bool:
        """Whether a later answer contradicts this one."""
        pairs = ((self.size, later.size), (self.etag, later.etag), (self.modified, later.modified))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def said_in(status: int, headers: Mapping[str, str]) -> Said:
    """Raises InvalidFile when the length is none, or the bytes are packed in a way that nobody asked for."""
    size = headers.get("content-length")
    if status == 206:
        size = headers.get("content-range", "").rpartition("/")[2]
        size = None if size == "*" else size
    if size is not None and not (size.isascii() and size.isdecimal() and len(size) < 20):
        raise InvalidFile(f"the server says that {size[:30]!r} bytes are to come, which is no number")
    etag = headers.get("etag", "")
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding in ("identity", "aws-chunked"):  # the second is left over from some uploads, and says nothing
        encoding = ""
    if encoding not in ("", "gzip", "x-gzip", "zstd"):
        raise InvalidFile(f"the server sends the bytes packed as {encoding[:30]!r}, though it was asked not to")
    return Said(
        size=None if size is None else int(size),
        etag=etag if etag.startswith('"') and len(etag) > 2 else None,
        modified=headers.get("last-modified"),
        encoding=encoding,
        digests=tuple(sorted(_digests(headers).items())),
        name=_name(headers.get("content-disposition", "")),
        parts=status == 206 or headers.get("accept-ranges", "").strip().lower() == "bytes",
    )


def _digests(headers: Mapping[str, str]) -> dict[str, bytes]:
    """Repr-Digest (RFC 9530), Digest (RFC 3230), Content-MD5, and what S3 and Google send of their own."""
    found: dict[str, bytes] = {}
    pairs = [("sha256", headers.get("x-amz-checksum-sha256", "")), ("md5", headers.get("content-md5", ""))]
    for field in ("repr-digest", "digest", "x-goog-hash"):
        for part in headers.get(field, "").split(","):
            name, _, value = part.strip().partition("=")
            pairs.append((_ALGORITHMS.get(name.lower(), ""), value.strip(":")))
    for name, value in pairs:
        try:
            digest = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):  # of several parts, "…-3": a digest of digests
            continue
        if name and len(digest) == hashlib.new(name, usedforsecurity=False).digest_size:
            found[name] = digest
    return found


def _name(disposition: str) -> str | None:
    message = Message()
    message["content-disposition"] = disposition
    name = message.get_filename()
    return name.rpartition("/")[2] or None if name else None


def refusal(status: int, body: bytes, url: str, address: str) -> LorakitError:
    """The error that an answer stands for. `url` is the one that was asked for at the end, `address` that of the start.

    Of the body, which may repeat parts of the URL, one word is taken.
    """
    shown = without_secrets(address)
    found = _CODE.search(body)
    code = found[1].decode() if found else ""
    word = f"{status} {code}".strip()
    ends = expires_at(url) or expires_at(address)
    if status in (404, 410):
        return NotFound(f"there is nothing at '{shown}': the server says {word}; check the address, or {_ASK}")
    if code == "SignatureDoesNotMatch" and not _over(ends):
        return NotLetIn(f"'{shown}': the URL is not whole, or was changed ({word}): paste it again, in single quotes")
    expired = code in ("ExpiredToken", "RequestExpired") or b"<Message>Request has expired</Message>" in body
    if expired or (status in (400, 401, 403) and _over(ends)):
        when = f" at {ends:%Y-%m-%d %H:%M:%S} UTC" if ends is not None and _over(ends) else ""
        return NotLetIn(f"'{shown}': the URL has expired{when}: {_ASK}")
    if status in (401, 403):
        return NotLetIn(f"'{shown}': the URL has expired or is not for you ({word}): {_ASK}")
    if status in PASSING:
        return LorakitError(f"'{shown}': the server can't answer now ({word}): try again later")
    return LorakitError(f"'{shown}': the server says {word}, and sends no file: check the address, or {_ASK}")


def _over(ends: datetime | None) -> bool:
    return ends is not None and ends < datetime.now(UTC)
