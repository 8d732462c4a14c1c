"""`lorakit mix`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json, weighted
from lorakit.errors import UsageError


@click.command("mix")
@click.argument("adapters", metavar="ADAPTER=WEIGHT...", nargs=-1, required=True)
@click.option("--out", type=click.Path(), help="The folder to write; it must not exist.")
@click.option("--method", default="linear", show_default=True, help="How; 'linear' is the weighted sum.")
@click.option("--rank", default="exact", show_default=True, metavar="exact|N", help="'exact' is the sum of the ranks.")
@click.option("--density", type=float, help="For methods that drop a share of the values.")
@click.option("--seed", type=int, help="For methods that draw at random.")
@dry_run_option
@json_option
def command(
    adapters: tuple[str, ...],
    out: str | None,
    method: str,
    rank: str,
    density: float | None,
    seed: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Mix adapters into one, exactly and without their base: any ranks, any modules.

    An adapter is a folder, a hub id, hub-id@revision or a name in the store; the same one twice adds up its weights.

    \b
    lorakit mix runs/sql/checkpoint-500=0.7 runs/chat=0.3 --out mixed
    """
    if out is None and not dry_run:
        raise UsageError("name the folder to write with --out, or ask for the report alone with --dry-run")
    pairs = [weighted(argument) for argument in adapters]
    options = {name: value for name, value in (("density", density), ("seed", seed)) if value is not None}
    from pathlib import Path

    from lorakit.files.folders import refuse_existing
    from lorakit.mix.mix import MixReport, mix

    if out is not None:
        refuse_existing(Path(out))
    mixed = mix(pairs, method=method, rank=int(rank) if rank.isdecimal() else rank, **options)
    if out is not None and not dry_run:
        mixed.save(out)
    report = cast(MixReport, mixed.report)
    result = {"out": out, "dry_run": dry_run, **report.as_dict()}
    if as_json:
        print_json(result)
    elif dry_run:
        _print_report(result, print)
    else:
        print(out)
        _print_report(result, note)
    for line in report.notes:
        note(f"note: {line}")


def _print_report(result: dict[str, Any], put: Callable[[str], None]) -> None:
    put(f"rank {result['rank']} on {result['modules']} modules, truncation error {result['truncation_error']:g}")
    for number, (adapter, row) in enumerate(zip(result["adapters"], result["cosines"], strict=True)):
        cosines = " ".join("-" if cosine is None else f"{cosine:+.3f}" for cosine in row[:number])
        put(
            f"{adapter['weight']:g} × {adapter['path']}  norm {adapter['norm']:.4g}"
            + (f"  cosine {cosines}" if number else "")
        )
