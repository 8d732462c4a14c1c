"""Start a training from some states of a checkpoint, and from none of the others."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from lorakit.checkpoints.finished import look_at
from lorakit.checkpoints.locate import find_checkpoint
from lorakit.errors import Incomplete, NotFound, Refused
from lorakit.files.provenance import FILE as PROVENANCE
from lorakit.training.loading import prepare_state
from lorakit.training.prepared import Into, Loaded
from lorakit.training.states import STATES, files_of, parse_states

_log = logging.getLogger(__name__)


class LoadStates(TrainerCallback):  # type: ignore[misc]
    """Loads `states` of a checkpoint as training begins: `LoadStates("model", checkpoint="runs/a")` goes on with the
    weights of another run, with a fresh optimizer and from step 0.

    It is for the start: a training that is resumed has what it needs, and one that has taken steps is not thrown back;
    both are said. With `trainer_state`, the count of steps goes on, and the data begins from its start: to go on with
    the data, too, is `trainer.train(resume_from_checkpoint=lorakit.training.resume(run))`.

    Args:
        states: one or more of `STATES`, or "all", which is all that the checkpoint holds.
        checkpoint: a checkpoint, a run (its newest finished one is meant), a name in the store, or "latest" for this
            training's own run.
        strict: refuse what does not fit or is not there, before anything is loaded; else load what fits, and name the
            rest.

    Raises:
        UsageError: `states` names one that there is not.
    """

    def __init__(
        self, states: str | Iterable[str] = "model", *, checkpoint: str | Path = "latest", strict: bool = True
    ) -> None:
        self._states = parse_states(states)
        self._checkpoint = checkpoint
        self._strict = strict
        self.loaded: tuple[Loaded, ...] = ()
        self._trained = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, lr_scheduler: Any, **_: Any
    ) -> None:
        """
        Raises:
            NotFound: there is no such checkpoint.
            Refused: it can't be loaded into this training; says what does not fit.
        """
        if state.global_step or self._trained:
            why = f"training is resumed at step {state.global_step}" if state.global_step else "it was trained already"
            if state.is_world_process_zero:
                _log.warning("loaded nothing from '%s': %s", self._checkpoint, why)
            return
        checkpoint = self._found(Path(args.output_dir))
        there = files_of(checkpoint)
        missing = [name for name in self._states if name not in there]
        if missing and self._strict and self._states != STATES:
            raise Refused(f"'{checkpoint}' holds {', '.join(there) or 'no state'}, and not {', '.join(missing)}")
        wanted = [name for name in self._states if name in there]
        parts = {
            "model": model, "optimizer": optimizer, "scheduler": lr_scheduler, "trainer_state": state,
            "loop": _trainer_above(sys._getframe(1)),
        }  # fmt: skip
        into = Into(parts, self._strict, args.process_index, args.world_size, keeps_rates="scheduler" not in wanted)
        prepared = [prepare_state(name, checkpoint, into) for name in wanted]
        for one in prepared:
            one.apply()
        self.loaded = tuple(one.loaded for one in prepared)
        if state.is_world_process_zero:
            self._say(checkpoint, [name for name in there if name not in wanted], missing)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trained = True

    def _found(self, output: Path) -> Path:
        """
        Raises:
            NotFound: there is no such checkpoint, or none in that run is finished.
            Incomplete: it is not finished.
        """
        own = str(self._checkpoint) == "latest"
        named = str(output if own else self._checkpoint)
        checkpoint = find_checkpoint(named) if output.is_dir() or not own else None
        if checkpoint is None or not checkpoint.is_dir() or not files_of(checkpoint):
            raise NotFound(f"there is no finished checkpoint in '{named}': name a checkpoint, or a run that has one")
        look = look_at(checkpoint)
        if look.state == "incomplete" and not (checkpoint / PROVENANCE).is_file():  # of some states: that appears whole
            raise Incomplete(f"'{checkpoint}' is not finished: {look.reason}")
        return checkpoint

    def _say(self, checkpoint: Path, skipped: list[str], missing: list[str]) -> None:
        words = [f"loaded {'; '.join(str(one) for one in self.loaded) or 'nothing'} from '{checkpoint}'"]
        words += [f"skipped {', '.join(skipped)}"] if skipped else []
        words += [f"not there: {', '.join(missing)}"] if missing else []
        _log.warning("; ".join(words))
        for one in self.loaded:
            if one.left_out:
                _log.warning("%s: %s", one.state, one.left_out)


def _trainer_above(frame: FrameType | None) -> Any:
    """The Trainer whose loop calls, which callbacks are not told; None when there is none."""
    while frame is not None and not hasattr(frame.f_locals.get("self"), "_globalstep_last_logged"):
        frame = frame.f_back
    return frame.f_locals["self"] if frame else None
