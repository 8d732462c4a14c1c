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


def sampled_digest(file: Path, samples: int = 64, size: int = 4096) -> str:
    """A SHA-256 over a file's size and evenly spaced samples of it: quick for files too large to read whole."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        length = stream.seek(0, 2)
        digest.update(str(length).encode())
        for number in range(samples):
            stream.seek(max(0, length - size) * number // (samples - 1))
            digest.update(stream.read(size))
    return digest.hexdigest()
