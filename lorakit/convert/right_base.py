"""Is this the base that the adapter was trained on? By name, by what lorakit noted, and by the values of both."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.convert.answers import OTHER_BASE, Check
from lorakit.errors import LorakitError
from lorakit.files.folders import read_json
from lorakit.files.provenance import FILE
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import BaseModel, read_base
from lorakit.merge.copies import equal_values

COMPARED = 4  # tensors
LARGEST = 1 << 26  # bytes of each of them
UNSURE = (
    "compare the two (lorakit diff), or ask both (lorakit check --probe); where they are one, "
    "`lorakit convert ADAPTER --base BASE --out DIR` notes this one"
)


def right_base(adapter: Adapter, base: BaseModel) -> Check:
    """Not so only where that is certain: a name may be that of a copy, or of the same model in another dtype."""
    noted = _noted(adapter)
    if noted and base.remote is None:
        return _by_note(noted, base)
    named = adapter.base
    if named is None or _is_same_folder(named, base):
        return Check("base", True, base.reference)
    if _has_same_values(named, base) is False:
        reason = f"its config names '{named}', whose weights are not those of '{base.reference}'"
        return Check("base", False, reason, OTHER_BASE)
    said = "" if Path(named).name == Path(base.reference).name else f"; its config names '{named}'"
    return Check("base", True, f"{base.reference}{said}")


def _by_note(noted: Mapping[str, str], base: BaseModel) -> Check:
    identity, path = noted["identity"], noted.get("path", "")
    if identity == base.identity or noted.get("weights") == base.weights_digest:
        return Check("base", True, f"{base.reference}, which it was made for ({identity})")
    if identity.rpartition("-")[0] != base.model_type:
        reason = f"it was made for a base of another kind ({identity}), and '{base.reference}' is {base.identity}"
        return Check("base", False, reason, OTHER_BASE)
    alike = None if _is_same_folder(path, base) else _has_same_values(path, base)
    if alike:
        return Check("base", True, f"{base.reference}, with the values of '{path}', which it was made for")
    if alike is False:
        reason = f"it was made for '{path}', whose weights are not those of '{base.reference}'"
        return Check("base", False, reason, OTHER_BASE)
    reason = f"it was made for {identity}, and '{base.reference}' is {base.identity}: another dtype, or another model"
    return Check("base", None, reason, UNSURE)


def _is_same_folder(named: str, base: BaseModel) -> bool:
    """Not of names on the hub, which say no more than that they are names."""
    return named == base.reference or (Path(named).is_dir() and Path(named).resolve() == base.folder.resolve())


def _noted(adapter: Adapter) -> Mapping[str, str]:
    """What the lorakit.json beside it says of the base, its identity above all; empty where it says none."""
    for source in adapter.files():
        try:
            record: dict[str, Any] = read_json(source.folder / FILE)
            parents = record.get("parents")
        except (LorakitError, OSError):
            continue
        for parent in parents if isinstance(parents, list) else []:
            if isinstance(parent, dict) and parent.get("kind") == "base" and isinstance(parent.get("identity"), str):
                return {name: value for name, value in parent.items() if isinstance(value, str)}
    return {}


def _has_same_values(named: str, base: BaseModel) -> bool | None:
    """Whether the model that is meant holds the same values, by a few of its tensors; None where it is not here."""
    if not named or not Path(named).is_dir() or base.remote is not None:
        return None
    try:
        other = read_base(named)
    except LorakitError:
        return None
    shared = (
        (stored, other.tensors[name])
        for name, stored in base.tensors.items()
        if name in other.tensors and stored.dtype in FLOATS and len(stored.shape) == 2 and stored.nbytes <= LARGEST
    )
    pairs = [(mine, theirs) for mine, theirs in shared if theirs.dtype in FLOATS and theirs.shape == mine.shape]
    if not pairs:
        return None
    return all(
        equal_values(mine, theirs) or equal_values(theirs, mine)
        for mine, theirs in islice(pairs, 0, None, max(1, len(pairs) // COMPARED))
    )
