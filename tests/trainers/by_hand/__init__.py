"""Trainers whose requirements contradict the others': each ran once, in an environment of its own, and what it wrote is
kept here: NAME.tar.gz, the run's folder; NAME.json, the order in which it came about (see record.py); and of those that
can be made to say it, NAME.said.jsonl, what was measured. NAME_whole.tar.gz: models in trainers' own names, see
whole.py.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def kept(name: str, folder: Path) -> Path:
    """The run as it was left, in a new folder."""
    with tarfile.open(HERE / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def said(name: str) -> list[dict[str, Any]]:
    """What the run's program printed: see tiny.py."""
    return [json.loads(line) for line in (HERE / f"{name}.said.jsonl").read_text().splitlines()]
