"""Checkpoints as archives, made by Python's own libraries."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path


def tarred(folder: Path, top: str = "", mode: str = "w:gz") -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=mode) as archive:  # type: ignore[call-overload]
        for file in sorted(folder.rglob("*")):
            archive.add(file, f"{top}/{file.relative_to(folder)}" if top else file.relative_to(folder), recursive=False)
    return written.getvalue()


def zstandarded(folder: Path, top: str = "") -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(tarred(folder, top, "w"))


def zipped(folder: Path, top: str = "") -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{top}/{file.relative_to(folder)}" if top else file.relative_to(folder))
    return written.getvalue()


def files_below(folder: Path) -> dict[str, bytes]:
    """Of a checkpoint, without what lorakit adds."""
    added = ("lorakit.json", "lorakit.sha256")
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in added
    }
