"""`lorakit check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, note, print_json
from lorakit.cli.tables import printable

if TYPE_CHECKING:
    from lorakit.convert.verdict import Judgement

_MARKS = {True: "ok", False: "no", None: "?"}


@click.command("check")
@click.argument("checkpoint", metavar="PATH|ID")
@click.option("--base", help="Folder or hub id. Left out: the one that the adapter's config names.")
@click.option("--max-lora-rank", type=click.IntRange(min=1), metavar="R", help="What the server will be started with.")
@json_option
@click.pass_context
def command(
    context: click.Context, checkpoint: str, base: str | None, max_lora_rank: int | None, as_json: bool
) -> None:
    """Say whether vLLM would load a checkpoint, and be right, with the reasons and what helps.

    An adapter is judged as `lorakit serve` does before an engine sees it; of a whole model every number is read, and
    its tensors are compared with what its config implies. PATH may be a run, for its newest finished checkpoint. Ends
    with 0 when it is ready, with 4 when it is not or that can't be known, with 3 when it is not there.

    \b
    lorakit check runs/sql/checkpoint-500 --base models/llama
    lorakit check sql@latest --max-lora-rank 16 --json
    """
    from lorakit.checkpoints.locate import checkpoint_folder
    from lorakit.convert.verdict import judge

    judged = judge(checkpoint_folder(checkpoint), base, max_rank=max_lora_rank)
    if as_json:
        print_json(judged.as_dict())
    else:
        _print(judged)
    context.exit(0 if judged.ready else 4)


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
        note(f"note: {repair}: lorakit serve writes it anew, exactly, as it takes it in")
