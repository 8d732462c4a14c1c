"""`lorakit undelete`."""

from __future__ import annotations

import time

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json
from lorakit.cli.tables import print_table, size_in_words


@click.command("undelete")
@click.argument("references", metavar="[ID]...", nargs=-1)
@dry_run_option
@json_option
def command(references: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Put what `lorakit rm` removed back exactly where it was; without an ID, list what can be.

    ID is what rm said, its first letters, the name in the store, or the path that it had.

    \b
    lorakit undelete
    lorakit undelete 3fa9c1d2
    """
    from lorakit.store.store import default_home
    from lorakit.store.trash import find_trashed, refuse_lost, trashed_in, undelete

    home = default_home()
    if not references:
        found = trashed_in(home)
        if as_json:
            print_json([one.as_dict() for one in found])
        elif found:
            rows = [(one.uid[:8], one.name, size_in_words(one.size), _time(one.at), _time(one.until)) for one in found]
            print_table(("ID", "WHAT", "SIZE", "REMOVED", "UNTIL"), rows)
        else:
            note("the trash is empty")
        return
    wanted = {(one := find_trashed(reference, home)).uid: one for reference in references}
    refuse_lost(list(wanted.values()), home)
    for one in wanted.values():
        if not dry_run:
            undelete(one, home)
        note(f"{one.name} {'would be' if dry_run else 'is'} back")
    if as_json:
        print_json({"dry_run": dry_run, "back": [one.as_dict() for one in wanted.values()]})


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
