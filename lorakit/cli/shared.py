"""What several verbs take and print."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.tables import printable
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.server.client import Client


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--json", "as_json", is_flag=True, allow_from_autoenv=False, help="Print the result as JSON on stdout."
    )(function)


def dry_run_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")(function)


def url_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which running server to ask; `server_at` makes something of it."""
    return click.option(
        "--url", envvar="LORAKIT_URL", show_envvar=True, default="http://127.0.0.1:8000", show_default=True,
        help="A running server; its key is taken from LORAKIT_API_KEY.",
    )(function)  # fmt: skip


def server_at(url: str) -> Client:
    """Raises UsageError when it is no address."""
    from lorakit.server.client import Client

    return Client(url, os.environ.get("LORAKIT_API_KEY", ""))


def rank_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How the rank is chosen beside `--rank`, and how the file says it."""
    for option in (
        click.option(
            "--own-ranks/--one-rank", default=None,
            help="Each module with its own rank, which vLLM before 0.32 ignores (the default with --budget), or all "
            "padded to one.",
        ),
        click.option("--budget", metavar="PARAMS", help="As much as fits into so many parameters: 20M, 500k."),
        click.option("--energy", type=float, metavar="E", help="Keep this share of each module's squared norm: 0.99."),
    ):  # fmt: skip
        function = option(function)
    return function


def device_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]", help="Where to compute."
    )(function)


def count(said: str | None) -> int | None:
    """`20M` as 20,000,000; k, M and B are thousands, millions and thousands of millions.

    Raises:
        UsageError: it is no number of that form, or below 1.
    """
    if said is None:
        return None
    number, factor = (said[:-1], _FACTORS[said[-1]]) if said[-1:] in _FACTORS else (said, 1)
    try:
        value = int(float(number) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise UsageError(f"'{said}' is no number of parameters: write, for instance, 500k or 20M")
    return value


_FACTORS = {"k": 10**3, "K": 10**3, "m": 10**6, "M": 10**6, "b": 10**9, "B": 10**9}


def named_values(pairs: Iterable[str]) -> dict[str, Any]:
    """`["gamma=0.1", "majority_sign=frequency"]` as names with numbers or words.

    Raises:
        UsageError: one has no equals sign.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise UsageError(f"'{pair}': write NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def weighted(argument: str) -> tuple[str, float]:
    """Take `runs/sql=0.7` apart; without a weight it is 1. A folder's own name may hold an equals sign.

    Raises:
        UsageError: the weight is no finite number.
    """
    path, separator, weight = argument.rpartition("=")
    if not separator or os.path.isdir(argument) or "://" in argument:  # in an address it is part of a secret
        return argument, 1.0
    try:
        value = float(weight)
    except ValueError:
        raise UsageError(f"'{argument}': the weight '{weight}' is no number") from None
    if not path or not math.isfinite(value):
        raise UsageError(f"'{argument}': the weight has to be a finite number behind a path")
    return path, value


def print_json(value: Any) -> None:
    """In ASCII: a name may hold what a terminal obeys, or what has no place in UTF-8."""
    print(json.dumps(value, indent=2))


def note(message: str) -> None:
    """A word to the person, on stderr: stdout is for data. Names in it are anybody's."""
    print(printable(message), file=sys.stderr)


@contextmanager
def progress_bar(what: str, *, wanted: bool = True) -> Iterator[Callable[[int, int | None], None] | None]:
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
