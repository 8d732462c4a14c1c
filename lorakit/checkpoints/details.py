"""What more there is to say of one checkpoint than a row of a listing has room for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.keys import parse_key
from lorakit.checkpoints.finished import examine
from lorakit.checkpoints.places import LocalPlace, entry_of
from lorakit.checkpoints.whole import header_in, read_object
from lorakit.checkpoints.writers import dcp
from lorakit.checkpoints.writers.layout import CHECKPOINT, Layout, Part, WriterName, all_inside, plain_files
from lorakit.checkpoints.writers.torch_keys import is_tensor, keys_in, model_in
from lorakit.errors import InvalidFile

_PEFT = re.compile(rb"PEFT (\d+\.\d+[\w.+-]*)")


@dataclass(frozen=True, slots=True)
class Details:
    """`dtypes` as safetensors names them; `tensors` and `modules` are numbers, None where the weights can't be read;
    `modules` of an adapter are those that it changes. `files` has the bytes of every file, by its name in the place."""

    holds: tuple[Part, ...] = ()
    writer: WriterName | None = None
    transformers_version: str | None = None
    peft_version: str | None = None
    dtypes: tuple[str, ...] = ()
    modules: int | None = None
    tensors: int | None = None
    files: tuple[tuple[str, int], ...] = ()


def details_of(path: Path) -> Details:
    """What one look shows of a folder or file; what is not there, or can't be read, is left empty."""
    _, layout = examine(path)
    place = LocalPlace(path)
    try:
        files = _files(place)
        stored = _tensors(place, layout) if layout else {}
    except OSError:
        return Details(holds=layout.holds if layout else (), writer=layout.writer if layout else None)
    return Details(
        holds=layout.holds if layout else (),
        writer=layout.writer if layout else None,
        transformers_version=_said(place, "config.json", "transformers_version"),
        peft_version=_said(place, "adapter_config.json", "peft_version") or _by_card(place),
        dtypes=tuple(sorted({dtype for dtype in stored.values() if dtype})),
        modules=_modules(stored) if layout and layout.kind == "adapter" and stored else None,
        tensors=len(stored) or None,
        files=files,
    )


def _files(place: LocalPlace) -> tuple[tuple[str, int], ...]:
    entries = place.entries
    names = [*plain_files(place)]
    inner = sorted(entries.keys() - set(names))
    for name in inner:
        if not CHECKPOINT.fullmatch(name):  # in a run's own root: checkpoints of their own
            names += all_inside(place, name)
    found = ((name, entry_of(place, name)) for name in sorted(names))
    return tuple((name, entry.size) for name, entry in found if entry is not None)


def _tensors(place: LocalPlace, layout: Layout) -> dict[str, str]:
    """The dtype of each tensor of the weights, by its name; of torch.distributed.checkpoint the names alone."""
    found: dict[str, str] = {}
    for name in layout.weights:
        if name.endswith(".safetensors"):
            try:
                found |= {key: tensor.dtype for key, tensor in header_in(place, name).tensors.items()}
            except InvalidFile:
                continue
        else:
            said = model_in(keys_in(place, name)) or {}
            found |= {str(key): value.dtype for key, value in said.items() if is_tensor(value)}
    if not found and layout.writer == "dcp":
        said_there = dcp.said_in(place)
        found = dict.fromkeys((key for key in (said_there.keys if said_there else ()) if "." in key), "")
    return found


def _modules(stored: Mapping[str, str]) -> int:
    return len({parse_key(name).module for name in stored if "lora_" in name})


def _said(place: LocalPlace, file: str, field: str) -> str | None:
    try:
        value = read_object(place, file).get(field)
    except (OSError, InvalidFile):
        return None
    return value if isinstance(value, str) and value else None


def _by_card(place: LocalPlace) -> str | None:
    """PEFT writes its version into the model card."""
    try:
        match = _PEFT.search(place.read("README.md", 0, 1 << 20))
    except OSError:
        return None
    return match[1].decode() if match else None
