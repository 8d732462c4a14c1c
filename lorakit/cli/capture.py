"""`lorakit capture`: a trainer, with its checkpoints kept."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import note
from lorakit.cli.tables import printable, size_in_words
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.store.kept import Kept
    from lorakit.training.capturing.keeping import Event

_WORDS = {"lost": "lost {}", "failed": "could not keep {}", "left": "left {} where it is"}


@click.command("capture", context_settings={"allow_interspersed_args": False})
@click.option("-C", "--checkpoint", metavar="ID", help="Start from this: an id or run of the store, or a path.")
@click.option("--run", metavar="NAME", help="What the checkpoints are kept as. Default: the script's name.")
@click.option("--dir", "folder", type=click.Path(file_okay=False), help="Where the program writes its checkpoints.")
@click.option("--dry-run", is_flag=True, help="Say what the program would be told, and run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Say each thing on stderr as a line of JSON.")
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- PROGRAM [ARGS]...")
@click.pass_context
def command(
    context: click.Context, checkpoint: str | None, run: str | None, folder: str | None, dry_run: bool, as_json: bool,
    program: tuple[str, ...],
) -> None:  # fmt: skip
    """Run a trainer, and keep every checkpoint that it finishes, with an id and the time, in the store.

    LORAKIT_OUTPUT_CHECKPOINT_DIR and FLEXAI_OUTPUT_CHECKPOINT_DIR tell the program where to write: DIR, or what they
    say already, or a folder of its own. Each folder there is a checkpoint, and so is an adapter or a model in its root,
    and a single file; what is written again is a new version. With -C, LORAKIT_INPUT_CHECKPOINT_DIR and
    FLEXAI_INPUT_CHECKPOINT_DIR tell where a copy of that checkpoint is.

    stdin, stdout, stderr and the exit code are the program's. INT, QUIT and HUP are passed on to all that it runs,
    TERM, USR1 and USR2 to itself. What a killed capture left finished, the next one keeps.

    \b
    lorakit capture -- python train.py --epochs 3
    lorakit capture -C train@best --run sql -- torchrun --nproc_per_node 2 train.py
    """
    from pathlib import Path

    from lorakit.checkpoints.locate import checkpoint_folder
    from lorakit.store.names import check_name
    from lorakit.store.store import default_home
    from lorakit.training.capture import OUTPUT, Adoption, capture, refuse_unfinished, run_named_for

    if not program[0]:
        raise UsageError("the program has no name: write it after --, as in `lorakit capture -- python train.py`")
    if checkpoint == "":
        raise UsageError("-C names nothing: give an id or run of the store, or a path, or leave it out")
    home, say = default_home(), _say_as_json if as_json else _say
    name = run or run_named_for(program)
    check_name(name)
    earlier = Adoption(home, say)
    if checkpoint is not None and not dry_run:  # which may be one that an earlier capture left
        earlier.start()
        earlier.join()
    source = checkpoint_folder(checkpoint) if checkpoint is not None else None
    if dry_run:
        told = folder or next((os.environ[one] for one in OUTPUT if os.environ.get(one)), "a folder of its own")
        if source is not None:
            refuse_unfinished(source)
        _note(f"{name} would write its checkpoints into {told}, and start from {source or 'nothing'}", as_json)
        return
    try:
        if checkpoint is None:
            earlier.start()
        ended = capture(
            program, run=name, home=home, environ=os.environ, say=say, output=Path(folder) if folder else None,
            checkpoint=source,
        )  # fmt: skip
        earlier.join()
    except KeyboardInterrupt:
        _note("what is finished and not in the store yet, the next capture keeps", as_json)
        raise
    for left in earlier.left:
        _note(f"an earlier capture left what is not in the store in '{left}'", as_json)
    if ended.left is not None:
        _note(f"what is not in the store is in '{ended.left}'", as_json)
    context.exit(ended.code)


def _say(event: Event) -> None:
    from lorakit.training.capturing.keeping import Took

    if isinstance(event, Took):
        said = ", ".join((*_losses(event.kept), size_in_words(event.kept.size)))
        words = f"kept {event.kept.id}: {said} in {event.seconds:.1f} s"
    else:
        words = f"{_WORDS[event.what].format(event.name)}: {event.reason}"
    _note(words, as_json=False)


def _losses(kept: Kept) -> list[str]:
    facts = kept.facts
    words = [] if facts.step is None else [f"step {facts.step}"]
    if facts.train_loss is not None:
        words.append(f"train loss {facts.train_loss:.4g}")
    if facts.eval_loss is not None:
        of = "" if facts.eval_step == facts.step else f" (step {facts.eval_step})"
        words.append(f"eval loss {facts.eval_loss:.4g}{of}")
    return words


def _say_as_json(event: Event) -> None:
    from lorakit.training.capturing.keeping import Took

    if not isinstance(event, Took):
        _print({"event": event.what, "name": event.name, "reason": event.reason})
        return
    kept = asdict(event.kept)
    facts = _finite(kept.pop("facts"))
    named = {"name": event.name, "folder": str(event.kept.folder), "seconds": round(event.seconds, 3)}
    _print({"event": "kept", **kept, **facts, **named})


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _note(message: str, as_json: bool) -> None:
    if as_json:
        _print({"event": "note", "message": message})
    else:
        _write(printable(f"lorakit: {message}"))


def _print(said: dict[str, Any]) -> None:
    _write(json.dumps(said))


def _write(line: str) -> None:
    with suppress(OSError):  # nobody reads it, which is no reason to leave the program alone
        note(line)
