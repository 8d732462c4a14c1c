"""`lorakit mix`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import click

from lorakit.cli.mix_search import mix_by_search, refuse_without_search, search_options
from lorakit.cli.shared import (
    count,
    device_option,
    dry_run_option,
    json_option,
    named_values,
    note,
    print_json,
    rank_options,
    weighted,
)
from lorakit.errors import NotFound, UsageError


@click.command("mix")
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@click.option("--out", type=click.Path(), help="The folder to write; it must not exist.")
@click.option("--method", default="linear", show_default=True, help="One of `lorakit methods`; 'linear' is the sum.")
@click.option("--rank", metavar="exact|N", help="'exact', the default, loses nothing; N keeps the best N directions.")
@rank_options
@click.option(
    "--base", help="For adapters (VeRA, MiSS) whose files don't say how large a layer is; what --search merges into."
)
@click.option("--density", type=float, help="The share of values to keep, for methods that drop some.")
@click.option("--seed", type=int, help="For methods that draw at random, and for --search.")
@click.option("--option", "-o", "more", multiple=True, metavar="NAME=VALUE", help="Another option of the method.")
@click.option("--weights", type=click.Path(), metavar="FILE", help="JSON: adapter -> {pattern of modules: weight}.")
@click.option(
    "--trained", type=click.Choice(["refuse", "average"]), default="refuse", show_default=True,
    help="What to do with trained copies of the base's values (modules_to_save, token rows, biases).",
)  # fmt: skip
@click.option("--keep-stages", type=click.Path(), metavar="DIR", help="Write what each step gives there, as adapters.")
@search_options
@device_option
@dry_run_option
@json_option
def command(
    adapters: tuple[str, ...],
    out: str | None,
    method: str,
    rank: str | None,
    energy: float | None,
    budget: str | None,
    own_ranks: bool | None,
    base: str | None,
    density: float | None,
    seed: int | None,
    more: tuple[str, ...],
    weights: str | None,
    trained: str,
    keep_stages: str | None,
    device: str,
    dry_run: bool,
    as_json: bool,
    **searching: Any,
) -> None:
    """Mix adapters into one without their base: any ranks, any modules. Exact, unless a rank is asked for.

    An adapter is a folder, a hub id, hub-id@revision or a name in the store; the same one twice adds up its weights.

    \b
    lorakit mix runs/sql/checkpoint-500=0.7 runs/chat=0.3 --out mixed
    lorakit mix runs/sql=0.7 runs/chat=0.3 --rank 16 --out mixed
    lorakit mix runs/sql runs/chat --method ties --density 0.2 --rank 32 --out mixed
    lorakit mix runs/sql runs/chat --search score.py --evaluations 40 --out best
    """
    if out is None and not dry_run:
        raise UsageError("name the folder to write with --out, or ask for the report alone with --dry-run")
    pairs = _by_module([weighted(argument) for argument in adapters], weights)
    options = {name: value for name, value in (("density", density), ("seed", seed)) if value is not None}
    options |= named_values(more)
    from pathlib import Path

    from lorakit.adapters.report import MixReport
    from lorakit.files.folders import refuse_existing
    from lorakit.mix.mix import mix
    from lorakit.mix.stages import mix_in_stages

    if out is not None:
        refuse_existing(Path(out))
    settings: dict[str, Any] = {
        "method": method, "rank": rank, "energy": energy, "budget": count(budget), "own_ranks": own_ranks,
        "base": base, "trained": trained, "device": device, **options,
    }  # fmt: skip
    if searching["search"] is not None:
        if weights is not None or keep_stages is not None:
            raise UsageError("a search finds one weight for each adapter: leave out --weights and --keep-stages")
        mix_by_search(adapters, out, searching, settings, dry_run=dry_run, as_json=as_json)
        return
    refuse_without_search(searching)
    staged = keep_stages is not None and not dry_run
    mixed = mix_in_stages(pairs, Path(str(keep_stages)), **settings) if staged else mix(pairs, **settings)
    if out is not None and not dry_run:
        mixed.save(out)
    report = cast(MixReport, mixed.report)
    print_mix({"out": out, "dry_run": dry_run, **report.as_dict()}, as_json)


def print_mix(result: Mapping[str, Any], as_json: bool) -> None:
    """The folder on stdout and the report on stderr; a dry run's report on stdout."""
    if as_json:
        print_json(result)
    elif result["dry_run"]:
        _print_report(result, print)
    else:
        print(result["out"])
        _print_report(result, note)
    for line in result["notes"]:
        note(f"note: {line}")


def _by_module(pairs: list[tuple[str, float]], file: str | None) -> list[tuple[str, float | dict[str, float]]]:
    """Weights by pattern, for the adapters that the file names."""
    if file is None:
        return list(pairs)
    from pathlib import Path

    from lorakit.files.folders import read_json

    if not Path(file).is_file():
        raise NotFound(f"there is no file '{file}' with weights")
    said = read_json(Path(file))
    unknown = said.keys() - {adapter for adapter, _ in pairs}
    if unknown:
        raise UsageError(f"'{file}' gives weights to '{min(unknown)}', which is none of the adapters: name them alike")
    twice = next((adapter for adapter, weight in pairs if adapter in said and weight != 1), None)
    if twice is not None:
        raise UsageError(f"'{twice}' has a weight of its own, and another in '{file}': give one")
    for adapter, weights in said.items():
        values = weights.values() if isinstance(weights, dict) else [weights]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            raise UsageError(f"'{file}': the weight of '{adapter}' is neither a number nor patterns with numbers")
    return [(adapter, said.get(adapter, weight)) for adapter, weight in pairs]


def _print_report(result: Mapping[str, Any], put: Callable[[str], None]) -> None:
    put(f"rank {result['rank']} on {result['modules']} modules, truncation error {result['truncation_error']:g}")
    for number, (adapter, row) in enumerate(zip(result["adapters"], result["cosines"], strict=True)):
        cosines = " ".join("-" if cosine is None else f"{cosine:+.3f}" for cosine in row[:number])
        weight = adapter["weight"]
        shown = "by module" if isinstance(weight, Mapping) else f"{weight:g}"
        put(
            f"{shown} × {adapter['path']}  norm {adapter['norm']:.4g}"
            + (f"  cosine {cosines}" if number else "")
        )  # fmt: skip
    worst = sorted(result["by_module"].items(), key=lambda item: -item[1]["truncation_error"])[:3]
    for module, report in worst:
        if report["truncation_error"] > 0:
            put(f"  {module}: rank {report['rank']}, truncation error {report['truncation_error']:.3g}")
