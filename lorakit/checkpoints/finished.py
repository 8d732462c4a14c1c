"""Is a folder a checkpoint, of which kind, and is it finished?

Finished at one look: the file that its writer writes last is there, parses, and is no older than what it covers.
Else a folder that is whole in itself has to stay as it is for a while (`QUIET` seconds) before it counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.adapters.config import read_config
from lorakit.adapters.reading import UNFINISHED, WEIGHTS
from lorakit.checkpoints.trainer_state import FILE as TRAINER_STATE
from lorakit.errors import InvalidFile, NotFound
from lorakit.files.folders import read_json
from lorakit.files.safetensors import read_header

QUIET = 2.0  # seconds

State = Literal["finished", "whole", "incomplete", "refused"]
CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
MARKERS = (TRAINER_STATE, "STABLE", ".done", "commit_success.txt")
PICKLED = ("adapter_model.bin", "adapter_model.pt")
_REGULAR = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin", ".metadata", "latest", "lit_model.pth",
)  # fmt: skip
_COMPANIONS = re.compile(r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.jinja)")


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a folder showed. `signature` changes whenever a file that counts is written again."""

    folder: Path
    state: State
    reason: str
    signature: str = ""
    weights_signature: str = ""


def look_at(folder: Path) -> Look:
    """Judge one folder by what is there now. Never waits; a folder that goes away meanwhile is incomplete."""
    try:
        return _look_at(folder)
    except (OSError, NotFound) as error:
        return Look(folder, "incomplete", f"a file went away or can't be read yet: {error}")


def _look_at(folder: Path) -> Look:
    files = {path.name: path for path in folder.iterdir()}
    if UNFINISHED in files:
        return Look(folder, "incomplete", f"the trainer is still writing it: {UNFINISHED} is there")
    if "adapter_config.json" not in files and WEIGHTS not in files:
        return _no_adapter(folder, files)
    missing = next((name for name in (WEIGHTS, "adapter_config.json") if name not in files), None)
    if missing == WEIGHTS and (pickle := next((name for name in PICKLED if name in files), None)):
        return Look(
            folder,
            "refused",
            f"{pickle} is a pickle, and none is opened here: save the adapter as safetensors (save_safetensors=True)",
            _signature(files, [pickle, "adapter_config.json"]),
        )
    if missing:
        return Look(folder, "incomplete", f"{missing} is not there yet")
    try:
        read_config(folder)
        read_header(files[WEIGHTS])
    except InvalidFile as error:
        return Look(folder, "incomplete", str(error), *_signatures(files))
    return _with_marker(folder, files)


def _no_adapter(folder: Path, files: dict[str, Path]) -> Look:
    model = next((name for name in _REGULAR if name in files), None)
    if model is None:
        return Look(folder, "incomplete", "no adapter files are there yet")
    return Look(
        folder,
        "refused",
        f"it is a regular checkpoint (it holds {model}), and adapters alone are served beside a base: "
        f"lorakit extract '{folder}' --base BASE --out DIR makes an adapter of it, "
        f"lorakit convert '{folder}' --out DIR a model of its own",
        _signature(files, [model]),
    )


def _with_marker(folder: Path, files: dict[str, Path]) -> Look:
    signatures = _signatures(files)
    marker = next((name for name in MARKERS if name in files), None)
    if marker is None:
        return Look(folder, "whole", "nothing says yet that its writer is done", *signatures)
    written = files[marker].stat().st_mtime_ns
    if marker == TRAINER_STATE:
        try:
            step = read_json(files[marker]).get("global_step")
        except InvalidFile:
            return Look(folder, "incomplete", f"{TRAINER_STATE} is only partly there", *signatures)
        named = CHECKPOINT.fullmatch(folder.name)
        if named and step != int(named[1]):
            return Look(folder, "whole", f"{TRAINER_STATE} is of step {step}", *signatures)
    newer = [name for name in _covered(files) if files[name].stat().st_mtime_ns > written]
    if newer:
        return Look(folder, "whole", f"{newer[0]} is newer than {marker}, its writer's last file", *signatures)
    return Look(folder, "finished", f"{marker} is there, its writer's last file", *signatures)


def _covered(files: dict[str, Path]) -> list[str]:
    """The files that an adapter consists of, and that a marker vouches for."""
    return [name for name in files if name in (WEIGHTS, "adapter_config.json") or _COMPANIONS.fullmatch(name)]


def _signatures(files: dict[str, Path]) -> tuple[str, str]:
    weights = [name for name in (WEIGHTS, "adapter_config.json") if name in files]
    markers = [name for name in MARKERS if name in files]
    return _signature(files, _covered(files) + markers), _signature(files, weights)


def _signature(files: dict[str, Path], names: list[str]) -> str:
    """Sizes, times and inodes: cheap, and different after any rewrite."""
    parts = []
    for name in sorted(name for name in names if name in files):
        status = files[name].stat()
        parts.append(f"{name}:{status.st_size}:{status.st_mtime_ns}:{status.st_ino}")
    return ";".join(parts)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, finished or not."""
    return (folder / "adapter_config.json").exists() or (folder / WEIGHTS).exists()
