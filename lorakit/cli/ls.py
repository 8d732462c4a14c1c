"""`lorakit ls`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, note, print_json
from lorakit.cli.tables import print_table, printable, size_in_words

if TYPE_CHECKING:
    from lorakit.checkpoints.metadata import Metadata

HEAD = ("ID", "STEP", "TRAIN LOSS", "EVAL LOSS", "KIND", "BASE", "SIZE", "STATE", "ALIASES")
REASONS = 10


@click.command("ls")
@click.argument("folders", metavar="[DIR]...", nargs=-1)
@click.option("--sort", metavar="FIELD[:desc]", help="By a field of --json, or a logged metric; as on disk without.")
@click.option(
    "--filter", "filters", multiple=True, metavar="CONDITION", help="'eval_loss<1.2', 'size>1GB', 'state=finished'; "
    "may be given several times.",
)  # fmt: skip
@json_option
def command(folders: tuple[str, ...], sort: str | None, filters: tuple[str, ...], as_json: bool) -> None:
    """List checkpoints, adapters and whole models: those of a run, of a folder of runs, or the folder itself.

    DIR is where you are when none is given. An evaluation of an earlier step is shown with that step. Digests that are
    not known from the store are computed for --json alone.

    \b
    lorakit ls runs
    lorakit ls runs/sql --filter 'eval_loss<1.2' --filter state=finished --sort eval_loss
    """
    from pathlib import Path

    from lorakit.checkpoints.listing import admitted, in_order, parse_filter
    from lorakit.checkpoints.metadata import checkpoints_in, stored_by_path
    from lorakit.checkpoints.remembered import metadata_of_all
    from lorakit.store.store import default_home

    conditions = [parse_filter(text) for text in filters]
    home = default_home()
    found = {
        os.path.abspath(candidate.folder): candidate
        for folder in folders or (".",)
        for candidate in checkpoints_in(Path(folder))
    }
    rows = metadata_of_all(list(found.values()), stored_by_path(home), home, with_digest=as_json)
    rows = admitted(rows, conditions)
    if sort is not None:
        rows = in_order(rows, sort)
    if as_json:
        print_json([row.as_dict() for row in rows])
    elif rows:
        _print(rows)
    else:
        note("no checkpoint of these meets the filters" if found and filters else "no checkpoints are there")


def _print(rows: Sequence[Metadata]) -> None:

    print_table(HEAD, [_cells(row) for row in rows])
    unfinished = [row for row in rows if row.reason is not None]
    for row in unfinished[:REASONS]:
        note(f"{printable(row.id)} is {row.state}: {printable(row.reason or '')}")
    if len(unfinished) > REASONS:
        note(f"and {len(unfinished) - REASONS} more: --json has every reason")


def _cells(row: Metadata) -> tuple[str, ...]:
    evaluated = _number(row.eval_loss)
    if row.eval_loss is not None and row.eval_step != row.step:
        evaluated += f" (step {row.eval_step})" if row.eval_step is not None else " (of no known step)"
    base = "-" if row.base is None else os.path.basename(row.base.rstrip("/")) if os.path.isabs(row.base) else row.base
    return (
        row.id, "-" if row.step is None else str(row.step), _number(row.train_loss), evaluated, row.kind or "-", base,
        "-" if row.size is None else size_in_words(row.size), row.state, ", ".join(row.aliases) or "-",
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
