"""`lorakit diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lorakit.cli.shared import json_option

if TYPE_CHECKING:
    from lorakit.mix.diff import Change, DiffReport, Stage

SHOWN = 10
LEADING = 3


@click.command("diff")
@click.argument("first", metavar="ADAPTER")
@click.argument("others", metavar="ADAPTER...", nargs=-1, required=True)
@click.option(
    "--module",
    "--modules",
    "modules",
    default="*",
    metavar="PATTERN",
    help="Deltas of these only: '*.layers.0.*' as a shell would, q_proj as the end of a path.",
)
@click.option(
    "--plot", type=click.Path(), metavar="FILE.png", help="Write spectra, and what each stage lost; needs matplotlib."
)
@json_option
def command(first: str, others: tuple[str, ...], modules: str, plot: str | None, as_json: bool) -> None:
    """Say what changed from each adapter to the next: tensor by tensor, and delta by delta.

    Any ranks and modules: deltas are compared as what they add to the base. `lost` is ‖Δ − Δ'‖ / ‖Δ‖ since the stage
    before, or since the first.

    \b
    lorakit diff runs/sql/checkpoint-500 runs/sql/checkpoint-1000
    lorakit diff exact rank-16 tuned --module '*.layers.0.*' --plot stages.png
    """
    from lorakit.cli import plots
    from lorakit.mix.diff import diff

    plots.tell(lambda: diff(first, *others, modules=modules), _print, plots.stages_figure, plot, as_json=as_json)


def _print(report: DiffReport) -> None:
    from lorakit.cli.tables import print_table

    head = ("stage", "adapter", "modules", "rank", "norm", "lost", "since 1st", "cosine", "to 1st")
    print_table(
        head,
        [
            (
                str(number), stage.path, str(stage.modules), str(stage.rank), f"{stage.norm:.4g}", _lost(stage.lost),
                _lost(stage.lost_since_first), _cosine(stage.since_previous), _cosine(stage.since_first),
            )
            for number, stage in enumerate(report.stages, 1)
        ],
    )  # fmt: skip
    print()
    for number, stage in enumerate(report.stages[1:], 2):
        print(f"tensors of {number - 1} and {number}: {_tensors(stage)}")
    _print_modules(report)


def _print_modules(report: DiffReport) -> None:
    from lorakit.cli.tables import print_table

    rows = []
    for name, module in report.most_changed()[:SHOWN]:
        for number, stage in enumerate(module.stages):
            if stage is None:
                rows.append((name, str(number + 1), "-", "-", "-", "-", ""))
                continue
            change = module.since_previous[number]
            leading = " ".join(f"{value:.3g}" for value in stage.spectrum[:LEADING])
            norm = f"{stage.square**0.5:.4g}"
            lost = _lost(change.lost if change else None)
            rows.append((name, str(number + 1), str(stage.rank), norm, lost, _cosine(change), leading))
    if rows:
        print("\nwhat changed most" if len(report.modules) > SHOWN else "")
        print_table(("module", "stage", "rank", "norm", "lost", "cosine", "leading σ"), rows)


def _tensors(stage: Stage) -> str:
    words = {
        "equal": "equal bit for bit", "close": "close", "different": "different", "only_before": "only before",
        "only_after": "only after",
    }  # fmt: skip
    counts = {state: sum(tensor.state == state for tensor in stage.tensors) for state in words}
    return ", ".join(f"{count} {words[state]}" for state, count in counts.items() if count) or "none"


def _lost(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.2%}" if share >= 1e-4 or not share else f"{share:.1e}"


def _cosine(change: Change | None) -> str:
    return "-" if change is None or change.cosine is None else f"{change.cosine:+.4f}"
