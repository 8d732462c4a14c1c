"""`lorakit latest`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, print_json

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.checkpoints.metadata import Metadata


@click.command("latest")
@click.argument("run")
@json_option
def command(run: str, as_json: bool) -> None:
    """Print the path of a run's newest finished checkpoint, and nothing else.

    That is the one of the largest step; what the Trainer saved last into the run's own folder is newer than all. Where
    there is no folder RUN, it is one that the store knows. Ends with 3 when there is none.

    \b
    lorakit latest runs/sql
    lorakit merge "$(lorakit latest runs/sql)" --out merged
    """
    import os
    from pathlib import Path

    from lorakit.checkpoints.given_names import with_given_names
    from lorakit.checkpoints.metadata import metadata_of, newest_finished, stored_by_path
    from lorakit.store.store import default_home

    if not os.path.exists(run):
        row = _in_store(run, default_home())
        if as_json:
            print_json(row.as_dict())
        else:
            print(row.path)
        return
    found = newest_finished(Path(run))
    if as_json:
        row = metadata_of(found, stored_by_path(default_home()), with_digest=True)
        print_json(with_given_names([row])[0].as_dict())
    else:
        print(found.folder)


def _in_store(run: str, home: Path) -> Metadata:
    """Raises NotFound when the store has no such run, InvalidFile when what it has is damaged."""
    from lorakit.checkpoints.locate import content_of, find_stored, nothing_named
    from lorakit.checkpoints.stored import row_of

    stored = find_stored(f"{run}@latest", home)
    if stored is None:
        raise nothing_named(run)
    content_of(stored)
    return row_of(stored, home)
