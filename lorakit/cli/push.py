"""`lorakit push`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json
from lorakit.cli.tables import printable, size_in_words

if TYPE_CHECKING:
    from lorakit.checkpoints.moving.pushing import Pushed

_CARDS = {
    "made": "with a model card",
    "own": "with the checkpoint's own model card",
    "none": "and the repository's model card stays as it is",
    "theirs": "the repository's model card stays as somebody wrote it",
}


@click.command("push")
@click.argument("checkpoint", metavar="PATH|ID")
@click.argument("repository", metavar="HUB-ID")
@click.option("--create", is_flag=True, help="Make the repository, if there is none of that name.")
@click.option("--private", is_flag=True, help="With --create: a private one.")
@click.option("--message", help="Of the commit.")
@click.option("--all", "everything", is_flag=True, help="Also pickles, and what only a trainer needs to go on.")
@click.option("--unfinished", is_flag=True, help="Push a checkpoint that its writer is not done with, too.")
@dry_run_option
@json_option
def command(
    checkpoint: str, repository: str, create: bool, private: bool, message: str | None, everything: bool,
    unfinished: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put a checkpoint on the Hub in one commit, with a model card that says what it is and how it is loaded.

    A run stands for its newest finished checkpoint. Optimizer states and pickles stay here. With
    hf://OWNER/NAME/FOLDER it goes into that folder of the repository, whose card stays as it is. The login is that of
    `hf auth login`, or HF_TOKEN.

    \b
    lorakit push runs/sql/checkpoint-500 org/sql-lora --create --private
    lorakit push sql@best org/sql-lora --message 'The best one so far'
    """
    from lorakit.checkpoints.moving.pushing import push

    pushed = push(
        checkpoint, repository, private=private, create=create, message=message, everything=everything,
        unfinished=unfinished, dry_run=dry_run,
    )  # fmt: skip
    print_pushed(pushed, as_json)


def print_pushed(pushed: Pushed, as_json: bool) -> None:
    if as_json:
        print_json(pushed.as_dict())
    elif pushed.url is None:
        print("\n".join(printable(name) for name in pushed.files))
    else:
        print(pushed.url)
    for name, reason in pushed.left_out.items():
        note(f"left out: {printable(name)} ({reason})")
    base = pushed.checkpoint.base
    if base is not None and base.startswith(("/", ".")):
        note(f"note: its base is '{printable(base)}', a path that nobody else has: see adapter_config.json")
    done = "would be pushed to" if pushed.url is None else "pushed to"
    note(f"{len(pushed.files)} files, {size_in_words(pushed.bytes)}, {done} {pushed.repository}, {_CARDS[pushed.card]}")
