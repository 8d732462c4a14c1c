"""`lorakit unload`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, server_at, url_option
from lorakit.cli.tables import printable
from lorakit.errors import NotFound, UsageError

if TYPE_CHECKING:
    from lorakit.server.client import Client


@click.command("unload")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@url_option
@dry_run_option
@json_option
@click.pass_context
def command(context: click.Context, name: str, yes: bool, url: str, dry_run: bool, as_json: bool) -> None:
    """Have a running server forget NAME, an adapter or a mix: its revisions leave the engine and the server's store.

    Requests in flight are answered first; those that come later get 404. What lies in the trainer's folder stays there.

    \b
    lorakit unload chat
    lorakit unload chat --yes --json
    """
    if not (yes or dry_run) and (as_json or not sys.stdin.isatty()):
        raise UsageError("unloading asks first, and there is nobody to ask: give --yes, or --dry-run to see what goes")
    server = server_at(url)
    if dry_run or not yes:
        gone = _going(server, name)
        said = ", ".join(gone) or "no revision"
        if dry_run:
            note(f"{name} would be forgotten, with {said}")
            if as_json:
                print_json({"dry_run": True, "name": name, "revisions": gone})
            return
        if not click.confirm(f"Forget {printable(name)}, with {printable(said)}?", err=True):
            note("nothing was unloaded")
            context.exit(1)
    told = _forget(server, name)
    note(f"{name} is no longer served")
    if as_json:
        print_json(told)


def _going(server: Client, name: str) -> list[str]:
    """The revisions of an adapter, or of a mix, of this name.

    Raises:
        NotFound: there is neither.
    """
    try:
        return [one["id"] for one in server.adapter(name)["revisions"] if one["id"]]
    except NotFound as error:
        return [_of_mix(error, server.mix, name)["revision"]]


def _forget(server: Client, name: str) -> dict[str, Any]:
    try:
        return server.unload(name)
    except NotFound as error:
        return _of_mix(error, server.forget_mix, name)


def _of_mix(error: NotFound, ask: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    """What a mix of that name gives; `error` where there is none either."""
    try:
        return ask(name)
    except NotFound:
        raise error from None
