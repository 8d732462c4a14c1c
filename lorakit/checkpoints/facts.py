"""Step, epoch and losses of a checkpoint, from whichever of its files says them: the Trainer's log, or a torch file."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.checkpoints.places import LocalPlace, entry_of
from lorakit.checkpoints.trainer_state import FILE as TRAINER_STATE
from lorakit.checkpoints.trainer_state import read_facts
from lorakit.checkpoints.writers import deepspeed, torchtune
from lorakit.checkpoints.writers.layout import Layout
from lorakit.checkpoints.writers.torch_keys import epoch_in, is_tensor, keys_in, model_in, step_in
from lorakit.store.catalog import Facts

VALIDATION = ("val_loss", "valid_loss", "validation_loss", "eval_loss", "val/loss", "eval/loss")
_NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e"}


def facts_at(path: Path, step: int | None, layout: Layout | None) -> Facts:
    """What a checkpoint says of itself; `step` is what its name says. Raises OSError."""
    if layout is None or (path / TRAINER_STATE).is_file():
        return read_facts(path, step)
    place = LocalPlace(path)
    if place.is_file:
        return _of_torch_file(place.name, keys_in(place, place.name), step)
    if layout.writer == "deepspeed":
        said = deepspeed.said_in(place, layout)
        return Facts(step=step if step is not None else step_in(said))
    if layout.writer == "torchtune":
        return _of_recipe(place, step)
    return Facts(step=step)


def _of_recipe(place: LocalPlace, step: int | None) -> Facts:
    """The state of the recipe, where it is this folder's own; the one beside it may be of a later epoch."""
    state = next((name for name in torchtune.OWN_STATES if entry_of(place, name) is not None), None)
    said = keys_in(place, state) if state else {}
    return Facts(step=step if step is not None else step_in(said), epoch=epoch_in(said))


def _of_torch_file(name: str, said: Mapping[str, Any], step: int | None) -> Facts:
    at = step_in(said)
    facts = Facts(step=step if at is None else at, epoch=epoch_in(said))
    monitored = _monitored(name, said)
    if monitored is None:
        return facts
    metric, value = monitored
    if metric not in VALIDATION:
        return replace(facts, metrics={metric: value})
    return replace(facts, eval_loss=value, eval_step=facts.step, metrics={metric: value})


def _monitored(name: str, said: Mapping[str, Any]) -> tuple[str, float] | None:
    """What Lightning's ModelCheckpoint measured when it wrote this very file: it lists its files with their values."""
    callbacks = said.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        if not isinstance(state, Mapping) or not isinstance(state.get("monitor"), str):
            continue
        listed = state.get("best_k_models")
        values = {
            Path(file).name: value
            for file, value in (listed.items() if isinstance(listed, Mapping) else ())
            if isinstance(file, str)
        }
        if name not in values and isinstance(state.get("best_model_path"), str):
            values[Path(state["best_model_path"]).name] = state.get("best_model_score")
        number = number_in(values.get(name))
        if number is not None:
            return state["monitor"], number
    return None


def number_in(value: Any) -> float | None:
    """A number, or that of a tensor with one element."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not is_tensor(value) or math.prod(value.shape) != 1:
        return None
    start, end = value.span
    try:
        with value.file.open("rb") as stream:
            stream.seek(start)
            raw = stream.read(end - start)
    except OSError:
        return None
    if value.dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + raw)[0]) if len(raw) == 2 else None
    layout = _NUMBERS.get(value.dtype)
    return float(struct.unpack(layout, raw)[0]) if layout and len(raw) == struct.calcsize(layout) else None


def rank_in(path: Path, layout: Layout | None) -> int | None:
    """The largest rank of an adapter in a torch file."""
    place = LocalPlace(path)
    names = layout.weights if layout and layout.writer in ("lightning", "torch", "litgpt") else ()
    ranks = [
        value.shape[0]
        for name in names
        for key, value in (model_in(keys_in(place, name)) or {}).items()
        if "lora_A" in str(key) and is_tensor(value) and len(value.shape) == 2
    ]
    return max(ranks, default=None)
