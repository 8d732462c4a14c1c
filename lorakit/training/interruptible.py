"""Ctrl+C and SIGTERM: a full checkpoint first, then the end."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from transformers import TrainerCallback

from lorakit.training.agreement import Agreement, all_ranks_are_here
from lorakit.training.signals import SignalFlag

_log = logging.getLogger(__name__)
SAID = (
    "\nlorakit: saving a full checkpoint at the end of this step, or of this evaluation, then stopping; once more to "
    "stop at once\n"
)


class Interruptible(TrainerCallback):  # type: ignore[misc]
    """The first Ctrl+C saves all that training needs to go on, at the end of the current step, then exits with 130;
    the second ends the process at once. SIGTERM likewise, with 143.

    What is saved is resumable whatever `save_only_model` says. It happens on all ranks, whichever of them was told.
    After Ctrl+C an evaluation that is due at that step comes first, as what is resumed then goes on to the very same
    weights; SIGTERM leaves little time, and it is left out. With `enable_jit_checkpoint`, SIGTERM is left to the
    Trainer.

    Raises:
        UsageError: as `Agreement`.
    """

    def __init__(self, *, every_steps: int = 100, every_seconds: float = 1.0) -> None:
        self._agreement = Agreement(every_steps, every_seconds)
        self._signal = SignalFlag([signal.SIGINT, signal.SIGTERM], once=True, said=SAID)
        self._ending = 0  # the signal that all ranks agreed to end for
        self._saved: int | None = None
        self._only_model = False  # what save_only_model says when nothing ends
        self._trains = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._signal.restore()
        if getattr(args, "enable_jit_checkpoint", False):
            self._signal = SignalFlag([signal.SIGINT], once=True, said=SAID)
        self._ending, self._saved, self._trains = 0, None, True
        control.lorakit_interrupts = False
        self._agreement.start(state.global_step)
        if not self._signal.install():
            _log.warning("Ctrl+C will save nothing: training does not run in the main thread, where Python has signals")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or self._agreement.is_due(state.global_step) or (self._signal.received and not args.world_size > 1):
            self._look(args, state, control)
        if self._ending == signal.SIGTERM and control.should_evaluate:
            control.should_evaluate = False
            _log.warning("step %d is not evaluated, as SIGTERM leaves little time", state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step of this evaluation has not been saved yet, if it will be."""
        if self._trains:  # an evaluation beside it may be of one rank alone
            self._look(args, state, control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._saved = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where a training that is to stop comes next: before it loads and removes checkpoints, as it does at its end.

        With save_strategy="best" the Trainer may have undone the wish to save.
        """
        if self._ending and self._saved == state.global_step:
            self._leave(args, state)
        if self._ending:
            control.should_save, control.should_evaluate = True, False

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first that happens after the save at an epoch's end."""
        if self._ending and self._saved == state.global_step:
            self._leave(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A signal that came after the last look does what it did before, and on all ranks: none is left waiting."""
        self._trains = False
        self._signal.restore()
        received = self._agreement.agreed(self._signal.received or 0, state.global_step, args.device)
        if received:
            os.kill(os.getpid(), received)

    def _look(self, args: Any, state: Any, control: Any) -> None:
        before = self._ending
        self._ending = self._agreement.agreed(self._signal.received or 0, state.global_step, args.device)
        if self._ending:
            self._only_model = self._only_model if before else args.save_only_model
            args.save_only_model = False
            control.should_save = control.should_training_stop = control.lorakit_interrupts = True

    def _leave(self, args: Any, state: Any) -> None:
        """Whoever catches this, in a notebook, has a trainer as it was."""
        all_ranks_are_here()
        self._signal.restore()
        code = 128 + self._ending
        args.save_only_model, self._ending, self._trains = self._only_model, 0, False
        if state.is_world_process_zero:
            _log.warning("saved at step %d, and interrupted; lorakit.training.resume finds it", state.global_step)
        raise SystemExit(code)


def is_interrupted(control: Any) -> bool:
    """Whether a training that is to stop only pauses: it goes on where it is resumed."""
    return getattr(control, "lorakit_interrupts", False)
