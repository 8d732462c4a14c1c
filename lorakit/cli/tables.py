"""Tables and names on a terminal, or in a file."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Names to the left, numbers to the right; a table on a terminal, plain columns elsewhere."""
    cells = [[printable(cell) for cell in row] for row in rows]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(head))]
    if sys.stdout.isatty():
        _print_rich_table(head, cells, right)
        return
    widths = [max(len(row[i]) for row in (head, *cells)) for i in range(len(head))]
    for row in (head, *cells):
        padded = [f"{cell:{'>' if right[i] else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        print("  ".join(padded).rstrip())


def _print_rich_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, number in zip(head, right, strict=True):
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"-|[-+]?[\d.]+(e[-+]?\d+)?%?|nan|inf", cell))


def size_in_words(count: int) -> str:
    """Bytes, as `4.1 MB`."""
    unit, scale = next(((name, scale) for name, scale in (("GB", 1e9), ("MB", 1e6)) if count >= scale), ("kB", 1e3))
    return f"{count / scale:.1f} {unit}"


def printable(text: str) -> str:
    """With what a terminal would obey, or could not show, written out: names in files are anybody's."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
