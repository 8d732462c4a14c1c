"""Where in a watched folder there are runs and adapters, and what they are called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lorakit.checkpoints.finished import CHECKPOINT, is_adapter
from lorakit.store.catalog import Label


@dataclass(frozen=True, slots=True)
class Candidate:
    """A folder that may hold an adapter: the run it belongs to, and what it is in that run."""

    folder: Path
    run: str
    kind: Label
    step: int | None = None

    @property
    def place(self) -> tuple[str, Path]:
        """What tells it from all others: one folder may be in two runs."""
        return self.run, self.folder


def find_candidates(root: Path) -> list[Candidate]:
    """Every candidate under a watched folder, each run's in the order of steps, its root last.

    A folder that holds `checkpoint-*` is a run of its name; one that is itself an adapter is an adapter of its name;
    a watched folder that holds `checkpoint-*` itself is the run.

    Raises:
        OSError: the watched folder is not there.
    """
    own = _of_run(root, os.path.basename(os.path.abspath(root)))
    if own:
        return own
    found: list[Candidate] = []
    for folder in _folders(root):
        try:
            found += _of_run(folder, folder.name)
        except OSError:  # it went away, or belongs to someone else
            continue
    return found


def candidates_of(folder: Path, name: str) -> list[Candidate]:
    """A folder that a person named: a run, an adapter, or one checkpoint of a run.

    Raises:
        OSError: it is not there.
    """
    own = CHECKPOINT.fullmatch(folder.name)
    if own:
        return [Candidate(folder, name, "step", int(own[1]))]
    return _of_run(folder, name) or [Candidate(folder, name, "plain")]


def _of_run(folder: Path, name: str) -> list[Candidate]:
    steps = sorted((int(match[1]), child) for child in _folders(folder) if (match := CHECKPOINT.fullmatch(child.name)))
    found = [Candidate(child, name, "step", step) for step, child in steps]
    if is_adapter(folder):
        found.append(Candidate(folder, name, "final" if steps else "plain"))
    return found


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if not entry.name.startswith((".", "tmp-checkpoint-")) and entry.is_dir()
        )
