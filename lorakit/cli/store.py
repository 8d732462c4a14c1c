"""`lorakit store`."""

from __future__ import annotations

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, progress_bar
from lorakit.cli.tables import print_table, printable, size_in_words


@click.group("store")
def command() -> None:
    """Add to the store, verify it, clear it up, or say where it is. It is $LORAKIT_HOME.

    \b
    lorakit store add runs/sql/checkpoint-500
    lorakit store verify
    lorakit store gc --dry-run
    lorakit store path sql@latest
    """


@command.command("verify")
@json_option
@click.pass_context
def verify(context: click.Context, as_json: bool) -> None:
    """Read all that the store keeps, and compare it with its digests; ends with 4 when something is wrong.

    Folders without a database that knows them are wrong, too: it was lost.

    \b
    lorakit store verify --json
    """
    from lorakit.store.store import default_home
    from lorakit.store.verify import verify_store

    with progress_bar("verifying", wanted=not as_json) as progress:
        verified = verify_store(default_home(), progress)
    if as_json:
        print_json(verified.as_dict())
    else:
        for wrong in verified.wrong:
            print(printable(str(wrong)))
        if verified.unneeded:
            note(f"note: {len(verified.unneeded)} folders are needed by no record: `lorakit store gc` removes them")
        said = f"{len(verified.wrong)} wrong" if verified.wrong else "all as they were kept"
        note(f"{verified.contents} contents ({size_in_words(verified.size)}): {said}")
    if verified.wrong:
        context.exit(4)


@command.command("gc")
@click.option(
    "--older-than", metavar="TIME", default="7d", show_default=True, help="Of the trash: 36h, 7d; 0s for all of it."
)
@dry_run_option
@json_option
@click.pass_context
def gc(context: click.Context, older_than: str, dry_run: bool, as_json: bool) -> None:
    """Delete for good what has been in the trash for long, and content that no record needs.

    What a killed command left half written goes whenever the store is opened. Ends with 1 when something stays that
    should go, and says why.

    \b
    lorakit store gc --dry-run
    lorakit store gc --older-than 0s
    """
    from lorakit.checkpoints.amounts import seconds
    from lorakit.store.garbage import clear, find_garbage
    from lorakit.store.store import default_home

    age = 0.0 if older_than.strip() in ("0", "0s", "0d") else seconds(older_than)
    garbage, left = find_garbage(default_home(), older_than=age), list[str]()
    if not dry_run:
        garbage, left = clear(garbage)
    if as_json:
        print_json({"dry_run": dry_run, "bytes": garbage.size, "cleared": garbage.as_list(), "left": left})
    else:
        rows = [(one["what"], one["name"], size_in_words(one["size"])) for one in garbage.as_list()]
        if rows:
            print_table(("WHAT", "NAME", "FREES"), rows)
        for said in left:
            note(f"note: {said}")
        note(f"{size_in_words(garbage.size)} {'would be' if dry_run else 'are'} freed")
    if left:
        context.exit(1)


@command.command("add")
@click.argument("path", metavar="PATH")
@click.option("--run", metavar="NAME", help="What its run is called in the store; as the run's folder without.")
@dry_run_option
@json_option
def add(path: str, run: str | None, dry_run: bool, as_json: bool) -> None:
    """Copy a finished checkpoint into the store, and print its ID, and nothing else.

    PATH may be a run, for its newest finished checkpoint. The same one again has the same ID.

    \b
    lorakit store add runs/sql/checkpoint-500
    lorakit store add runs/sql --run sql-2
    """
    import os

    from lorakit.checkpoints.adding import add_checkpoint, to_add
    from lorakit.checkpoints.locate import checkpoint_folder
    from lorakit.checkpoints.stored import row_of
    from lorakit.errors import NotFound
    from lorakit.store.store import default_home

    if not os.path.lexists(path):
        raise NotFound(f"there is no folder or file '{path}'")
    addition = to_add(checkpoint_folder(path), run)
    if dry_run:
        note(f"would keep '{addition.path}'")
        print_json({"dry_run": True, **addition.as_dict()}) if as_json else print(addition.name)
        return
    home = default_home()
    kept = add_checkpoint(addition, home)
    print_json(row_of(kept, home).as_dict()) if as_json else print(kept.id)


@command.command("path")
@click.argument("reference", metavar="[ID]", required=False)
@json_option
def path(reference: str | None, as_json: bool) -> None:
    """Print where the store is, or the folder of one of its checkpoints, and nothing else.

    \b
    cd "$(lorakit store path sql@best)"
    """
    from lorakit.store.store import default_home
    from lorakit.store.trash import folder_of

    home = default_home()
    found = home if reference is None else folder_of(reference, home)
    print_json({"path": str(found)}) if as_json else print(found)
