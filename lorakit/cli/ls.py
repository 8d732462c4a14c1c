"""`lorakit ls`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, note, print_json
from lorakit.cli.tables import print_table, size_in_words

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.checkpoints.metadata import Metadata

HEAD = ("ID", "STEP", "TRAIN LOSS", "EVAL LOSS", "KIND", "BASE", "SIZE", "STATE", "ALIASES")
REASONS = 10


@click.command("ls")
@click.argument("runs", metavar="[DIR|RUN]...", nargs=-1)
@click.option("--store", "in_store", is_flag=True, help="What the store keeps: all of it, or of these runs.")
@click.option("--sort", metavar="FIELD[:desc]", help="By a field of --json, or a logged metric; as on disk without.")
@click.option(
    "--filter", "filters", multiple=True, metavar="CONDITION", help="'eval_loss<1.2', 'size>1GB', 'state=finished'; "
    "may be given several times.",
)  # fmt: skip
@json_option
def command(runs: tuple[str, ...], in_store: bool, sort: str | None, filters: tuple[str, ...], as_json: bool) -> None:
    """List checkpoints, adapters and whole models: those of a run, of a folder of runs, or the folder itself.

    DIR is where you are when none is given; where there is no such folder, RUN is one that the store knows. An
    evaluation of an earlier step is shown with that step. Digests that are not known from the store are computed for
    --json alone.

    \b
    lorakit ls runs
    lorakit ls runs/sql --filter 'eval_loss<1.2' --filter state=finished --sort eval_loss
    lorakit ls --store
    """
    from pathlib import Path

    from lorakit.checkpoints.given_names import with_given_names
    from lorakit.checkpoints.listing import admitted, in_order, parse_filter
    from lorakit.checkpoints.metadata import stored_by_path
    from lorakit.checkpoints.remembered import metadata_of_all
    from lorakit.checkpoints.runs import checkpoints_in
    from lorakit.store.store import default_home

    conditions = [parse_filter(text) for text in filters]
    home = default_home()
    named = runs or (() if in_store else (".",))
    on_disk = [] if in_store else [run for run in named if os.path.exists(run)]
    found = {os.path.abspath(candidate.folder): candidate for run in on_disk for candidate in checkpoints_in(Path(run))}
    listed = metadata_of_all(list(found.values()), stored_by_path(home), home, with_digest=as_json) if on_disk else []
    rows = with_given_names(listed)
    rows += _stored(home, [run for run in named if run not in on_disk], every=in_store and not named)
    listed = admitted(rows, conditions)
    if sort is not None:
        listed = in_order(listed, sort)
    if as_json:
        print_json([row.as_dict() for row in listed])
    elif listed:
        _print(listed)
    else:
        note("no checkpoint of these meets the filters" if rows else "no checkpoints are there")


def _stored(home: Path, runs: Sequence[str], *, every: bool) -> list[Metadata]:
    """Raises NotFound when the store has nothing of a run."""
    if not (runs or every):
        return []
    from lorakit.checkpoints.locate import nothing_named
    from lorakit.checkpoints.stored import rows_in_store

    rows = rows_in_store(home)
    for run in runs:
        if not any(row.run == run for row in rows):
            raise nothing_named(run)
    return [row for row in rows if every or row.run in runs]


def _print(rows: Sequence[Metadata]) -> None:
    print_table(HEAD, [_cells(row) for row in rows])
    unfinished = [row for row in rows if row.reason is not None]
    for row in unfinished[:REASONS]:
        note(f"{row.id} is {row.state}: {row.reason}")
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
