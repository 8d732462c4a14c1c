"""SHA-256 of files and folders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def file_digest(file: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_digest(folder: Path, names: Iterable[str]) -> str:
    """One digest for some files of a folder: the SHA-256 of what `sha256sum` prints for them, names sorted."""
    lines = "".join(f"{file_digest(folder / name)}  {name}\n" for name in sorted(names))
    return hashlib.sha256(lines.encode()).hexdigest()
