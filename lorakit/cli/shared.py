"""What several verbs take and print."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import click

from lorakit.errors import UsageError


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")(function)


def dry_run_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")(function)


def weighted(argument: str) -> tuple[str, float]:
    """Take `runs/sql=0.7` apart; without a weight it is 1.

    Raises:
        UsageError: the weight is no finite number.
    """
    path, separator, weight = argument.rpartition("=")
    if not separator:
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
