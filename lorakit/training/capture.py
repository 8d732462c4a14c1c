"""Run a trainer as if it had been started alone, and keep every checkpoint that it finishes.

The program is told a folder by environment variables. What it finishes there is held at once, so that its own rotation
takes nothing away, and copied into the store beside. A capture that is killed leaves its folder, and the next one takes
in what is finished there.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from lorakit.checkpoints.finished import CHECKPOINT, QUIET, look_at
from lorakit.checkpoints.places import LocalPlace
from lorakit.checkpoints.writers import deepspeed, written_by
from lorakit.errors import Incomplete, LorakitError, disk_errors_named
from lorakit.store.contents import copy_checkpoint
from lorakit.store.names import RESERVED, check_name
from lorakit.training.capturing.captured import Captured, abandoned_captures, new_capture
from lorakit.training.capturing.holding import held_in
from lorakit.training.capturing.keeping import Event, Keeping
from lorakit.training.capturing.program import Program, running
from lorakit.training.capturing.watch import Missed

INPUT = ("LORAKIT_INPUT_CHECKPOINT_DIR", "FLEXAI_INPUT_CHECKPOINT_DIR")
OUTPUT = ("LORAKIT_OUTPUT_CHECKPOINT_DIR", "FLEXAI_OUTPUT_CHECKPOINT_DIR")
POLL = 0.25  # seconds between two looks, when nothing says that there is something new
REST = 4  # a look that took long is followed by a rest so many times as long


@dataclass(frozen=True, slots=True)
class Ended:
    """The program's exit code, and the folder with what is not in the store, if anything is left."""

    code: int
    left: Path | None


def capture(
    command: Sequence[str], *, run: str, home: Path, environ: Mapping[str, str], say: Callable[[Event], None],
    output: Path | None = None, checkpoint: Path | None = None,
) -> Ended:  # fmt: skip
    """Run a program, and keep under the name of `run` what it finishes. Has to be called in the main thread.

    Args:
        environ: what the program gets, and the folders with it.
        say: told of every checkpoint that is kept, lost, or left.
        output: where it shall write its checkpoints; by default where `environ` says, else a folder of its own.
        checkpoint: a folder or file, of which it gets a copy to start from.

    Raises:
        CannotStart: there is no such program, or it can't be executed.
        Refused: the run can't be named so.
        Incomplete: `checkpoint` is not finished.
        LorakitError: the store, or the output folder, can't be written.
    """
    check_name(run)
    told = next((Path(environ[name]) for name in OUTPUT if environ.get(name)), None)
    with new_capture(home, run, output or told) as captured:
        try:
            folders = dict.fromkeys(OUTPUT, str(captured.output))
            if checkpoint is not None:
                lay_out(checkpoint, captured.input)
                folders |= dict.fromkeys(INPUT, str(captured.input))
            keeping = Keeping(captured, home, say)
            with running(command, {**environ, **folders}, inherited=[captured.trainer_lock()]) as program:
                _follow(program, keeping, captured)
        except LorakitError:
            captured.clear((), all_kept=not captured.holds.exists())
            raise
        return Ended(program.code or 0, keeping.end(alive=program.group_lives or captured.trainer_lives))


class Adoption(threading.Thread):
    """`adopt` beside a program that runs: `join` it, and `left` is what that gives; it does not keep the process from
    ending, as what was not adopted yet the next one adopts."""

    def __init__(self, home: Path, say: Callable[[Event], None]) -> None:
        super().__init__(name="adoption", daemon=True)
        self.left: list[Path] = []
        self._home = home
        self._say = say

    def run(self) -> None:
        try:
            self.left = adopt(self._home, self._say)
        except (LorakitError, OSError) as error:
            self._say(Missed("failed", "what earlier captures left", str(error)))


def adopt(home: Path, say: Callable[[Event], None]) -> list[Path]:
    """Put into the store what captures that were killed have left finished; the folders where more is left.

    Raises:
        LorakitError: the store can't be written.
    """
    left = []
    for captured in abandoned_captures(home):
        if not captured.run:
            left.append(captured.output)
            continue
        keeping = Keeping(captured, home, say, held_in(captured.holds))
        if keeping.end(alive=captured.trainer_lives) is not None:
            left.append(captured.output)
    return left


def lay_out(checkpoint: Path, target: Path) -> None:
    """A copy that its reader may write to; of a run with its last save in its own folder, that without the others.

    Raises:
        Incomplete: it is not finished.
        Refused: it holds a link that leads out of it.
        LorakitError: it can't be written.
    """
    refuse_unfinished(checkpoint)
    names = os.listdir(checkpoint) if checkpoint.is_dir() else []
    with disk_errors_named(target):
        target.mkdir()
        tag = _deepspeed_tag(checkpoint, names)
        (target / tag).mkdir(exist_ok=True)
        copy_checkpoint(checkpoint, target / tag, without=[name for name in names if CHECKPOINT.fullmatch(name)])
        if tag:
            (target / ("latest_universal" if "zero" in names else "latest")).write_text(tag)
        for path, _, names in os.walk(target):
            for name in names:
                file = Path(path, name)
                file.chmod(file.stat().st_mode | 0o600)


def refuse_unfinished(checkpoint: Path) -> None:
    """Raises Incomplete when nothing can be started from it."""
    look = look_at(checkpoint)
    if look.state == "incomplete":
        raise Incomplete(f"'{checkpoint}' can't be started from: {look.reason}")


def _deepspeed_tag(checkpoint: Path, names: Sequence[str]) -> str:
    """The folder that DeepSpeed looks for it in, as `latest` beside that says; empty for what is none of its steps."""
    found = written_by(LocalPlace(checkpoint))
    if found is None or found[1].writer != "deepspeed" or {"latest", "latest_universal"} & set(names):
        return ""
    step = deepspeed.said_in(LocalPlace(checkpoint), found[1]).get("global_steps")
    return checkpoint.name if deepspeed.is_tag(checkpoint.name) else f"global_step{step}"


def run_named_for(command: Sequence[str]) -> str:
    """The name of a run, by the script or module: `python train.py` and `python -m sql.train` are `train`."""
    modules = [name.rpartition(".")[2] for flag, name in pairwise(command) if flag in ("-m", "--module")]
    scripts = [part for part in command if part.endswith((".py", ".sh"))]
    script = (scripts or modules[-1:] or command)[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(script).stem)
    name = re.sub(r"^[^A-Za-z0-9]+", "", name)[:100] or "run"
    return f"{name}-run" if name in RESERVED else name


def _follow(program: Program, keeping: Keeping, captured: Captured) -> None:
    """Until the program ended, and for as long as what it started goes on writing checkpoints, unless a signal says
    that it is enough."""
    busy = began = time.monotonic()
    while program.code is None or (
        not program.called_off and began - max(busy, keeping.watch.changed) < QUIET + POLL
        and (program.group_lives or captured.trainer_lives)
    ):  # fmt: skip
        began = time.monotonic()
        if program.code is None:
            busy = began
        keeping.look()
        program.wait(min(1.0, (time.monotonic() - began) * REST))
        notices = keeping.watch.notices.file
        program.wait(POLL, *([] if notices is None else [notices]))
