"""A folder of torch.distributed.checkpoint: each rank's `__K_0.distcp`, and `.metadata`, renamed there last.

Lightning's sharded `.ckpt` is one, with a `meta.pt` that is written after that.

Its `.metadata` is a plain pickle, which is read without being run; it names the files, and how far each is used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorakit.checkpoints.places import Place
from lorakit.checkpoints.writers.layout import Kind, LastWord, Layout, parts, plain_files
from lorakit.errors import InvalidFile, Refused

LAST = ".metadata"
_LIGHTNINGS = "meta.pt"
_DATA = ".distcp"


@dataclass(frozen=True, slots=True)
class Said:
    """What `.metadata` says: the keys of what was saved, and the least bytes that each file has."""

    keys: tuple[str, ...]
    sizes: Mapping[str, int]


def layout(place: Place) -> Layout | None:
    files = plain_files(place)
    data = tuple(sorted(name for name in files if name.endswith(_DATA)))
    if not data and LAST not in files:
        return None
    said = said_in(place)
    missing = (LAST,) if LAST not in files else tuple(name for name in said.sizes if name not in files) if said else ()
    keys = said.keys if said else ()
    kind = kind_of(place)
    roots = {key.split(".")[0].lower() for key in keys}
    return Layout(
        "dcp",
        kind,
        parts(
            model=kind,
            optimizer=any(root.startswith(("optim", "opt")) for root in roots),
            scheduler=any("scheduler" in root for root in roots),
            scaler=any("scaler" in root for root in roots),
            rng=any("rng" in root for root in roots),
            trainer_state=roots & {"train_state", "trainer_state", "step", "epoch", "trainer"},
        ),
        covered=(*data, *([LAST, _LIGHTNINGS] if _LIGHTNINGS in files else [])),
        weights=data,
        missing=missing,
    )


def last_word(place: Place, layout: Layout) -> LastWord | None:
    last = place.entries.get(LAST)
    if last is None:
        return None
    said = said_in(place)
    if said is None:
        return LastWord(LAST, last.written, f"{LAST} is only partly there", partly=True)
    files = place.entries
    for name, size in said.sizes.items():
        if name in files and files[name].size < size:
            return LastWord(LAST, last.written, f"{name} is cut short: {files[name].size} of {size} bytes", partly=True)
    if not place.name.endswith(".ckpt"):
        return LastWord(LAST, last.written)
    entry = files.get(_LIGHTNINGS)
    if entry is None:
        return LastWord(_LIGHTNINGS, against=f"{_LIGHTNINGS}, which Lightning writes last, is not there")
    return LastWord(_LIGHTNINGS, entry.written)


def kind_of(place: Place) -> Kind | None:
    """Of the model in it; a regular one while nothing says that it is an adapter."""
    said = said_in(place)
    if said is None:
        return "regular" if place.entries else None
    keys = [key for key in said.keys if not key.lower().startswith(("optim", "opt."))]
    tensors = [key for key in keys if "." in key]
    return "adapter" if tensors and all("lora_" in key for key in tensors) else "regular"


def said_in(place: Place) -> Said | None:
    """What `.metadata` says; None where it is not there, or can't be read (yet). Raises OSError."""
    return _said(place.read(LAST)) if LAST in place.entries else None


@lru_cache(maxsize=1)  # one look at a checkpoint asks several times, and of a large model it takes a second
def _said(raw: bytes) -> Said | None:
    from lorakit.files.pickle_values import Stub
    from lorakit.files.pickles import read_pickle

    try:
        found = read_pickle(io.BytesIO(raw), len(raw), LAST)
    except (InvalidFile, Refused):
        return None
    fields = found.fields if isinstance(found, Stub) else {}
    keys, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(keys, dict):
        return None
    return Said(tuple(str(key) for key in keys), _sizes(storage))


def _sizes(storage: Any) -> dict[str, int]:
    from lorakit.files.pickle_values import Stub

    sizes: dict[str, int] = {}
    for info in storage.values() if isinstance(storage, dict) else ():
        fields = info.fields if isinstance(info, Stub) else {}
        name, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
        if isinstance(name, str) and "/" not in name:
            end = offset + length if isinstance(offset, int) and isinstance(length, int) else 0
            sizes[name] = max(sizes.get(name, 0), end)
    return sizes
