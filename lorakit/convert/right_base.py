"""Is this the base that the adapter was trained on? By name, by what lorakit noted, and by the values of both."""

from __future__ import annotations

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


def right_base(adapter: Adapter, base: BaseModel) -> Check:
    """Not so only where that is certain: a name may be that of a copy, or of the same model in another dtype."""
    noted = _noted(adapter)
    if noted is not None and base.remote is None:
        if noted == base.identity:
            return Check("base", True, f"{base.reference}, which it was made for ({noted})")
        if noted.rpartition("-")[0] != base.model_type:
            reason = f"it was made for a base of another kind ({noted}), and '{base.reference}' is {base.identity}"
            return Check("base", False, reason, OTHER_BASE)
        reason = f"it was made for {noted}, and '{base.reference}' is {base.identity}: another dtype, or another model"
        return Check("base", None, reason, "compare the two (lorakit diff), or ask both (lorakit check --probe)")
    named = adapter.base
    if named is None or Path(named).name == Path(base.reference).name:
        return Check("base", True, base.reference)
    if _differs(named, base):
        reason = f"its config names '{named}', whose weights are not those of '{base.reference}'"
        return Check("base", False, reason, OTHER_BASE)
    return Check("base", True, f"{base.reference}; its config names '{named}'")


def _noted(adapter: Adapter) -> str | None:
    """The identity of the base in the lorakit.json beside it."""
    for source in adapter.files():
        try:
            record: dict[str, Any] = read_json(source.folder / FILE)
            parents = record.get("parents")
        except (LorakitError, OSError):
            continue
        for parent in parents if isinstance(parents, list) else []:
            identity = parent.get("identity") if isinstance(parent, dict) and parent.get("kind") == "base" else None
            if isinstance(identity, str):
                return identity
    return None


def _differs(named: str, base: BaseModel) -> bool:
    """Whether the model that is meant is here too, and holds other values, by a few of its tensors."""
    if not Path(named).is_dir() or base.remote is not None:
        return False
    try:
        other = read_base(named)
    except LorakitError:
        return False
    shared = (
        (stored, other.tensors[name])
        for name, stored in base.tensors.items()
        if name in other.tensors and stored.dtype in FLOATS and len(stored.shape) == 2 and stored.nbytes <= LARGEST
    )
    pairs = [(mine, theirs) for mine, theirs in shared if theirs.dtype in FLOATS and theirs.shape == mine.shape]
    return any(
        not (equal_values(mine, theirs) or equal_values(theirs, mine))
        for mine, theirs in islice(pairs, 0, None, max(1, len(pairs) // COMPARED))
    )
