"""A checkpoint that comes out of the store, or was exported: it is done, and its content is known."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from lorakit.checkpoints.moving.manifest import FILE as MANIFEST
from lorakit.checkpoints.moving.manifest import manifest
from lorakit.errors import InvalidFile
from lorakit.files.digests import file_digest
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.store.store import default_home


def is_done(source: Path) -> bool:
    """Whether nobody writes to it any more, whatever its writer's files say."""
    return _content(source) is not None or (source / MANIFEST).is_file()


def ensure_intact(source: Path, digests: Mapping[str, str]) -> None:
    """Hold the digests of a copy against the digest that the store has of its source, if that is in the store.

    Raises:
        InvalidFile: it was damaged there.
    """
    content = _content(source)
    if content is None or (source != content and [*content.iterdir()] != [source]):
        return
    own = content / MANIFEST
    every = {**digests, **({MANIFEST: file_digest(own)} if own.is_file() else {})}
    served = {name: digest for name, digest in every.items() if name != PROVENANCE}  # as `lorakit store verify`
    if content.name not in (content_digest(every), content_digest(served)):
        raise InvalidFile(f"'{source}' was damaged in the store: lorakit store verify says what of it, and what to do")


def content_digest(digests: Mapping[str, str]) -> str:
    """Of names and bytes, as the store has it: the SHA-256 of what `sha256sum` prints."""
    return hashlib.sha256(manifest(digests).encode()).hexdigest()


def _content(source: Path) -> Path | None:
    revisions = default_home() / "revisions"
    if not source.is_relative_to(revisions) or source == revisions:
        return None
    return revisions / source.relative_to(revisions).parts[0]
