"""What is known of the one checkpoint at a path."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lorakit.checkpoints.finished import CHECKPOINT
from lorakit.checkpoints.metadata import Metadata, checkpoints_in, metadata_of
from lorakit.checkpoints.recognise import recognise
from lorakit.checkpoints.runs import Candidate


def described(path: Path, named: str | None = None, *, with_digest: bool = False) -> Metadata:
    """`named` is the name that the folder had elsewhere, which tells the step where nothing in it does."""
    name = os.path.basename(os.path.abspath(path))
    found = checkpoints_in(path) if path.is_dir() else []
    known = metadata_of(found[0] if len(found) == 1 else Candidate(path, name, "plain"), with_digest=with_digest)
    step = CHECKPOINT.fullmatch(named or "") if known.step is None else None
    return replace(known, step=int(step[1])) if step else known


def writer_of(folder: Path) -> str | None:
    """Whose files are in a folder: of the folder, or of the one file in it."""
    inside = list(folder.iterdir())
    recognised = recognise(folder) or (recognise(inside[0]) if len(inside) == 1 else None)
    return None if recognised is None else recognised.writer
