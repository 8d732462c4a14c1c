"""`lorakit convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.ray_option import WithRay, data_alone, ray_option, where
from lorakit.cli.shared import dry_run_option, json_option, note, print_json, progress_bar
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.convert.report import ConvertReport

SHOWN = 4  # names in a line


@click.command("convert", cls=WithRay)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--out", type=click.Path(), help="The folder to write; it must not exist.")
@click.option(
    "--like", "--base", "like", metavar="BASE",
    help="Folder or hub id of the model that was trained: the source of the config, the tokenizer and the code that "
    "the checkpoint lacks. Of an adapter its base; left out: the one that its config names.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["keep", "bf16", "fp16", "fp32"]), default="keep", show_default=True,
    help="What float tensors are written as.",
)  # fmt: skip
@click.option(
    "--weights", type=click.Choice(["model", "ema"]), default="model", show_default=True,
    help="ema takes the moving average of the weights, where the checkpoint holds one.",
)  # fmt: skip
@click.option("--only", metavar="model,tokenizer", help="Write these parts alone.")
@click.option(
    "--quantize",
    type=click.Choice(["fp8", "int8", "w4a16"]),
    help="Write linear layers quantised, rounded to nearest, as vLLM loads them.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Cut the result into shards of at most this. Default: 5GB.")
@click.option("--no-strict", is_flag=True, help="Leave out tensors that the model has no place for; list them.")
@click.option("--max-lora-rank", type=click.IntRange(min=1), metavar="R", help="What the adapter's server allows.")
@click.option(
    "--approximate", is_flag=True,
    help="Write an adapter that has no exact form as a LoRA all the same, and say the error.",
)  # fmt: skip
@click.option("--rank", type=click.IntRange(min=1), help="Of an approximate adapter; more is more exact.")
@click.option(
    "--for", "target", type=click.Choice(["vllm", "lorax", "sglang", "llama.cpp", "peft"]), default="vllm",
    show_default=True, help="Who is to load the adapter.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(min=1), help="Threads; by default one a core. With --ray, of a task.")
@ray_option
@dry_run_option
@json_option
def command(
    checkpoint: str,
    out: str | None,
    like: str | None,
    dtype: str,
    weights: str,
    only: str | None,
    quantize: str | None,
    max_shard_size: str | None,
    no_strict: bool,
    max_lora_rank: int | None,
    approximate: bool,
    rank: int | None,
    target: str,
    workers: int | None,
    ray: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write what a trainer left as what vLLM loads: a model folder, or an adapter that is served right.

    CHECKPOINT is a folder, a file, a hub id or a name in the store: of Hugging Face's layout, torch.save, Lightning,
    FSDP, torch.distributed.checkpoint, DeepSpeed, torchtune, litgpt, GGUF. A run stands for its newest finished one.

    \b
    lorakit convert runs/full/checkpoint-500 --out servable --dtype bf16
    lorakit convert last.ckpt --like meta-llama/Llama-3.1-8B --out servable
    lorakit convert runs/sql/checkpoint-500 --out servable --max-lora-rank 16
    """
    if out is None and not dry_run:
        raise UsageError("name the folder to write with --out, or ask for the plan alone with --dry-run")
    from lorakit.convert.convert import convert

    with data_alone(ray), progress_bar("converting", wanted=not (dry_run or as_json)) as progress:
        report = convert(
            checkpoint, out, like, dtype=dtype, weights=weights, only=_parts(only), quantize=quantize,
            max_shard_size=max_shard_size, strict=not no_strict, max_rank=max_lora_rank, rank=rank,
            approximate=approximate, target=target, dry_run=dry_run, workers=workers, ray=where(ray),
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(report.as_dict())
    elif dry_run:
        _print_plan(report)
    else:
        print(report.out)
    _say(report, written=not (as_json or dry_run))


def _parts(only: str | None) -> list[str] | None:
    return None if only is None else [part.strip() for part in only.split(",") if part.strip()]


def _print_plan(report: ConvertReport) -> None:
    for old, new in report.renamed.items():
        print(f"{old}  as {new}")
    kept = report.tensors - len(report.renamed)
    print(f"{report.tensors} tensors, {report.nbytes / 1e6:.1f} MB, {max(0, kept)} of them under their own name")
    for name, source in report.companions.items():
        print(f"{name}  from {source}")


def _say(report: ConvertReport, *, written: bool) -> None:
    for reason, names in report.left_out.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        note(f"left out: {', '.join(names[:SHOWN])}{more} ({reason})")
    for line in report.notes:
        note(f"note: {line}")
    if written:
        rate = report.nbytes / 1e6 / max(report.seconds, 1e-9)
        error = "" if report.error is None else f"; relative error {report.error:.2g}" if report.error else "; exact"
        note(
            f"converted {report.tensors} tensors ({report.format}), {report.nbytes / 1e6:.1f} MB in "
            f"{report.seconds:.1f} s ({rate:.0f} MB/s){error}"
        )
