"""The tree of what a folder was made of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lorakit.cli.tables import printable

if TYPE_CHECKING:
    from rich.tree import Tree

    from lorakit.mix.lineage import Lineage

_STATES = {
    "gone": "gone", "changed": "changed since", "above": "told of above", "deeper": "its own parents are left out",
    "unsaved": "never saved",
}  # fmt: skip


def print_tree(lineage: Lineage) -> None:
    if not sys.stdout.isatty():
        print("\n".join(_lines(lineage)))
        return
    from rich.console import Console

    Console().print(_rich_tree(lineage), soft_wrap=True)


def _lines(lineage: Lineage) -> Iterator[str]:
    yield _label(lineage)
    for number, parent in enumerate(lineage.parents, 1):
        last = number == len(lineage.parents)
        first, *rest = _lines(parent)
        yield f"{'└── ' if last else '├── '}{first}"
        for line in rest:
            yield f"{'    ' if last else '│   '}{line}"


def _rich_tree(lineage: Lineage) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    style = "red" if lineage.state in ("gone", "changed") else "dim" if lineage.state in ("above", "deeper") else ""
    tree = Tree(Text(_label(lineage), style=style))
    tree.children.extend(_rich_tree(parent) for parent in lineage.parents)
    return tree


def _label(lineage: Lineage) -> str:
    weight = "" if lineage.weight is None else f"{lineage.weight:g} × "
    role = "base " if lineage.role == "base" else ""
    said = [lineage.operation] if lineage.operation else []
    if lineage.operation and "method" in lineage.settings:
        said.append(str(lineage.settings["method"]))
    if lineage.rank is not None:
        said.append(f"rank {lineage.rank}")
    if lineage.error:
        said.append(f"error {lineage.error:.3g}")
    said += [*lineage.parts, *([_STATES[lineage.state]] if lineage.state in _STATES else [])]
    name = f"{weight}{role}{lineage.path or lineage.operation}"
    return printable(f"{name}  ({', '.join(said)})" if said else name)
