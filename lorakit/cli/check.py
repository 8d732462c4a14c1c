"""`lorakit check`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, note, print_json
from lorakit.cli.tables import printable

if TYPE_CHECKING:
    from lorakit.convert.answers import Check
    from lorakit.convert.verdict import Judgement

_MARKS = {True: "ok", False: "no", None: "?"}


@click.command("check")
@click.argument("checkpoint", metavar="PATH|ID")
@click.option("--base", help="Folder or hub id. Left out: the one that the adapter's config names.")
@click.option("--max-lora-rank", type=click.IntRange(min=1), metavar="R", help="What the server will be started with.")
@click.option(
    "--probe",
    is_flag=True,
    help="Also start vLLM with the adapter, and compare its logprobs with transformers and PEFT.",
)
@json_option
@click.pass_context
def command(
    context: click.Context, checkpoint: str, base: str | None, max_lora_rank: int | None, probe: bool, as_json: bool
) -> None:
    """Say whether vLLM would load a checkpoint, and be right, with the reasons and what helps.

    An adapter is judged as `lorakit serve` does before an engine sees it; of a whole model every number is read, and
    its tensors are compared with what its config implies. PATH may be a run, for its newest finished checkpoint. Ends
    with 0 when it is ready, with 4 when it is not or that can't be known, with 3 when it is not there.

    \b
    lorakit check runs/sql/checkpoint-500 --base models/llama
    lorakit check sql@latest --max-lora-rank 16 --json
    lorakit check runs/sql/checkpoint-500 --base models/llama --probe
    """
    from lorakit.checkpoints.locate import checkpoint_folder
    from lorakit.convert.verdict import judge

    judged = judge(checkpoint_folder(checkpoint), base, max_rank=max_lora_rank)
    if probe:
        judged = _probed(judged, max_lora_rank)
    if as_json:
        print_json(judged.as_dict())
    else:
        _print(judged)
    context.exit(0 if judged.ready else 4)


def _probed(judged: Judgement, max_rank: int | None) -> Judgement:
    """With what an engine and PEFT say of it; of what is refused, nothing is asked."""
    from lorakit.convert.answers import Check

    if judged.kind != "adapter":
        found = Check("probe", None, "an engine and PEFT are compared for adapters alone")
    elif judged.word == "not ready" or judged.base is None:
        found = Check("probe", None, "not asked, as it is not ready")
    else:
        found = _asked(judged, judged.base, max_rank)
    return replace(judged, checks=(*judged.checks, found))


def _asked(judged: Judgement, base: str, max_rank: int | None) -> Check:
    """Of what has to be repaired, vLLM gets what a server would make of it."""
    from lorakit.convert.adapters.convert import convert_adapter
    from lorakit.server.probe import probe

    if not judged.repairs:
        return probe(judged.path, judged.path, base, max_rank=max_rank)
    with TemporaryDirectory(prefix="lorakit-") as place:
        served = Path(place) / "served"
        convert_adapter(judged.path, served, base=base, max_rank=max_rank)
        return probe(judged.path, served, base, max_rank=max_rank)


def _print(judged: Judgement) -> None:
    width = max(len(check.name) for check in judged.checks)
    for check in judged.checks:
        print(printable(f"{_MARKS[check.ok]:<2}  {check.name:<{width}}  {check.reason or ''}").rstrip())
        if check.ok is not True and check.cure:
            print(printable(f"{'':<{width + 6}}{check.cure}"))
    if judged.modules_applied is not None:
        print(f"{judged.word}: {judged.modules_applied} of {judged.modules} modules apply")
    else:
        print(judged.word)
    for repair in judged.repairs:
        note(f"note: {repair}: lorakit serve writes it anew, exactly, as it takes it in, and lorakit convert does too")
