"""`lorakit rm`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json
from lorakit.cli.tables import printable, size_in_words
from lorakit.errors import LorakitError, UsageError

if TYPE_CHECKING:
    from lorakit.checkpoints.removal import Removal
    from lorakit.store.trash import Trashed


@click.command("rm")
@click.argument("references", metavar="ID|PATH...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Also what an alias or a link points at, and what is not finished yet.")
@click.option("--purge", is_flag=True, help="For good, not into the trash: this frees the disk at once.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@json_option
@click.pass_context
def command(
    context: click.Context, references: tuple[str, ...], force: bool, purge: bool, yes: bool, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Move checkpoints to the trash: by a path in a run, or by an id of the store.

    They can be taken back for 7 days with `lorakit undelete`; what is older goes for good at the next rm, or with
    `lorakit store gc`. What a running server may be asked for is refused. All are looked at before any goes; should one
    of them fail even so, the others go, and it ends with that one's exit code.

    \b
    lorakit rm runs/sql/checkpoint-500
    lorakit rm sql@step-500-3fa9c1d2 chat@latest --yes
    """
    if not (yes or dry_run) and (as_json or not sys.stdin.isatty()):
        raise UsageError("removing asks first, and there is nobody to ask: give --yes, or --dry-run to see what goes")
    from lorakit.checkpoints.removal import execute_removal, plan_removal
    from lorakit.store.garbage import clear_expired
    from lorakit.store.store import default_home

    home = default_home()
    plans = [plan_removal(reference, home, force=force, at_once=purge) for reference in references]
    removals = list({plan.what: plan for plan in plans}.values())
    if dry_run:
        for removal in removals:
            note(f"{removal.name} ({size_in_words(removal.size)}) would go")
        if as_json:
            _print([(removal, None) for removal in removals], {}, dry_run)
        return
    if not yes and not click.confirm(_question(removals, for_good=purge), err=True):
        note("nothing was removed")
        context.exit(1)
    done: list[tuple[Removal, Trashed | None]] = []
    failed: dict[str, LorakitError | OSError] = {}
    for removal in removals:
        try:
            done.append((removal, execute_removal(removal, home, force=force, at_once=purge)))
            _say(*done[-1])
        except (LorakitError, OSError) as error:
            failed[removal.name] = error
            note(f"error: {removal.name}: {error}")
    for left in clear_expired(home):
        note(f"note: {left}")
    if as_json:
        _print(done, failed, dry_run)
    if failed:
        context.exit(next(getattr(error, "code", 1) for error in failed.values()))


def _question(removals: list[Removal], *, for_good: bool) -> str:
    names = ", ".join(printable(removal.name) for removal in removals)
    size = size_in_words(sum(removal.size for removal in removals))
    return f"{'Remove for good' if for_good else 'Move to the trash'}: {names} ({size})?"


def _say(removal: Removal, trashed: Trashed | None) -> None:
    what = f"{removal.name} ({size_in_words(removal.size)})"
    if trashed is None:
        note(f"{what} is gone for good")
    else:
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(trashed.until))
        note(f"{what} is in the trash until {until}: lorakit undelete {trashed.uid[:8]}")


def _print(
    done: list[tuple[Removal, Trashed | None]], failed: Mapping[str, LorakitError | OSError], dry_run: bool
) -> None:
    removed = []
    for removal, trashed in done:
        uid, until = (trashed.uid, trashed.until) if trashed else (None, None)
        removed.append({"name": removal.name, "size": removal.size, "uid": uid, "until": until})
    reasons = [{"name": name, "reason": str(error)} for name, error in failed.items()]
    print_json({"dry_run": dry_run, "removed": removed, "failed": reasons})
