"""What was read of finished checkpoints, remembered until their files change: to list thousands again costs one look at
each folder. Small listings are neither remembered nor looked up.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit.checkpoints.metadata import (
    Metadata,
    Stored,
    as_stored,
    is_stored,
    look_into,
    metadata_of,
    with_content_digest,
)
from lorakit.checkpoints.runs import Candidate

MANY = 200  # checkpoints
_VERSION = [2, *Metadata.__slots__]


def metadata_of_all(
    candidates: Sequence[Candidate], stored: Mapping[str, Stored], home: Path, *, with_digest: bool = False
) -> list[Metadata]:
    """As `metadata_of` each; of many, what is remembered lies in `home`/listings."""
    if len(candidates) < MANY:
        return [metadata_of(candidate, stored, with_digest=with_digest) for candidate in candidates]
    file = _file(candidates, home)
    before = _read(file)
    after: dict[str, Any] = {}
    rows = []
    for candidate in candidates:
        path = os.path.abspath(candidate.folder)
        files = _state_of_files(path)  # before they are read: a change meanwhile is seen next time
        known = before.get(path)
        if known is None or files is None or known["files"] != files:
            known = None
            row, signature = look_into(candidate)
        else:
            row, signature = Metadata(**{**known["row"], "aliases": ()}), known["signature"]
        if with_digest and row.digest is None and not is_stored(row, signature, stored):
            known, row = None, with_content_digest(row)
        rows.append(as_stored(row, signature, stored))
        if files is not None and row.state == "finished":
            after[path] = known or {"files": files, "signature": signature, "row": asdict(row)}
    if after != before:
        _write(file, after)
    return rows


def _state_of_files(folder: str) -> str | None:
    """Sizes, times and inodes of all files; None where there are folders in it, whose files are not seen here."""
    parts = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    return None
                parts.append(_state(entry.name, entry.stat()))
    except NotADirectoryError:  # a file that is a checkpoint of its own
        return _state("", os.stat(folder))
    except OSError:
        return None
    return ";".join(sorted(parts))


def _state(name: str, status: os.stat_result) -> str:
    return f"{name}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}:{status.st_ino}"


def _file(candidates: Sequence[Candidate], home: Path) -> Path:
    """One for each set of folders that are listed together."""
    parents = sorted({os.path.abspath(candidate.folder.parent) for candidate in candidates})
    return home / "listings" / f"{hashlib.sha256(os.fsencode(chr(10).join(parents))).hexdigest()[:32]}.json"


def _read(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(said, dict) or said.get("version") != _VERSION:
        return {}
    rows: dict[str, Any] = said["rows"]
    return rows


def _write(file: Path, rows: Mapping[str, Any]) -> None:
    """Whole or not at all; where it can't be written, the next listing reads again."""
    beside = file.with_name(f".{uuid.uuid4().hex}.tmp")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(json.dumps({"version": _VERSION, "rows": rows}), encoding="ascii")
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
