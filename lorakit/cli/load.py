"""`lorakit load`."""

from __future__ import annotations

import os

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, server_at, url_option


@click.command("load")
@click.argument("name")
@click.argument("path")
@url_option
@dry_run_option
@json_option
def command(name: str, path: str, url: str, dry_run: bool, as_json: bool) -> None:
    """Have a running server serve the adapter at PATH, or a run's checkpoints, as NAME.

    PATH is a folder on the server's machine, under one that it watches or was started with as --root. A NAME that
    exists gets a new revision and moves to it; what was served before stays there for `lorakit rollback`. Prints the
    revision.

    \b
    lorakit load chat runs/chat
    lorakit load sql /data/adapters/sql --url http://10.0.0.7:8000
    """
    from lorakit.errors import NotFound

    server = server_at(url)
    source = path if "://" in path else os.path.abspath(path)
    if dry_run:
        try:
            now = server.adapter(name)["revision"]
        except NotFound:
            now = None
        note(f"{name} {f'means {now}' if now else 'is not served'}, and would be loaded from '{source}'")
        if as_json:
            print_json({"dry_run": True, "name": name, "source": source, "revision": now})
        return
    told = server.load(name, source)
    if as_json:
        print_json(told)
    else:
        print(told["revision"])
