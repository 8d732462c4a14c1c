"""`lorakit export`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, progress_bar
from lorakit.cli.tables import printable, size_in_words

if TYPE_CHECKING:
    from lorakit.checkpoints.moving.exporting import Exported


@click.command("export")
@click.argument("checkpoint", metavar="PATH|ID")
@click.argument("destination", metavar="DEST")
@click.option("--unfinished", is_flag=True, help="Export a checkpoint that its writer is not done with, too.")
@dry_run_option
@json_option
def command(checkpoint: str, destination: str, unfinished: bool, dry_run: bool, as_json: bool) -> None:
    """Copy a checkpoint to a folder, an archive, a bucket or the Hub, with the digest of every file.

    PATH|ID is a folder or file, a run (its newest finished checkpoint), or a name in the store. DEST is a path,
    s3://…, gs://…, file://… or hf://OWNER/NAME[/FOLDER]; what ends in .tar, .tar.gz, .tar.zst or .zip becomes such
    an archive. It must not exist. The files are written as they are, and last of all lorakit.sha256, which
    `sha256sum --check` reads; on the Hub, it is as `lorakit push` does it. Empty folders and the modes of files are not
    kept, nor their times in a bucket or on the Hub.

    \b
    lorakit export runs/sql/checkpoint-500 s3://models/sql/checkpoint-500
    lorakit export sql@best sql.tar.gz
    """
    from lorakit.checkpoints.moving.exporting import export, plan_export

    if destination.startswith("hf://"):
        from lorakit.checkpoints.moving.pushing import push
        from lorakit.cli.push import print_pushed

        print_pushed(push(checkpoint, destination, unfinished=unfinished, dry_run=dry_run), as_json)
        return
    if dry_run:
        exported = plan_export(checkpoint, destination, unfinished=unfinished)
    else:
        with progress_bar("exporting", wanted=not as_json) as progress:
            exported = export(checkpoint, destination, unfinished=unfinished, progress=progress)
    if as_json:
        print_json(exported.as_dict())
    elif dry_run:
        print("\n".join(printable(name) for name in exported.files))
    else:
        print(exported.destination)
    _say(exported, dry_run)


def _say(exported: Exported, dry_run: bool) -> None:
    count = f"{len(exported.files)} file{'s' * (len(exported.files) != 1)}, {size_in_words(exported.bytes)}"
    if dry_run:
        note(f"{count}, would go to '{printable(exported.destination)}'; nothing was written")
        return
    digest = "" if exported.sha256 is None else f"; sha256 of the archive: {exported.sha256}"
    note(f"exported {count} in {exported.seconds:.1f} s{digest}")
