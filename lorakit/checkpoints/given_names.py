"""What people called checkpoints: links in a run, as `lorakit save RUN --name before-lr-drop` makes them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from lorakit.checkpoints.metadata import Metadata


def with_given_names(rows: Iterable[Metadata]) -> list[Metadata]:
    """The rows, each with the links beside it that lead to it among its aliases."""
    by_run: dict[str, dict[str, tuple[str, ...]]] = {}
    found = []
    for row in rows:
        run, name = os.path.split(row.path)
        if row.step is not None and run not in by_run:
            by_run[run] = _given_in(run)
        names = by_run.get(run, {}).get(name, ())
        found.append(replace(row, aliases=(*row.aliases, *names)) if names else row)
    return found


def _given_in(run: str) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    try:
        with os.scandir(run) as entries:
            links = sorted((entry.name, os.readlink(entry.path)) for entry in entries if entry.is_symlink())
    except OSError:
        return {}
    for name, target in links:
        found[target] = (*found.get(target, ()), name)
    return found
