"""Where a checkpoint is or goes to, from what a person types; and an address without its secrets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from lorakit.errors import UsageError
from lorakit.files.addresses import without_secrets
from lorakit.files.archives import Kind
from lorakit.files.hub import looks_like_hub_id

Way = Literal["url", "hub", "bucket", "local"]

BUCKETS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}  # each with the extra that brings its library
_SUFFIXES: dict[str, Kind] = {
    ".tar": "tar", ".tar.gz": "tar.gz", ".tgz": "tar.gz", ".tar.zst": "tar.zst", ".tzst": "tar.zst", ".zip": "zip",
}  # fmt: skip
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SIGNED = re.compile(r"\?.*(signature|token|sig)=", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Address:
    """One place.

    Attributes:
        text: The whole of it, secrets and all: never to be printed or stored.
        way: How it is reached; what is `local` may be a path, or a name in the store.
        shown: The same without secrets, for people and files.
        path: A path here; bucket and key; `owner/name[@revision]`; the path of a URL.
        below: On the hub, the folder in the repository; else empty.
    """

    text: str
    way: Way
    shown: str
    path: str
    below: str = ""

    @property
    def name(self) -> str:
        """The last part of the path; on the hub, of the repository's name."""
        path = self.path.partition("@")[0] if self.way == "hub" else self.path.rstrip("/")
        return path.rpartition("/")[2]

    @property
    def archive(self) -> Kind | None:
        """The kind of archive that the name says."""
        return archive_named(self.name) if self.way != "hub" else None


def parse_address(text: str) -> Address:
    """Take apart `https://…`, `s3://…`, `gs://…`, `hf://…`, `file://…`; all else is a path, or a name.

    Raises:
        UsageError: it is of another scheme, is not whole, or names nothing.
    """
    text = _unquoted(text)
    scheme = _SCHEME.match(text)
    if scheme is None:
        if not text:
            raise UsageError("an empty address names nothing: give a URL, a path, a hub id, or a name in the store")
        _refuse_broken_url(text)
        return Address(text, "local", text, text)
    way, rest = scheme[1].lower(), text[scheme.end() :]
    if way in ("http", "https"):
        return _url(text)
    if way == "hf":
        return _hub(text, rest)
    if way == "file":
        return Address(text, "local", text, unquote(rest.removeprefix("localhost")))
    if way in BUCKETS:
        return _bucket(text, way, rest)
    raise UsageError(
        f"'{way}://' is no address that lorakit knows: there are https, http, {', '.join(BUCKETS)}, hf and file"
    )


def _unquoted(text: str) -> str:
    """Without what comes along when a line is pasted; a path that is there keeps all that it has."""
    return text if os.path.lexists(text) else text.strip().strip("'\"`‘’“”").strip()


def _refuse_broken_url(text: str) -> None:
    """A URL whose beginning was lost is no name of a file: and it may be half of a secret."""
    if not os.path.lexists(text) and (re.match("https?:", text, re.IGNORECASE) or _SIGNED.search(text)):
        raise UsageError(f"'{without_secrets(text)}' is no URL: paste it again from its https:// on, in single quotes")


def _bucket(text: str, way: str, rest: str) -> Address:
    host, slash, key = rest.partition("/")
    path = host.rpartition("@")[2] + slash + key  # as in every address, what stands before an @ is a secret
    if not path.strip("/"):
        raise UsageError(f"'{way}://' names no bucket: write {way}://BUCKET/PATH")
    if "::" in path:
        raise UsageError(f"'{way}://{path}' has '::' in it, which chains file systems: name a path without it")
    return Address(text, "bucket", f"{way}://{path}", path)


def _url(text: str) -> Address:
    try:
        text.encode()
        parts = urlsplit(text)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        behind = text.rpartition("@")[2] if "@" in text else text.partition("://")[2]
        shown = f"{text.partition(':')[0].lower()}://{re.split('[/?#:]', behind)[0]}"
        raise UsageError(f"'{without_secrets(shown)}' is no URL: paste it again, in single quotes") from None
    if not host:
        raise UsageError(f"'{without_secrets(text)}' names no host: paste the URL again, in single quotes")
    asked = parse_qs(parts.query, keep_blank_values=True)
    for one, last in (("X-Amz-Algorithm", "X-Amz-Signature"), ("X-Goog-Algorithm", "X-Goog-Signature")):
        if one in asked and last not in asked:
            raise UsageError(
                f"the URL '{without_secrets(text)}' was cut short, as it has no {last}: a shell ends a word at '&', so "
                f"put the URL in single quotes"
            )
    return Address(text, "url", without_secrets(text), unquote(parts.path))


def _hub(text: str, rest: str) -> Address:
    kind = rest.partition("/")[0]
    if kind in ("datasets", "spaces", "buckets"):
        raise UsageError(
            f"'{without_secrets(text)}' is one of the hub's {kind}: checkpoints are in model repositories, hf://OWNER/NAME"
        )
    owner, _, behind = rest.removeprefix("models/").partition("/")
    name, _, below = behind.partition("/")
    reference = unquote(f"{owner}/{name}")
    below = below.strip("/")
    if not looks_like_hub_id(reference) or {"", ".", ".."}.intersection(below.split("/") if below else ()):
        raise UsageError(
            f"'{without_secrets(text)}' names nothing on the hub: write hf://OWNER/NAME[@REVISION][/FOLDER]"
        )
    return Address(text, "hub", text, reference, below)


def hub_address(reference: str) -> Address:
    """`owner/name`, `owner/name@revision`, or either behind `hf://`.

    Raises:
        UsageError: it is neither.
    """
    reference = _unquoted(reference)
    if reference.startswith("hf://"):
        return parse_address(reference)
    if not looks_like_hub_id(reference):
        raise UsageError(
            f"'{without_secrets(reference)}' names no repository on the hub: write OWNER/NAME or OWNER/NAME@REVISION"
        )
    return Address(reference, "hub", reference, reference)


def archive_named(name: str) -> Kind | None:
    """What kind of archive a name says that it is."""
    lower = name.lower()
    return next((kind for suffix, kind in _SUFFIXES.items() if lower.endswith(suffix)), None)


def expires_at(url: str) -> datetime | None:
    """When a pre-signed URL ends, where its query says so (AWS and Google, signatures 4 and 2; Azure)."""
    asked = {name.lower(): values[0] for name, values in parse_qs(urlsplit(url).query).items()}
    try:
        for vendor in ("amz", "goog"):
            begins, seconds = asked.get(f"x-{vendor}-date"), asked.get(f"x-{vendor}-expires")
            if begins and seconds:
                signed = datetime.strptime(begins, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                return signed + timedelta(seconds=int(seconds))
        if asked.get("expires", "").isdecimal():
            return datetime.fromtimestamp(int(asked["expires"]), UTC)
        return datetime.fromisoformat(asked["se"]).astimezone(UTC) if "se" in asked and "sig" in asked else None
    except (ValueError, OverflowError, OSError):
        return None


def local_path(address: Address) -> Path:
    return Path(address.path)
