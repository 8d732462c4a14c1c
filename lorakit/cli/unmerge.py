"""`lorakit unmerge`."""

from __future__ import annotations

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, progress_bar
from lorakit.errors import UsageError


@click.command("unmerge")
@click.argument("merged", type=click.Path())
@click.option("--out", type=click.Path(), help="The folder to write; it must not exist.")
@click.option(
    "--base",
    help="Where the base is. Left out: what `lorakit merge --undo` kept, else the base MERGED's lorakit.json names.",
)
@dry_run_option
@json_option
def command(merged: str, out: str | None, base: str | None, dry_run: bool, as_json: bool) -> None:
    """Give the base of a merged model back, bit for bit, or say why that can't be done.

    From MERGED itself where it was written by `lorakit merge --undo`; else from the base, if it is still the same.

    \b
    lorakit unmerge merged --out base
    """
    if out is None and not dry_run:
        raise UsageError("name the folder to write with --out, or ask for the plan alone with --dry-run")
    from lorakit.merge.unmerge import unmerge

    with progress_bar("unmerging", wanted=not (dry_run or as_json)) as progress:
        report = unmerge(merged, out, base, dry_run=dry_run, progress=progress)
    source = "what was kept of the difference" if report.how == "undo" else "a copy of the base"
    size = f"{report.tensors} tensors, {report.nbytes / 1e6:.1f} MB"
    if as_json:
        print_json(report.as_dict())
    elif dry_run:
        print(f"{size}, from {source}; nothing was written")
    else:
        print(report.out)
        note(f"{size}, from {source}, in {report.seconds:.1f} s; the identity is the base's ({report.identity})")
