"""What several verbs take and print."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from lorakit.errors import UsageError


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(function)


def dry_run_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")(function)


def weighted(argument: str) -> tuple[str, float]:
    """Take `runs/sql=0.7` apart; without a weight it is 1. A folder's own name may hold an equals sign.

    Raises:
        UsageError: the weight is no finite number.
    """
    path, separator, weight = argument.rpartition("=")
    if not separator or os.path.isdir(argument):
        return argument, 1.0
    try:
        value = float(weight)
    except ValueError:
        raise UsageError(f"'{argument}': the weight '{weight}' is no number") from None
    if not path or not math.isfinite(value):
        raise UsageError(f"'{argument}': the weight has to be a finite number behind a path")
    return path, value


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(message: str) -> None:
    """A word to the person, on stderr: stdout is for data."""
    print(message, file=sys.stderr)


@contextmanager
def progress_bar(what: str, *, wanted: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes per second on stderr; None where stderr is no terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
