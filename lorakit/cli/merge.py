"""`lorakit merge`."""

from __future__ import annotations

from typing import Any

import click

from lorakit.cli.ray_option import WithRay, data_alone, ray_option, where
from lorakit.cli.shared import device_option, dry_run_option, json_option, note, print_json, progress_bar, weighted
from lorakit.errors import UsageError


@click.command("merge", cls=WithRay)
@click.argument("adapters", metavar="ADAPTER[=WEIGHT]...", nargs=-1, required=True)
@click.option("--base", help="Model folder or hub id. Left out: the one that the adapter's config names.")
@click.option("--out", type=click.Path(), help="The folder to write; it must not exist.")
@device_option
@click.option(
    "--dtype", type=click.Choice(["keep", "bf16", "fp16", "fp32"]), default="keep", show_default=True,
    help="What float tensors are written as.",
)  # fmt: skip
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="stochastic keeps the mean of changes that are too small for the dtype.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="For stochastic rounding.")
@click.option(
    "--onto",
    type=click.Choice(["original", "dequantised", "same"]),
    help="For a quantised base: merge onto its 16-bit original (named with --base), onto the values it has (what QLoRA "
    "trained on; written in 16 bit), or onto those and quantise again.",
)
@click.option(
    "--quantize",
    type=click.Choice(["fp8", "int8", "w4a16"]),
    help="Write linear layers quantised, rounded to nearest, as vLLM loads them.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Cut the result into shards of at most this, as 5GB.")
@click.option(
    "--expert-layout",
    type=click.Choice(["peft", "peft-0.18", "unsloth"]),
    help="How an adapter packs the factors of fused experts, where it doesn't say so itself.",
)
@click.option(
    "--residual", type=click.Path(), metavar="DIR",
    help="Write what rounding to 16 bit loses as a small adapter of the result, for PEFT and vLLM.",
)  # fmt: skip
@click.option("--undo", is_flag=True, help="Keep beside the result what `lorakit unmerge` needs without the base.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted merge of the same left behind.")
@click.option("--push-to-hub", metavar="REPO", help="Upload the result, once it is whole, with the login of `hf auth`.")
@click.option("--private", is_flag=True, help="With --push-to-hub: a new repository is private.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads; by default one a core. With --ray, of a task.")
@ray_option
@click.option("--no-strict", is_flag=True, help="Leave out adapter tensors that the base has no place for; list them.")
@dry_run_option
@json_option
def command(
    adapters: tuple[str, ...],
    base: str | None,
    out: str | None,
    device: str,
    dtype: str,
    rounding: str,
    seed: int,
    onto: str | None,
    quantize: str | None,
    max_shard_size: str | None,
    expert_layout: str | None,
    residual: str | None,
    undo: bool,
    resume: bool,
    push_to_hub: str | None,
    private: bool,
    workers: int | None,
    ray: str | None,
    no_strict: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Merge adapters into their base model: exact, streamed, every tensor accounted for.

    An adapter is a folder, a hub id, hub-id@revision or a name in the store; =0.7 behind it is its weight.

    \b
    lorakit merge runs/sql/checkpoint-500 --out merged
    lorakit merge sql=0.7 chat=0.3 --base base --out merged --dtype bf16
    """
    if out is None and not dry_run:
        raise UsageError("name the folder to write with --out, or ask for the plan alone with --dry-run")
    pairs = [weighted(argument) for argument in adapters]
    from lorakit.merge.merge import merge

    with data_alone(ray), progress_bar("merging", wanted=not (dry_run or as_json)) as progress:
        report = merge(
            base, pairs, out=out, device=device, dtype=dtype, strict=not no_strict, dry_run=dry_run,
            rounding=rounding, seed=seed, max_shard_size=max_shard_size, expert_layout=expert_layout, resume=resume,
            workers=workers, onto=onto, quantize=quantize, residual=residual, undo=undo, push_to_hub=push_to_hub,
            private=private, ray=where(ray), progress=progress,
        )  # fmt: skip
    result = report.as_dict()
    if as_json:
        print_json(result)
    elif dry_run:
        _print_plan(result)
    else:
        print(result["out"])
    for line in report.unplaced:
        note(f"left out: {line}")
    for line in report.notes:
        note(f"note: {line}")
    if not (as_json or dry_run):
        note(_summary(result))
    if report.pushed is not None:
        note(f"pushed to {report.pushed}")


def _summary(result: dict[str, Any]) -> str:
    rate = result["bytes"] / 1e6 / max(result["seconds"], 1e-9)
    left = "" if result["survival"] is None else f"; {result['survival']:.1%} of the change survived rounding"
    return (
        f"merged {len(result['merged'])} of {result['tensors']} tensors, {result['bytes'] / 1e6:.1f} MB "
        f"in {result['seconds']:.1f} s ({rate:.0f} MB/s){left}"
    )


def _print_plan(result: dict[str, Any]) -> None:
    for tensor in result["merged"]:
        print(f"{tensor['weight']}  {tensor['dtype']} {tensor['shape']}  {' '.join(tensor['steps'])}")
    untouched = result["tensors"] - len(result["merged"])
    print(f"{len(result['merged'])} tensors are merged, {untouched} others are written as they are", end="")
    print("" if result["dtype"] == "keep" else f" but for their dtype ({result['dtype']})")
    for name, source in result["companions"].items():
        print(f"{name}  from {source}")
    print(f"{result['bytes'] / 1e6:.1f} MB in all; nothing was written")
