"""`lorakit compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option

if TYPE_CHECKING:
    from lorakit.mix.compare import CompareReport, Relation

SHOWN = 10
_HEAD = ("cosine", "writes", "reads", "on 1st", "on 2nd")


@click.command("compare")
@click.argument("first", metavar="ADAPTER")
@click.argument("others", metavar="ADAPTER...", nargs=-1, required=True)
@click.option(
    "--modules",
    default="*",
    metavar="PATTERN",
    help="Only these: '*.layers.0.*' as a shell would, q_proj as the end of a path.",
)
@click.option(
    "--plot", type=click.Path(), metavar="FILE.png", help="Write a heat map of the cosines; needs matplotlib."
)
@json_option
def command(first: str, others: tuple[str, ...], modules: str, plot: str | None, as_json: bool) -> None:
    """Say how adapters lie to one another, before they are mixed: exactly, from their factors alone.

    \b
    cosine   of the two deltas: near 0 they leave each other alone, below 0 they undo each other
    writes   overlap of what they write to, from 0 to 1    reads   of what they read from
    on 1st   by how much the second changes, relative to it, what the first adds on the inputs that it reads
    on 2nd   the other way round

    \b
    lorakit compare runs/sql/checkpoint-500 runs/chat
    lorakit compare sql chat code --modules '*.mlp.*' --plot cosines.png
    """
    from lorakit.cli import plots
    from lorakit.mix.compare import compare

    plots.tell(lambda: compare(first, *others, modules=modules), _print, plots.cosine_map, plot, as_json=as_json)


def _print(report: CompareReport) -> None:
    from lorakit.cli.tables import print_table

    norms = enumerate(zip(report.adapters, report.norms, strict=True), 1)
    print_table(("", "adapter", "norm"), [(str(number), path, f"{norm:.4g}") for number, (path, norm) in norms])
    print()
    rows = []
    for pair in report.pairs:
        every = len(pair.modules) + len(pair.only_first) + len(pair.only_second)
        shared = f"{len(pair.modules)} of {every}"
        rows.append((f"{pair.first + 1} and {pair.second + 1}", *_cells(pair.overall), shared))
    print_table(("pair", *_HEAD, "shared modules"), rows)
    found = sorted(
        ((pair, module, relation) for pair in report.pairs for module, relation in pair.worst_modules()[:SHOWN]),
        key=lambda item: -item[2].worst,
    )
    if found:
        print("\nwhere they interfere most")
        rows = [
            (f"{pair.first + 1} and {pair.second + 1}", *_cells(relation), module)
            for pair, module, relation in found[:SHOWN]
        ]
        print_table(("pair", *_HEAD, "module"), rows)


def _cells(relation: Relation) -> tuple[str, ...]:
    numbers = (relation.column_overlap, relation.row_overlap, *relation.interference)
    cosine = "-" if relation.cosine is None else f"{relation.cosine:+.3f}"
    return cosine, *("-" if number is None else f"{number:.3f}" for number in numbers)
