"""Tables and names on a terminal, or in a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Names to the left, numbers to the right; a table on a terminal, plain columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(rich_table(head, rows))
        return
    cells = [[printable(cell) for cell in row] for row in rows]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(head))]
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    for row in (head, *cells):
        padded = [f"{cell:{'>' if right[i] else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        print("  ".join(padded).rstrip())


def rich_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The same for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[printable(cell) for cell in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        right = all(_is_number(row[number]) for row in cells)
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-|[-+]?[\d.]+(e[-+]?\d+)?%?|nan|inf", cell))


def percent(share: float) -> str:
    """A share of 1, as `5%`."""
    return f"{100 * share:.4g}%"


def size_in_words(count: int) -> str:
    """Bytes, as `4.1 MB`."""
    unit, scale = next(((name, scale) for name, scale in (("GB", 1e9), ("MB", 1e6)) if count >= scale), ("kB", 1e3))
    return f"{count / scale:.1f} {unit}"


def printable(text: str) -> str:
    """With what a terminal would obey, or could not show, written out: names in files are anybody's."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
