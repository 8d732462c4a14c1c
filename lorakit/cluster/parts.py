"""Files that tasks write: each beside its place, under a name that no other attempt at the same task has."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

PART = ".part"


def new_part(folder: Path | None, name: str) -> Path:
    """Where to write a file; what workers that died have left of the same one is removed."""
    assert folder is not None
    for left in os.listdir(folder):
        if left.startswith(f"{name}.") and left.endswith(PART):
            (folder / left).unlink(missing_ok=True)
    return folder / f"{name}.{uuid.uuid4().hex[:12]}{PART}"


def drop_parts(folder: Path) -> None:
    """Once all is done: what workers that died have left."""
    for part in folder.glob(f"*{PART}"):
        part.unlink(missing_ok=True)
