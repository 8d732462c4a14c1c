"""`lorakit shrink`."""

from __future__ import annotations

from typing import cast

import click

from lorakit.cli.shared import count, dry_run_option, json_option, rank_options
from lorakit.errors import UsageError


@click.command("shrink")
@click.argument("adapter")
@click.option("--out", type=click.Path(), help="The folder to write; it must not exist.")
@click.option("--rank", type=int, metavar="N", help="The largest rank of any module.")
@rank_options
@click.option("--base", help="For adapters (VeRA, MiSS) whose files don't say how large a layer is.")
@dry_run_option
@json_option
def command(
    adapter: str,
    out: str | None,
    rank: int | None,
    energy: float | None,
    budget: str | None,
    own_ranks: bool | None,
    base: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Give an adapter a smaller rank: the best there is, with what it lost, measured.

    \b
    lorakit shrink runs/sql/checkpoint-500 --rank 8 --out small
    lorakit shrink runs/sql/checkpoint-500 --energy 0.99 --out small
    """
    if out is None and not dry_run:
        raise UsageError("name the folder to write with --out, or ask for the report alone with --dry-run")
    from pathlib import Path

    from lorakit.adapters.report import MixReport
    from lorakit.cli.mix import print_mix
    from lorakit.files.folders import refuse_existing
    from lorakit.mix.shrink import shrink

    if out is not None:
        refuse_existing(Path(out))
    small = shrink(adapter, rank=rank, energy=energy, budget=count(budget), own_ranks=own_ranks, base=base)
    if out is not None and not dry_run:
        small.save(out)
    print_mix({"out": out, "dry_run": dry_run, **cast(MixReport, small.report).as_dict()}, as_json)
