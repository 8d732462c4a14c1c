"""What a path is: whose checkpoint, an adapter's or a whole model's, and which parts of a training's state it holds.

By the names of the files, and for torch files by the names in them; no pickle is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorakit.checkpoints.places import LocalPlace
from lorakit.checkpoints.writers import written_by
from lorakit.checkpoints.writers.layout import Kind, Part, WriterName


@dataclass(frozen=True, slots=True)
class Recognised:
    """`holds` in the order of a `Part`; `files` relative to the path, of a single file its name."""

    path: Path
    writer: WriterName
    kind: Kind | None
    holds: tuple[Part, ...]
    files: tuple[str, ...]


def recognise(path: Path) -> Recognised | None:
    """What a folder or file is, finished or not; None when it is nothing that is known, is not there, or can't be
    read."""
    place = LocalPlace(path)
    try:
        found = written_by(place)
    except OSError:
        return None
    if found is None:
        return None
    _, layout = found
    return Recognised(path, layout.writer, layout.kind, layout.holds, tuple(sorted(layout.files)))
