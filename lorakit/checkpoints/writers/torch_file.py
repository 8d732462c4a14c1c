"""Files of torch.save: one alone, which is whole when its end is there, or a folder of them; and one safetensors file.

Lightning's `.ckpt` is such a file with names of its own in it; it appears whole, but a copy of it does not.
"""

from __future__ import annotations

from lorakit.checkpoints.places import Place
from lorakit.checkpoints.whole import TORCH, header_in
from lorakit.checkpoints.writers.layout import ADAPTER, Kind, LastWord, Layout, parts, plain_files
from lorakit.checkpoints.writers.torch_keys import keys_in, kind_of_model, model_in, parts_in
from lorakit.errors import InvalidFile

LIGHTNING = "pytorch-lightning_version"
_ZIP = b"PK\x03\x04"


def layout(place: Place) -> Layout | None:
    files = plain_files(place)
    torch = tuple(sorted(name for name in files if name.endswith(TORCH)))
    tensors = tuple(sorted(name for name in files if name.endswith(".safetensors")))
    if place.is_file:
        return _of_torch_files(place, torch) if torch else _of_tensors(place, tensors)
    return _of_torch_files(place, torch) if torch else None


def _of_torch_files(place: Place, names: tuple[str, ...]) -> Layout:
    said = {name: keys_in(place, name) for name in names}
    holds = {part for keys in said.values() for part in parts_in(keys)}
    for name in names:  # a file of one state alone is named for it
        holds |= {part for part in ("optimizer", "scheduler", "scaler") if name.lower().startswith(part)}
    kinds = {kind_of_model(model_in(keys)) for name, keys in said.items() if not name.lower().startswith("optim")}
    kind: Kind | None = "regular" if "regular" in kinds else "adapter" if "adapter" in kinds else None
    lightning = place.is_file and any(LIGHTNING in keys for keys in said.values())
    return Layout(
        "lightning" if lightning else "torch", kind, parts(**dict.fromkeys(holds, True)), covered=names, weights=names
    )


def _of_tensors(place: Place, names: tuple[str, ...]) -> Layout | None:
    if not names:
        return None
    try:
        keys = header_in(place, names[0]).tensors
    except InvalidFile:
        keys = {}
    adapter = names[0] == ADAPTER or (bool(keys) and all("lora_" in key for key in keys))
    return Layout(
        "peft" if adapter else "huggingface", "adapter" if adapter else "regular", parts(model=True), names, names
    )


def last_word(place: Place, layout: Layout) -> LastWord | None:
    """The end of a single file is the last that is written of it; a folder may get more files."""
    (name, *others) = layout.covered
    if others or not place.is_file or not name.endswith(TORCH) or place.read(name, 0, 4) != _ZIP:
        return None
    return LastWord(name, place.entries[name].written)
