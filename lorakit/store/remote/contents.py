"""The files of a revision in a bucket: sent before anything names them, and never taken without their digest."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lorakit.errors import Incomplete, InvalidFile
from lorakit.files.digests import folder_digest
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.store.remote.objects import Lost, Objects

MANIFEST = "manifest.json"
MOST_FILES = 32
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def send_revision(objects: Objects, folder: Path) -> None:
    """A revision's folder, whose name is its digest, unless it is there whole. The manifest, which makes it that, comes
    last; where its files came from stands in that, as it is no part of the digest."""
    place = f"revisions/{folder.name}"
    if objects.read(f"{place}/{MANIFEST}") is not None:
        return
    names = sorted(path.name for path in folder.iterdir() if path.name != PROVENANCE)
    for name in names:
        objects.send(folder / name, f"{place}/{name}")
    origin = folder / PROVENANCE
    manifest = {
        "format": 1,
        "files": {name: (folder / name).stat().st_size for name in names},
        "provenance": origin.read_text(encoding="utf-8", errors="replace") if origin.is_file() else None,
    }
    try:
        objects.write(f"{place}/{MANIFEST}", json.dumps(manifest, indent=1).encode(), over=None)
    except Lost:  # another machine has sent the same
        return


def fetch_revision(objects: Objects, digest: str, staged: Path) -> None:
    """The files of a revision, into an empty folder.

    Raises:
        Incomplete: they are not all there yet, or did not all arrive.
        InvalidFile: they are not what the digest says, or no revision's.
    """
    place = f"revisions/{digest}"
    shown = f"{objects.address}/{place}"
    manifest = objects.read(f"{place}/{MANIFEST}")
    if manifest is None:
        raise Incomplete(f"'{shown}' is not whole yet: it has no {MANIFEST}")
    try:
        said = json.loads(manifest.body)
        sizes = {str(name): int(size) for name, size in said["files"].items()}
        provenance = said["provenance"]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidFile(f"'{shown}/{MANIFEST}' can't be read: {error}") from None
    odd = [name for name in sizes if not _NAME.fullmatch(name) or name in (MANIFEST, PROVENANCE)]
    if odd or not 0 < len(sizes) <= MOST_FILES:
        raise InvalidFile(f"'{shown}/{MANIFEST}' names {len(sizes)} files{f', one of them {odd[0]!a}' if odd else ''}")
    for name, size in sizes.items():
        if not objects.fetch(f"{place}/{name}", staged / name):
            raise Incomplete(f"'{shown}' is not whole yet: it has no {name}")
        if (arrived := (staged / name).stat().st_size) < size:
            raise Incomplete(f"'{shown}': of the {size} bytes of {name}, {arrived} arrived")
    if (found := folder_digest(staged, sizes)) != digest:
        raise InvalidFile(
            f"'{shown}' holds files whose digest is {found[:8]}…, not what it is called by: they were damaged or "
            f"replaced, and are not served: remove what is below it, and take the checkpoint in again"
        )
    if isinstance(provenance, str):
        (staged / PROVENANCE).write_text(provenance, encoding="utf-8", errors="replace")
