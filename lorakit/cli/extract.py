"""`lorakit extract`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from lorakit.cli.ray_option import WithRay, data_alone, ray_option, where
from lorakit.cli.shared import (
    count,
    device_option,
    dry_run_option,
    json_option,
    note,
    print_json,
    progress_bar,
    rank_options,
)
from lorakit.errors import UsageError


@click.command("extract", cls=WithRay)
@click.argument("tuned")
@click.option("--base", help="Model folder or hub id that it was trained from. An adapter names it itself.")
@click.option("--out", type=click.Path(), help="The folder to write; it must not exist.")
@click.option(
    "--rank", type=int, metavar="N", help="The largest rank of any module: 64 where neither energy nor budget is given."
)
@rank_options
@click.option("--max-rank", type=int, metavar="N", help="With --energy or --budget: no module gets more [default: 256]")
@click.option(
    "--save-rest", is_flag=True, help="Keep what factors can't carry (norms, biases, …) whole; vLLM refuses it."
)
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Only these modules: '*.mlp.*', or q_proj; repeatable."
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="All modules but such.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random blocks that the SVDs start from.")
@device_option
@ray_option
@dry_run_option
@json_option
def command(
    tuned: str,
    base: str | None,
    out: str | None,
    rank: int | None,
    energy: float | None,
    budget: str | None,
    own_ranks: bool | None,
    max_rank: int | None,
    save_rest: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    seed: int,
    device: str,
    ray: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write what a full fine-tune changed in its base as an adapter, streamed, with what that loses, measured.

    TUNED is a model folder or a hub id; or an adapter of a kind that vLLM can't load (OFT, DoRA, …), to approximate.

    \b
    lorakit extract tuned --base base --rank 32 --out adapter
    lorakit extract tuned --base base --energy 0.95 --dry-run
    """
    if out is None and not dry_run:
        raise UsageError("name the folder to write with --out, or ask for the report alone with --dry-run")
    from lorakit.mix.extraction.extract import extract

    with data_alone(ray), progress_bar("extracting", wanted=not as_json) as progress:
        report = extract(
            tuned, base, out, rank=rank, energy=energy, budget=count(budget), max_rank=max_rank, own_ranks=own_ranks,
            save_rest=save_rest, include=include, exclude=exclude, device=device, seed=seed, dry_run=dry_run,
            ray=where(ray), progress=progress,
        )  # fmt: skip
    result = report.as_dict()
    if as_json:
        print_json(result)
    elif dry_run:
        _print_report(result, print)
    else:
        print(result["out"])
        _print_report(result, note)
    for line in report.notes:
        note(f"note: {line}")


def _print_report(result: dict[str, Any], put: Callable[[str], None]) -> None:
    for module in result["modules"]:
        put(
            f"{module['module']}  {module['shape']}  rank {module['rank']} ({module['stop']}){_size(module)}  "
            f"energy {module['energy']:.4f}  error {module['relative_error']:.2e}"
        )
    for change in result["uncarried"]:
        state = "saved whole" if change["saved"] else "not carried"
        put(f"{change['tensor']}  {change['shape']}  {state}: {change['reason']}{_size(change)}")
    error = result["relative_error"]
    said = "not known, as a vocabulary was resized" if error is None else f"{error:.2e}"
    put(
        f"rank {result['rank_kept']} at most on {len(result['modules'])} modules, {result['parameters']} parameters, "
        f"relative error {said}; {result['equal']} tensors are equal in both"
    )


def _size(change: dict[str, Any]) -> str:
    relative = change["relative_change"]
    return "" if relative is None else f"  change {relative:.2%}"
