"""`lorakit pull`."""

from __future__ import annotations

from pathlib import Path

import click

from lorakit.cli.shared import dry_run_option, json_option, progress_bar


@click.command("pull")
@click.argument("repository", metavar="HUB-ID[@REVISION]")
@click.option("--out", type=click.Path(), help="The folder to write; it must not exist [the repository's name].")
@dry_run_option
@json_option
def command(repository: str, out: str | None, dry_run: bool, as_json: bool) -> None:
    """Fetch a repository of the Hub into a folder: every file of one commit, and say what it is.

    It goes through huggingface_hub's cache, with its login (`hf auth login`, HF_TOKEN).

    \b
    lorakit pull org/sql-lora
    lorakit pull org/sql-lora@v1.0 --out sql
    """
    from lorakit.checkpoints.moving.addresses import hub_address
    from lorakit.checkpoints.moving.fetching import fetch, plan_fetch
    from lorakit.cli.fetch import print_fetched, print_plan, say_fetched

    address = hub_address(repository)
    target = Path(out or address.name)
    if dry_run:
        print_plan(plan_fetch(address, target), as_json)
        return
    with progress_bar("copying", wanted=not as_json) as progress:
        fetched = fetch(address, target, with_digest=as_json, progress=progress)
    say_fetched(fetched)
    print_fetched(fetched, as_json, {})
