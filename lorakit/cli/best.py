"""`lorakit best`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, print_json

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.checkpoints.listing import Mode
    from lorakit.checkpoints.metadata import Metadata


@click.command("best")
@click.argument("run")
@click.option("--metric", default="eval_loss", show_default=True, metavar="NAME", help="Any that the trainer logs.")
@click.option(
    "--mode", type=click.Choice(["min", "max"]), help="Whether less or more is better; min when the name ends in loss."
)
@json_option
def command(run: str, metric: str, mode: Mode | None, as_json: bool) -> None:
    """Print the path of a run's best finished checkpoint, and nothing else.

    That is the one with the lowest eval_loss that was measured at its own step: an evaluation of another step says
    nothing of it. Of train_loss, the newest up to its step counts. Where there is no folder RUN, it is one that the
    store knows. Ends with 3 when there is none.

    \b
    lorakit best runs/sql
    lorakit best runs/sql --metric eval_accuracy --mode max
    """
    import os
    from pathlib import Path

    from lorakit.checkpoints.given_names import with_given_names
    from lorakit.checkpoints.listing import best_of
    from lorakit.checkpoints.metadata import metadata_of, stored_by_path
    from lorakit.checkpoints.remembered import metadata_of_all
    from lorakit.checkpoints.runs import checkpoints_of, originals
    from lorakit.store.store import default_home

    home = default_home()
    if not os.path.exists(run):
        row = best_of(_in_store(run, home), metric, mode)
        if as_json:
            print_json(row.as_dict())
        else:
            print(row.path)
        return
    candidates = originals(checkpoints_of(Path(run)))
    rows = metadata_of_all(candidates, {}, home)
    best = rows.index(best_of(rows, metric, mode))
    if as_json:
        row = metadata_of(candidates[best], stored_by_path(home), with_digest=True)
        print_json(with_given_names([row])[0].as_dict())
    else:
        print(candidates[best].folder)


def _in_store(run: str, home: Path) -> list[Metadata]:
    """Raises NotFound when the store has no such run."""
    from lorakit.checkpoints.locate import nothing_named
    from lorakit.checkpoints.stored import rows_in_store

    rows = rows_in_store(home, run)
    if not rows:
        raise nothing_named(run)
    return rows
