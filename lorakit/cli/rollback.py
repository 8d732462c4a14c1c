"""`lorakit rollback`."""

from __future__ import annotations

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, server_at, url_option
from lorakit.errors import NotFound


@click.command("rollback")
@click.argument("name")
@url_option
@dry_run_option
@json_option
def command(name: str, url: str, dry_run: bool, as_json: bool) -> None:
    """Have NAME mean what it meant before, from the next request on, and stay there.

    New checkpoints are taken in as ever, but NAME follows them again only after `lorakit alias NAME latest`. Prints the
    revision.

    \b
    lorakit rollback sql
    lorakit rollback sql --dry-run
    """
    server = server_at(url)
    if dry_run:
        known = server.adapter(name)
        if known["previous"] is None:
            raise NotFound(f"'{name}' has pointed at nothing else before, so there is nothing to roll back to")
        note(f"{name} means {known['revision']}, and would mean {known['previous']}")
        if as_json:
            print_json({"dry_run": True, "name": name, "from": known["revision"], "to": known["previous"]})
        return
    told = server.rollback(name)
    if as_json:
        print_json(told)
    else:
        print(told["revision"])
