"""`lorakit verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option, note, print_json, progress_bar, weighted

if TYPE_CHECKING:
    from lorakit.merge.recompute import TensorResult
    from lorakit.merge.verify import VerifyReport

SHOWN = 20


@click.command("verify")
@click.argument("out", type=click.Path())
@click.option("--base", help="Model folder or hub id. Left out: the one that OUT's lorakit.json names.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER[=WEIGHT]",
    help="Each that was merged, in order. Left out: those that OUT's lorakit.json names.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:i]", help="Where to compute.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads; by default one a core.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    out: str,
    base: str | None,
    adapters: tuple[str, ...],
    device: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Merge again, from the sources, and compare with OUT: every tensor, bit for bit, and all that stands beside.

    Ends with 0 when OUT is what merging gives, and with 4 when it isn't. Writes nothing.

    \b
    lorakit verify merged
    lorakit verify merged --base base --adapter sql=0.7 --adapter chat=0.3
    """
    pairs = [weighted(argument) for argument in adapters] or None
    from lorakit.merge.verify import verify

    with progress_bar("verifying", wanted=not as_json) as progress:
        report = verify(out, base, pairs, device=device, workers=workers, progress=progress)
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    context.exit(0 if report.ok else 4)


def _print(report: VerifyReport) -> None:
    for result in report.wrong[:SHOWN]:
        print(f"{result.tensor}  {_in_words(result)}")
    if len(report.wrong) > SHOWN:
        print(f"and {len(report.wrong) - SHOWN} more tensors")
    for file in report.files:
        print(file)
    for result in report.close:
        print(
            f"{result.tensor}  within {result.ulps} unit{'s' * (result.ulps != 1)} in the last place, "
            f"{result.different} of {result.elements} elements differ"
        )
    others = "".join(
        f", {len(found)} {word}" for found, word in ((report.close, "close"), (report.wrong, "not")) if found
    )
    print(
        f"{'equal' if report.ok else 'different'}: {report.equal} tensors bit for bit{others}; "
        f"{report.spot_checked} rows compared with float64"
    )
    for line in report.notes:
        note(f"note: {line}")
    note(f"{report.nbytes / 1e6:.1f} MB in {report.seconds:.1f} s ({report.nbytes / 1e6 / report.seconds:.0f} MB/s)")


def _in_words(result: TensorResult) -> str:
    if result.reason or not result.different:
        return f"{result.state}{f': {result.reason}' if result.reason else ''}"
    return f"{result.different} of {result.elements} elements differ, by {result.ulps} units in the last place at most"
