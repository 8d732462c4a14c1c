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
    """Have a running server serve the adapter at PATH, or a run's checkpoints, or a mix, as NAME.

    PATH is a folder on the server's machine, under one that it watches or was started with as --root. A NAME that
    exists gets a new revision and moves to it; what was served before stays there for `lorakit rollback`. A mix is
    written as a request's `model` is, and made again whenever an adapter in it moves. Prints the revision.

    \b
    lorakit load chat runs/chat
    lorakit load sql /data/adapters/sql --url http://10.0.0.7:8000
    lorakit load assistant 'mix(sql@best=0.7,chat=0.3)'
    """
    from lorakit.errors import NotFound
    from lorakit.server.mixes.text import OPENS

    server = server_at(url)
    mixed = path.startswith(OPENS)
    source = path if mixed or "://" in path else os.path.abspath(path)
    if dry_run:
        try:
            now = (server.mix if mixed else server.adapter)(name)["revision"]
        except NotFound:
            now = None
        would = f"would be {source}" if mixed else f"would be loaded from '{source}'"
        note(f"{name} {f'means {now}' if now else 'is not served'}, and {would}")
        if as_json:
            print_json({"dry_run": True, "name": name, "source": source, "revision": now})
        return
    told = (server.name_mix if mixed else server.load)(name, source)
    if as_json:
        print_json(told)
    else:
        print(told["revision"])
