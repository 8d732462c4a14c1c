"""Where a folder came from: what its `lorakit.json` says, those of its parents, and so on, as a tree.

What such a file says is believed of the past alone: the folders that it names are looked at, and no more.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from lorakit.adapters.reading import WEIGHTS
from lorakit.errors import InvalidFile, LorakitError, NotFound
from lorakit.files.digests import file_digest
from lorakit.files.folders import read_json
from lorakit.files.provenance import FILE
from lorakit.merge.base import read_base

DEPTH = 32  # generations
MOST = 1000  # parents of one folder
LARGEST = 64 << 20  # bytes of a lorakit.json
_COMMON = frozenset({"lorakit", "operation", "parents", "settings"})

State = Literal["there", "unknown", "changed", "gone", "unsaved", "above", "deeper"]


@dataclass(frozen=True, slots=True)
class Lineage:
    """One folder, or one step that was never saved, and what it was made of.

    `weight`, `role` and `parts` are what its child says of it: with which weight it went in, as what ("base",
    "adapter"), and where not all of its modules did. `measured` is what its own `lorakit.json` says beside the usual.
    `state` is what became of it since:

    there    it is what it was, as its digest says (or it is the folder that was asked for)
    unknown  it is there, and its child recorded no digest to compare it with
    changed  it was written again
    gone     there is no such folder
    unsaved  it never was one: a step on the way
    above    it is there, and is told of nearer to the root
    deeper   it is there, and has parents, but more than `DEPTH` generations back
    """

    path: str | None
    state: State
    operation: str | None = None
    version: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[Lineage, ...] = ()
    weight: float | None = None
    role: str | None = None
    parts: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """‖Δ - Δ'‖ / ‖Δ‖ of what was to be written and what was, where it was measured."""
        return _number(self.measured.get("truncation_error"))

    @property
    def survival(self) -> float | None:
        """How much of its change the rounding of a merge left, where it was measured."""
        report = self.measured.get("report")
        return _number(report.get("survival")) if isinstance(report, dict) else None

    @property
    def rank(self) -> int | None:
        rank = self.measured.get("rank")
        return rank if isinstance(rank, int) and not isinstance(rank, bool) else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "state": self.state,
            "weight": self.weight,
            "role": self.role,
            "parts": list(self.parts),
            "operation": self.operation,
            "version": self.version,
            "settings": dict(self.settings),
            "rank": self.rank,
            "error": self.error,
            "survival": self.survival,
            "parents": [parent.as_dict() for parent in self.parents],
        }


def lineage_of(folder: str | os.PathLike[str]) -> Lineage:
    """The tree of what `folder` was made of; of one that lorakit didn't write, the folder alone.

    Raises:
        NotFound: there is no such folder.
        InvalidFile: its `lorakit.json`, or that of a folder it came from, can't be understood.
    """
    root = Path(folder)
    if not root.is_dir():
        raise NotFound(f"there is no folder '{root}'")
    return _of_folder(str(root.absolute()), "there", set(), 0)


def _of_folder(path: str, state: State, told: set[Path], depth: int) -> Lineage:
    """`told` are the folders that stand in the tree already: each is gone into once, so that no tree is endless."""
    folder = Path(path).resolve()
    try:
        record = _read_record(folder)
    except InvalidFile:
        if not depth:
            raise
        return Lineage(path, "changed")
    if record is None:
        return Lineage(path, state)
    if folder in told:
        return Lineage(path, "above" if state in ("there", "unknown") else state, operation=record["operation"])
    if depth == DEPTH:
        return Lineage(path, "deeper" if state in ("there", "unknown") else state, operation=record["operation"])
    told.add(folder)
    return replace(_of_record(record, folder / FILE, told, depth), path=path, state=state)


def _of_record(record: Mapping[str, Any], file: Path, told: set[Path], depth: int) -> Lineage:
    return Lineage(
        None,
        "unsaved",
        operation=record["operation"],
        version=record.get("lorakit"),
        settings=record.get("settings", {}),
        measured={key: value for key, value in record.items() if key not in _COMMON},
        parents=tuple(_parent(parent, file, told, depth + 1) for parent in record.get("parents", [])),
    )


def _parent(said: Any, file: Path, told: set[Path], depth: int) -> Lineage:
    if not isinstance(said, dict) or not isinstance(said.get("path", ""), str):
        raise InvalidFile(f"'{file}' names a parent without a path: {_shortened(said)}")
    if "path" in said:
        state = _state(said)
        path: str = said["path"]
        found = Lineage(path, state) if state == "gone" else _of_folder(path, state, told, depth)
    elif depth > DEPTH:
        raise InvalidFile(f"'{file}' nests its parents more than {DEPTH} deep")
    else:
        found = _of_record(_checked(said, file), file, told, depth)
    parts = said.get("parts", [])
    return replace(
        found,
        weight=_number(said.get("weight")),
        role=said["kind"] if isinstance(said.get("kind"), str) else None,
        parts=tuple(str(part) for part in parts) if isinstance(parts, list) else (),
    )


def _state(said: Mapping[str, Any]) -> State:
    """What became of a parent, by what its child says of it: an adapter's digest, a base's identity."""
    folder = Path(said["path"])
    if not os.path.isdir(said["path"]):
        return "gone"
    try:
        if isinstance(said.get("sha256"), str):
            file = folder / WEIGHTS
            return "there" if os.path.isfile(file) and file_digest(file) == said["sha256"] else "changed"
        if isinstance(said.get("identity"), str):
            return "there" if read_base(folder).identity == said["identity"] else "changed"
    except (OSError, LorakitError):  # what was whole once can't be read any more
        return "changed"
    return "unknown"


def _read_record(folder: Path) -> Mapping[str, Any] | None:
    """What a folder's `lorakit.json` says; None where there is none."""
    file = folder / FILE
    if not os.path.isfile(file):
        return None
    if file.stat().st_size > LARGEST:
        raise InvalidFile(f"'{file}' is larger than {LARGEST >> 20} MiB: lorakit did not write it")
    record = read_json(file)
    try:
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise InvalidFile(f"'{file}' holds NaN, infinity, or text that is no Unicode") from None
    return _checked(record, file)


def _checked(record: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """Raises InvalidFile when what every lorakit.json says is missing, or of another type."""
    for key, kind, needed in (
        ("operation", str, True), ("lorakit", str, False), ("parents", list, False), ("settings", dict, False),
    ):  # fmt: skip
        if (key in record or needed) and not isinstance(record.get(key), kind):
            raise InvalidFile(f"'{file}': {key} is {_shortened(record.get(key))}: lorakit did not write it")
    if len(record.get("parents", [])) > MOST:
        raise InvalidFile(f"'{file}' names {len(record['parents'])} parents: lorakit did not write it")
    return record


def _number(value: Any) -> float | None:
    """A finite number; None of all else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:  # a whole number too large for a float
        return None


def _shortened(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:80]}…"
