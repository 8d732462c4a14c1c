"""Checkpoints as a trainer leaves them, made of small files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.folders import factors, linear_modules, write_adapter, write_base

LATER = 4 * 10**18  # nanoseconds


def evaluated(step: int, loss: float, **metrics: float) -> dict[str, float]:
    return {"step": step, "epoch": step / 100, "eval_loss": loss, **metrics}


def write_checkpoint(folder: Path, log: Sequence[dict[str, Any]] = (), *, seed: int = 1, **config: Any) -> Path:
    """A finished adapter checkpoint, whose state is written last."""
    write_adapter(folder, factors(linear_modules(1), seed=seed), **config)
    return finish(folder, log)


def write_model_checkpoint(folder: Path, log: Sequence[dict[str, Any]] = (), **config: Any) -> Path:
    return finish(write_base(folder, **config), log)


def finish(folder: Path, log: Sequence[dict[str, Any]] = ()) -> Path:
    step = int(folder.name.rpartition("-")[2]) if folder.name.startswith("checkpoint-") else 1000
    state = {"global_step": step, "epoch": step / 100, "log_history": list(log)}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    os.utime(folder / "trainer_state.json", ns=(LATER, LATER))
    return folder
