"""The states that a checkpoint of transformers' Trainer consists of, and copies of some of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from lorakit.checkpoints.trainer_state import read_facts
from lorakit.errors import LorakitError, NotFound, UsageError
from lorakit.files.folders import copy_file, read_json, whole_folder
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.files.provenance import write_provenance

STATES = ("model", "optimizer", "scheduler", "scaler", "rng", "trainer_state")

# What a file that matches none of these belongs to is the model: weights, configs, tokenizer.
_FILES = {
    "optimizer": re.compile(r"optimizer\.(pt|bin)|optimizer_\d+/.*|global_step\d+/.*|latest|zero_to_\w+\.py"),
    "scheduler": re.compile(r"scheduler\.(pt|bin)"),
    "scaler": re.compile(r"scaler\.pt"),
    "rng": re.compile(r"rng_state(_\d+)?\.pth|random_states_\d+\.pkl"),
    "trainer_state": re.compile(r"trainer_state\.json|training_args\.bin|tokens_state\.json"),
}
_WEIGHTS = re.compile(r"(.*/)?(adapter_model|model|pytorch_model).*\.(safetensors|bin)|pytorch_model_fsdp_\d+/.*")


def parse_states(said: str | Iterable[str]) -> tuple[str, ...]:
    """`"model,optimizer"`, a list of states, or `"all"`, in the order of `STATES`.

    Raises:
        UsageError: one is none of them, or none is named.
    """
    names = [name.strip() for name in (said.split(",") if isinstance(said, str) else said)]
    if names == ["all"]:
        return STATES
    unknown = [name for name in names if name not in STATES]
    if unknown or not names:
        what = f"'{unknown[0]}' is no state of a checkpoint" if unknown else "no state is named"
        raise UsageError(f"{what}: there are {', '.join(STATES)}, and all")
    return tuple(state for state in STATES if state in names)


def state_of(name: str) -> str:
    """The state that a file of a checkpoint, named relative to it, belongs to."""
    return next((state for state, pattern in _FILES.items() if pattern.fullmatch(name)), "model")


def files_of(checkpoint: Path) -> dict[str, list[str]]:
    """The files of each state that a checkpoint holds; weights make a model, its config alone does not.

    Raises:
        OSError: the checkpoint can't be read.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(_files(checkpoint)):
        found.setdefault(state_of(name), []).append(name)
    if not any(_WEIGHTS.fullmatch(name) for name in found.get("model", ())):
        found.pop("model", None)
    return {state: found[state] for state in STATES if state in found}


def copy_states(checkpoint: Path, target: Path, states: tuple[str, ...]) -> None:
    """Copy these states of a checkpoint to a new folder, whole or not at all; a reflink where the file system has them.

    Raises:
        NotFound: the checkpoint lacks all of them, or the model that was asked for.
        Conflict, OutOfSpace, LorakitError: as `whole_folder`.
        OSError: a file can't be read.
    """
    there = files_of(checkpoint)
    held = [state for state in states if state in there]
    if not held or ("model" in states and "model" not in there):
        raise NotFound(f"'{checkpoint}' holds {', '.join(there) or 'no state'}, and not {', '.join(states)}")
    with whole_folder(target) as folder:
        for name in (name for state in held for name in there[state] if name != PROVENANCE):
            copy = folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy_file(checkpoint / name, copy)
            status = (checkpoint / name).stat()
            os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        facts = read_facts(checkpoint)
        parent = {"path": checkpoint.name, "step": facts.step}
        measured = {"train_loss": _known(facts.train_loss), "eval_loss": _known(facts.eval_loss)}
        write_provenance(folder, "save_state", [parent], {"states": held}, **measured, eval_step=facts.eval_step)


def copied_from(folder: Path) -> str | None:
    """The name of the checkpoint that a folder is a copy of; None when it is no such copy."""
    try:
        said = read_json(folder / PROVENANCE)
        name = said["parents"][0]["path"] if said["operation"] == "save_state" else None
    except (OSError, LorakitError, KeyError, IndexError, TypeError):
        return None
    return name if isinstance(name, str) else None


def _known(loss: float | None) -> float | None:
    """JSON has no NaN."""
    return loss if loss is not None and math.isfinite(loss) else None


def _files(folder: Path, prefix: str = "") -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = f"{prefix}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                yield name
