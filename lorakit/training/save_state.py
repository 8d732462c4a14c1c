"""Copies of some states of every so many checkpoints, which retention does not touch."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lorakit.errors import LorakitError, UsageError
from lorakit.files.folders import clear_abandoned
from lorakit.training.agreement import all_ranks_are_here
from lorakit.training.interruptible import is_interrupted
from lorakit.training.states import copy_states, parse_states

_log = logging.getLogger(__name__)


class SaveState(TrainerCallback):  # type: ignore[misc]
    """Keeps `states` of every `every`-th checkpoint, counted from the start of this training, and of the last step,
    as `model_checkpoint-500` beside `checkpoint-500`. Nothing removes that copy.

    A last step that nothing else would save is saved; one at which `Interruptible` stops is no last step. A copy that
    fails is warned of, and training goes on.

    Raises:
        UsageError: `states` names one that there is not, or `every` is below 1.
    """

    def __init__(self, states: str | Iterable[str] = "model", *, every: int) -> None:
        if every < 1:
            raise UsageError(f"every={every} keeps nothing: give a number above 0")
        self._states = parse_states(states)
        self._prefix = "_".join(self._states)
        self._every = every
        self._count = 0
        self._saved: int | None = None
        self._copied: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._count, self._saved, self._copied = 0, None, None
        if state.is_world_process_zero:  # what a killed training left of a copy
            clear_abandoned(Path(args.output_dir), f".{self._prefix}_checkpoint-")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if _is_last(state, control):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Training may have been stopped after the end of the step."""
        if _is_last(state, control) and self._saved != state.global_step:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._saved != state.global_step:  # else it is the same checkpoint again, at an epoch's end
            self._saved = state.global_step
            self._count += 1
        if self._copied != self._saved and (self._count % self._every == 0 or _is_last(state, control)):
            self._copied = self._saved
            all_ranks_are_here()
            if state.is_world_process_zero:
                self._copy(Path(args.output_dir), f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A training that was stopped while it saved."""
        if self._saved == state.global_step and self._copied != self._saved and state.is_world_process_zero:
            self._copy(Path(args.output_dir), f"checkpoint-{state.global_step}")

    def _copy(self, run: Path, checkpoint: str) -> None:
        target = run / f"{self._prefix}_{checkpoint}"
        if target.exists():  # of an earlier training: nothing touches it
            target = target.with_name(f"{target.name}_{time.strftime('%Y%m%d-%H%M%S')}")
        try:
            copy_states(run / checkpoint, target, self._states)
        except (LorakitError, OSError) as error:
            _log.warning("no copy '%s' was kept: %s", target, error)


def _is_last(state: Any, control: Any) -> bool:
    stopped = control.should_training_stop and not is_interrupted(control)
    return bool(stopped or state.global_step >= state.max_steps)
