"""From a run to the checkpoint that its training can go on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from lorakit.checkpoints.finished import CHECKPOINT
from lorakit.checkpoints.listing import best_of
from lorakit.checkpoints.metadata import Metadata, checkpoints_of, metadata_of
from lorakit.errors import NotFound, Refused
from lorakit.training.states import files_of

_log = logging.getLogger(__name__)


def resume(run: str | Path, which: str = "latest") -> str | None:
    """The checkpoint for `trainer.train(resume_from_checkpoint=resume(run))`; None when there is none to go on from.

    One that is broken or was never finished is passed over, and said so. From the last of a training that ended, a
    Trainer trains one step more than `max_steps` says: look at its step first.

    Args:
        which: `latest` (the largest step), `best` (the lowest eval_loss), or what the checkpoint is called in the run.

    Raises:
        NotFound: `which` is a name, and there is none of it.
        Refused: `which` is a name, and that checkpoint is not finished, or can't be resumed.
    """
    run = Path(run)
    if which not in ("latest", "best"):
        return _named(run / which)
    rows = _resumable(run)
    if which == "latest":
        return _said(next(rows, None))
    try:
        return _said(best_of(list(rows)))
    except NotFound as error:
        _log.warning("no best checkpoint to resume from: %s", error)
        return None


def _named(checkpoint: Path) -> str | None:
    if not checkpoint.is_dir():
        raise NotFound(f"there is no checkpoint '{checkpoint}'")
    row = metadata_of(checkpoints_of(checkpoint)[-1])
    reason = row.reason if row.state != "finished" else why_not_resumable(checkpoint)
    if reason:
        raise Refused(f"training can't go on from '{checkpoint}': {reason}")
    return _said(row)


def _said(row: Metadata | None) -> str | None:
    if row is None:
        return None
    there = files_of(Path(row.path))
    by_deepspeed = any(name.startswith("global_step") for name in there.get("optimizer", ()))
    missing = [state for state in ("optimizer", "scheduler") if state not in there]
    if missing and not by_deepspeed:
        _log.warning(
            "'%s' holds no %s: training goes on with a fresh optimizer and learning rate, as the Trainer loads both or "
            "none", row.path, " and no ".join(missing),
        )  # fmt: skip
    return row.path


def _resumable(run: Path) -> Iterator[Metadata]:
    """The finished checkpoints that hold what a Trainer goes on from, the newest first."""
    try:
        found = [one for one in checkpoints_of(run) if CHECKPOINT.fullmatch(one.folder.name)]  # no copies of SaveState
    except NotFound:
        return
    for row in (metadata_of(candidate) for candidate in reversed(found)):
        reason = row.reason if row.state != "finished" else why_not_resumable(Path(row.path))
        if reason is None:
            yield row
        else:
            _log.warning("training can't go on from '%s': %s", row.path, reason)


def why_not_resumable(checkpoint: Path) -> str | None:
    """What a Trainer would fail on in a finished checkpoint; None when there is nothing."""
    try:
        there = files_of(checkpoint)
    except OSError as error:
        return f"it can't be read: {error}"
    if "trainer_state.json" not in there.get("trainer_state", ()):
        return "it has no trainer_state.json, so nothing says at which step it is"
    return None
