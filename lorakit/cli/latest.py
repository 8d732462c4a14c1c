"""`lorakit latest`."""

from __future__ import annotations

import click

from lorakit.cli.shared import json_option, print_json


@click.command("latest")
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Print the path of a run's newest finished checkpoint, and nothing else.

    That is the one of the largest step; what the Trainer saved last into the run's own folder is newer than all.
    Ends with 3 when there is none.

    \b
    lorakit latest runs/sql
    lorakit merge "$(lorakit latest runs/sql)" --out merged
    """
    from pathlib import Path

    from lorakit.checkpoints.metadata import metadata_of, newest_finished, stored_by_path
    from lorakit.store.store import default_home

    found = newest_finished(Path(run))
    if as_json:
        print_json(metadata_of(found, stored_by_path(default_home()), with_digest=True).as_dict())
    else:
        print(found.folder)
