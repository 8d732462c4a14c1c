"""`lorakit best`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, print_json

if TYPE_CHECKING:
    from lorakit.checkpoints.listing import Mode


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
    nothing of it. Ends with 3 when there is none.

    \b
    lorakit best runs/sql
    lorakit best runs/sql --metric eval_accuracy --mode max
    """
    from pathlib import Path

    from lorakit.checkpoints.listing import best_of
    from lorakit.checkpoints.metadata import checkpoints_of, metadata_of, stored_by_path
    from lorakit.checkpoints.remembered import metadata_of_all
    from lorakit.store.store import default_home

    candidates = checkpoints_of(Path(run))
    rows = metadata_of_all(candidates, {}, default_home())
    best = rows.index(best_of(rows, metric, mode))
    if as_json:
        print_json(metadata_of(candidates[best], stored_by_path(default_home()), with_digest=True).as_dict())
    else:
        print(candidates[best].folder)
