"""`lorakit.sha256`: the digest of every file beside it, as `sha256sum` writes and checks them. Written last."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from lorakit.errors import InvalidFile, Refused
from lorakit.files.archive_members import safe_parts
from lorakit.files.archives import Limits
from lorakit.files.digests import file_digest

FILE = "lorakit.sha256"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def manifest(digests: Mapping[str, str]) -> str:
    """Names to digests, as text."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def parse_manifest(text: str, shown: str) -> dict[str, str]:
    """Raises InvalidFile when it is none, or has a name that leads elsewhere."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        try:
            known = match is not None and bool(safe_parts(match[2], Limits()))
        except Refused:
            known = False
        if match is None or not known:
            raise InvalidFile(f"'{shown}' is no list of digests as sha256sum writes them")
        found[match[2]] = match[1]
    return found


def verify_manifest(folder: Path) -> frozenset[str] | None:
    """The names in it, all of which are as it says; None when there is none.

    Raises:
        InvalidFile: it can't be read; or a file is missing, or is another one.
    """
    file = folder / FILE
    try:
        said = parse_manifest(file.read_text(encoding="utf-8"), FILE)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        raise InvalidFile(f"'{FILE}' can't be read") from None
    for name, digest in said.items():
        if not (folder / name).is_file():
            raise InvalidFile(f"'{name}' is missing, which {FILE} names: the copy is not whole, make it again")
        if file_digest(folder / name) != digest:
            raise InvalidFile(f"'{name}' is not what {FILE} says: it was damaged or changed on the way")
    return frozenset(said)
