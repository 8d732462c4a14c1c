"""`lorakit save`."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json
from lorakit.cli.tables import printable

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.training.requests import Receipt, Request

ABSENT = "is it training, with lorakit.training.SaveOnRequest among its callbacks?"


@click.command("save")
@click.argument("folder", metavar="RUN")
@click.option("--name", metavar="NAME", help="Call the checkpoint RUN/NAME besides, which keeps it from being pruned.")
@click.option("--reason", metavar="TEXT", help="Why, for whoever reads the request.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait so long for the checkpoint; without, ask only.",
)
@dry_run_option
@json_option
def command(
    folder: str, name: str | None, reason: str | None, wait: float | None, dry_run: bool, as_json: bool
) -> None:
    """Ask the run that is training to save now.

    The trainer has to run with lorakit.training.SaveOnRequest, and saves at the end of its current step. With --wait
    the checkpoint's path is printed, and nothing else; when nobody has answered in time the request is withdrawn, and
    the code is 1. Without, the request stays until a trainer answers, and its file is printed.

    \b
    lorakit save runs/sql --wait 300
    lorakit save runs/sql --name before-lr-drop --wait 300
    """
    from pathlib import Path

    from lorakit.errors import UsageError
    from lorakit.training.requests import ask, check_name, check_run

    if not folder:
        raise UsageError("no run is named: give the folder that the trainer writes its checkpoints into")
    if wait is not None and math.isnan(wait):
        raise UsageError("--wait nan: give seconds")
    run = Path(folder)
    if dry_run:
        check_run(run)
        if name is not None:
            check_name(run, name)
        _print_asked(run, None, as_json)
        return
    request = ask(run, name=name, reason=reason)
    if wait is None:
        _print_asked(run, request, as_json)
        return
    receipt = _waited(run, request, wait)
    path = os.path.join(folder, receipt.path)
    if receipt.note:
        note(f"note: {printable(receipt.note)}")
    if as_json:
        print_json({**asdict(receipt), "run": folder, "path": path})
    else:
        print(path)


def _print_asked(run: Path, request: Request | None, as_json: bool) -> None:
    """`request` is None when none was made."""
    from lorakit.training.requests import listener, request_file

    there = listener(run)
    file = None if request is None else str(request_file(run, request))
    if as_json:
        print_json({"run": str(run), "request": file, "listening": there})
    elif file is not None:
        print(file)
    state = "a trainer listens there" if there else f"no trainer listens there now: {ABSENT}"
    note(f"{'nothing was asked; ' if file is None else 'asked; '}{state}")


def _who(listener: dict[str, Any]) -> str:
    return f"process {listener.get('pid')} on {listener.get('host')}"


def _waited(run: Path, request: Request, wait: float) -> Receipt:
    """
    Raises:
        LorakitError: there was no answer in time; says what became of the request.
    """
    from lorakit.errors import LorakitError
    from lorakit.training.requests import listener, receipt_of, result_file, wait_for, withdraw

    try:
        receipt = wait_for(run, request, wait)
    except BaseException:
        withdraw(run, request)
        raise
    if receipt is not None:
        return receipt
    if withdraw(run, request):
        there = listener(run)
        why = (
            f"a trainer listens there ({printable(_who(there))}), but its step took longer"
            if there
            else f"none listens there: {ABSENT}"
        )
        raise LorakitError(f"no trainer of '{run}' answered within {wait:g} s; {why}; the request was withdrawn")
    receipt = receipt_of(run, request)
    if receipt is None:
        raise LorakitError(
            f"a trainer of '{run}' has taken the request up, but has not saved within {wait:g} s; "
            f"when it has, '{result_file(run, request)}' says where"
        )
    return receipt
