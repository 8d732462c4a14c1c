"""`lorakit alias`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, server_at, url_option
from lorakit.errors import NotFound, UsageError

if TYPE_CHECKING:
    from lorakit.server.client import Client

_SHARE = re.compile(r":[\d.]+%?")


@click.command("alias")
@click.argument("alias", metavar="NAME[@ALIAS]")
@click.argument("revisions", metavar="REV", nargs=-1, required=True)
@url_option
@dry_run_option
@json_option
def command(alias: str, revisions: tuple[str, ...], url: str, dry_run: bool, as_json: bool) -> None:
    """Have NAME, or NAME@ALIAS, mean the revision REV from the next request on.

    REV is whatever names one: `step-500`, a digest, `best`, another alias. NAME then stays there; `latest` lets it
    follow its run again. Prints the revision.

    \b
    lorakit alias sql step-500
    lorakit alias sql@prod best
    lorakit alias sql latest
    """
    if len(revisions) > 1 or _SHARE.search(revisions[0]):
        raise UsageError("an alias means one revision as yet: give one REV, without a share of the requests")
    (revision,) = revisions
    name, separator, own = alias.partition("@")
    if not name or (separator and not own):
        raise UsageError(f"'{alias}' has to be NAME or NAME@ALIAS")
    server = server_at(url)
    if dry_run:
        before, after = _meaning(server, alias), server.meaning(f"{name}@{revision.removeprefix(f'{name}@')}")
        note(f"{alias} {f'means {before}' if before else 'means nothing yet'}, and would mean {after}")
        if as_json:
            print_json({"dry_run": True, "alias": alias, "from": before, "to": after})
        return
    told = server.point(name, own or name, revision)
    if as_json:
        print_json(told)
    else:
        print(told["aliases"][own or name])


def _meaning(server: Client, alias: str) -> str | None:
    try:
        return server.meaning(alias)
    except NotFound:
        return None
