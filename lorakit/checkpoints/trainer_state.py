"""`trainer_state.json` of transformers' Trainer: the step, and the losses that were measured at it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from lorakit.errors import InvalidFile
from lorakit.files.folders import read_json
from lorakit.store.catalog import Facts

FILE = "trainer_state.json"


def read_facts(folder: Path, step: int | None = None) -> Facts:
    """What the Trainer logged up to this checkpoint; `step` is what the folder's name says."""
    file = folder / FILE
    if not file.is_file():
        return Facts(step=step)
    try:
        return facts_of(read_json(file), step)
    except InvalidFile:
        return Facts(step=step)


def facts_of(state: Mapping[str, Any], step: int | None = None) -> Facts:
    """At a step that saves and evaluates, the log holds `loss` and `eval_loss` in separate entries, so the last entry
    alone says half: the train loss is the newest up to the step, the eval loss the newest with the step it is of.

    The folder's name, where it has one, says the step: a state of another one was left there by something else."""
    at = _whole(state.get("global_step")) if step is None else step
    log = state.get("log_history")
    log = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    log = [entry for entry in log if at is None or not _is_number(entry.get("step")) or entry["step"] <= at]
    evaluated: dict[str, Any] = next((entry for entry in reversed(log) if _is_number(entry.get("eval_loss"))), {})
    metrics = {
        name: float(value)
        for entry in log
        if entry.get("step") == at
        for name, value in entry.items()
        if _is_number(value) and name not in ("step", "epoch", "loss", "eval_loss")
    }
    epoch = state.get("epoch")
    return Facts(
        step=at,
        epoch=float(epoch) if _is_number(epoch) and math.isfinite(epoch) else None,
        train_loss=next((float(entry["loss"]) for entry in reversed(log) if _is_number(entry.get("loss"))), None),
        eval_loss=float(evaluated["eval_loss"]) if evaluated else None,
        eval_step=_whole(evaluated.get("step")),
        metrics=metrics,
    )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, float) or _whole(value) is not None


def _whole(value: Any) -> int | None:
    """A whole number of a size that steps have; JSON knows no largest one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None
