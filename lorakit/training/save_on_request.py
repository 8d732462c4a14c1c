"""Save when somebody asks: `lorakit save RUN`, axolotl's trigger file, or SIGUSR1."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from lorakit.errors import LorakitError
from lorakit.training.agreement import Agreement, all_ranks_are_here
from lorakit.training.requests import (
    Receipt,
    Request,
    answer,
    check_name,
    checkpoint_named,
    claim,
    left_unanswered,
    listening,
    name_checkpoint,
)
from lorakit.training.signals import SignalFlag
from lorakit.training.states import STATES, copy_states

_log = logging.getLogger(__name__)


class SaveOnRequest(TrainerCallback):  # type: ignore[misc]
    """Saves a checkpoint at the end of the step in which it is asked to, and says where.

    Looks for requests at the end of a step, once in `every_steps` at least and about once in `every_seconds`; SIGUSR1
    needs no look in a single process. Rank 0 looks, and all ranks save. What a crash leaves unanswered, the next
    training in the same run answers.

    Raises:
        UsageError: as `Agreement`.
    """

    def __init__(self, *, every_steps: int = 100, every_seconds: float = 1.0) -> None:
        self._agreement = Agreement(every_steps, every_seconds)
        self._signal = SignalFlag([signal.SIGUSR1])
        self._open = ExitStack()
        self._warned: set[str] = set()
        self._start(None)

    def _start(self, run: Path | None) -> None:
        self._run = run  # None on all ranks but the first, and where nothing can be asked
        self._listens = False
        self._pending: list[tuple[Request, float]] = []  # with the time they were taken up
        self._asked = False
        self._saved: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._open.close()
        self._start(Path(args.output_dir) if state.is_world_process_zero else None)
        self._agreement.start(state.global_step)
        self._signal.install()
        if self._run is None:
            return
        try:
            self._listen(self._run)
        except OSError as error:
            self._warn(f"nobody can ask this training to save by a file, only by SIGUSR1: {error}")
            self._run = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = control.should_training_stop or state.global_step >= state.max_steps
        if self._wanted(args, state, at_once=last):
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Where training ends, this is the last chance to save."""
        if self._wanted(args, state, at_once=control.should_training_stop):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Any save answers all who ask until now: the model is what it is when they ask."""
        all_ranks_are_here()
        self._saved, self._asked, self._signal.received = state.global_step, False, None
        if self._run is not None:
            self._claim()
            self._answer(self._run / f"checkpoint-{state.global_step}", state, args)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._run is not None and self._saved == state.global_step:
            self._claim()
            self._answer(self._run / f"checkpoint-{state.global_step}", state, args)
        self._open.close()
        self._signal.restore()

    def _wanted(self, args: Any, state: Any, *, at_once: bool) -> bool:
        """Whether to save at this step. What was asked for stays asked for until there is a save."""
        step = state.global_step
        if at_once or self._agreement.is_due(step) or (self._signal.received and not args.world_size > 1):
            if self._run is not None:
                self._claim()
            wish = bool(self._pending or self._signal.received)
            self._asked |= bool(self._agreement.agreed(int(wish), step, args.device))
        if self._asked and self._saved == step and self._run is not None:  # it was asked for after the save
            self._answer(self._run / f"checkpoint-{step}", state, args)
        if self._saved == step:
            self._asked, self._signal.received = False, None
        return self._asked

    def _listen(self, run: Path) -> None:
        """Take the place of whoever answers here, and what a crash left; tried again while somebody else has it."""
        with ExitStack() as stack:
            self._listens = stack.enter_context(listening(run))
            if self._listens:
                self._open = stack.pop_all()
                self._take_up(request for request in left_unanswered(run) if not _was_named(run, request))

    def _claim(self) -> None:
        assert self._run is not None
        try:
            if not self._listens:
                self._listen(self._run)
            self._take_up(claim(self._run))  # what comes before an error is taken up
        except OSError as error:
            self._warn(f"a request to save can't be taken up: {error}")

    def _take_up(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._pending.append((request, time.monotonic()))

    def _answer(self, checkpoint: Path, state: Any, args: Any) -> None:
        """Receipts for all that is pending. One that can't be written stays unanswered, for the next training."""
        assert self._run is not None
        pending, self._pending = self._pending, []
        if pending and not checkpoint.is_dir():
            self._warn(f"a save was asked for, but there is no '{checkpoint}' after it: {len(pending)} got no answer")
            return
        for request, since in pending:
            receipt = Receipt(request.uuid, state.global_step, checkpoint.name, 0.0)
            if request.name is not None:
                receipt = _named(self._run, checkpoint, request.name, receipt, rotated=bool(args.save_total_limit))
            try:
                answer(self._run, replace(receipt, seconds=round(time.monotonic() - since, 3)))
            except OSError as error:
                self._warn(f"saved '{checkpoint}' as asked, but can't say so to who asked: {error}")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            _log.warning(message)


def _named(run: Path, checkpoint: Path, name: str, receipt: Receipt, *, rotated: bool) -> Receipt:
    """A link, which `lorakit prune` and KeepCheckpoints heed; a copy where the Trainer removes checkpoints itself."""
    name_it = _copied if rotated else name_checkpoint
    if note := name_it(run, name, checkpoint.name):
        return replace(receipt, note=note)
    if (run / name).is_symlink():
        return replace(receipt, name=name)
    return replace(receipt, name=name, path=name, note="a copy, as save_total_limit removes checkpoints")


def _copied(run: Path, name: str, checkpoint: str) -> str | None:
    """As `name_checkpoint`."""
    try:
        if checkpoint_named(run, name) != checkpoint:
            check_name(run, name)
            copy_states(run / checkpoint, run / name, STATES)
    except (LorakitError, OSError) as error:
        return f"the checkpoint is there, but could not be kept under that name: {error}"
    return None


def _was_named(run: Path, request: Request) -> bool:
    """Answer a request whose trainer died after it had saved and named the checkpoint.

    Raises:
        OSError: the answer can't be written.
    """
    if request.name is None or (checkpoint := checkpoint_named(run, request.name)) is None:
        return False
    path = checkpoint if (run / request.name).is_symlink() else request.name
    step = int(checkpoint.rpartition("-")[2])
    if (run / path).is_dir():
        answer(run, Receipt(request.uuid, step, path, 0.0, request.name, "saved before its trainer crashed"))
    return (run / path).is_dir()
