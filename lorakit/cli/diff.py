"""`lorakit diff`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import json_option, note, print_json

if TYPE_CHECKING:
    from pathlib import Path

    from lorakit.mix.changes import Change, Closeness, State, TensorChange
    from lorakit.mix.diff import DiffReport, Stage
    from lorakit.mix.diff_tensors import GroupChange, TensorsReport, TensorsStage

SHOWN = 10
LEADING = 3
WORDS: Mapping[State, str] = {
    "equal": "equal bit for bit", "close": "close", "different": "different", "reshaped": "of another shape",
    "only_before": "only before", "only_after": "only after",
}  # fmt: skip


@click.command("diff")
@click.argument("first", metavar="PATH|ID")
@click.argument("others", metavar="PATH|ID...", nargs=-1, required=True)
@click.option(
    "--module",
    "--modules",
    "modules",
    default="*",
    metavar="PATTERN",
    help="Deltas of these only, or tensors: '*.layers.0.*' as a shell would, q_proj as the end of a path.",
)
@click.option(
    "--op", type=click.Choice(["equal", "allclose"]), default="allclose", show_default=True,
    help="Whether tensors that are close are told from others.",
)  # fmt: skip
@click.option("--rtol", type=click.FloatRange(min=0), metavar="R", help="Close: |B - A| <= atol + R |A|; 1e-05.")
@click.option("--atol", type=click.FloatRange(min=0), metavar="A", help="Close: |B - A| <= A + rtol |A|; 1e-08.")
@click.option(
    "--plot", type=click.Path(), metavar="FILE.png", help="Write spectra, and what each stage lost; needs matplotlib."
)
@json_option
def command(
    first: str,
    others: tuple[str, ...],
    modules: str,
    op: str,
    rtol: float | None,
    atol: float | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Say what changed from each checkpoint to the next: tensor by tensor, and of adapters delta by delta.

    Adapters of any ranks and modules: deltas are compared as what they add to the base. `lost` is ‖Δ − Δ'‖ / ‖Δ‖ since
    the stage before, or since the first. Of models, regular checkpoints, torch files and distributed checkpoints the
    tensors are compared by their names, and the numbers and words beside them; no pickle is run.

    \b
    lorakit diff runs/sql/checkpoint-500 runs/sql/checkpoint-1000
    lorakit diff exact rank-16 tuned --module '*.layers.0.*' --plot stages.png
    lorakit diff runs/full/checkpoint-500/optimizer.pt runs/full/checkpoint-1000/optimizer.pt --op equal
    """
    from lorakit.cli import plots
    from lorakit.errors import UsageError
    from lorakit.mix.diff import diff
    from lorakit.mix.diff_tensors import diff_tensors

    closeness = _closeness(op, rtol, atol)
    paths = [_located(reference) for reference in (first, *others)]
    if _are_adapters(paths):
        plots.tell(
            lambda: diff(*paths, modules=modules, closeness=closeness),
            _print,
            plots.stages_figure,
            plot,
            as_json=as_json,
        )
        return
    if plot is not None:
        raise UsageError("--plot draws the deltas of adapters: leave it out")
    report = diff_tensors(*paths, pattern=modules, closeness=closeness)
    if as_json:
        print_json({**report.as_dict(), "plot": None})
    else:
        _print_tensors(report)
    for line in report.notes:
        note(f"note: {line}")


def _closeness(op: str, rtol: float | None, atol: float | None) -> Closeness:
    from lorakit.errors import UsageError
    from lorakit.mix.changes import ATOL, RTOL, Closeness

    if op == "equal":
        if rtol is not None or atol is not None:
            raise UsageError(
                "--rtol and --atol say what is close, and --op equal doesn't ask: leave one of the two out"
            )
        return Closeness(None, None)
    return Closeness(RTOL if rtol is None else rtol, ATOL if atol is None else atol)


def _located(reference: str) -> Path:
    """As `checkpoint_folder`, or an adapter or model on the hub."""
    from lorakit.checkpoints.locate import checkpoint_folder, find_checkpoint, on_hub
    from lorakit.files.hub import looks_like_hub_id

    if (found := find_checkpoint(reference)) is not None:
        return found
    if looks_like_hub_id(reference):
        return on_hub(reference, what="checkpoint", patterns=("*.safetensors", "*.json"))
    return checkpoint_folder(reference)


def _are_adapters(paths: Sequence[Path]) -> bool:
    """Raises Refused where some are and some aren't."""
    from lorakit.checkpoints.finished import is_adapter
    from lorakit.errors import Refused

    adapters = [path for path in paths if path.is_dir() and is_adapter(path)]
    if adapters and len(adapters) < len(paths):
        other = next(path for path in paths if path not in adapters)
        raise Refused(
            f"'{adapters[0]}' is an adapter, and '{other}' is not: lorakit merge '{adapters[0]}' --out DIR makes a "
            f"model of the one, lorakit extract '{other}' --base BASE --out DIR an adapter of the other"
        )
    return bool(adapters)


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
        print(f"tensors of {number - 1} and {number}: {_counts(stage)}")
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


def _print_tensors(report: TensorsReport) -> None:
    from lorakit.cli.tables import print_table

    rows = [(str(number), stage.path, str(stage.tensors)) for number, stage in enumerate(report.stages, 1)]
    print_table(("stage", "path", "tensors"), rows)
    for number, stage in enumerate(report.stages[1:], 2):
        print(f"\ntensors of {number - 1} and {number}: {_counts(stage)}")
        head = ("group", "tensors", "equal", "norm", "norm after", "lost", "cosine", "largest")
        print_table(head, [_group_row(group) for group in stage.groups()])
        changed = [_tensor_row(change) for change in stage.most_changed()]
        _print_most(("tensor", "state", "before", "after", "lost", "cosine", "largest"), changed)
        values = [(value.name, *map(_value, (value.before, value.after), value.there)) for value in stage.values]
        _print_most(("value", "before", "after"), values)


def _print_most(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from lorakit.cli.tables import print_table

    if rows:
        print()
        print_table(head, rows[:SHOWN])
    if len(rows) > SHOWN:
        print(f"and {len(rows) - SHOWN} more: --json has every one")


def _group_row(group: GroupChange) -> tuple[str, ...]:
    change = group.change
    norms = (None, None) if change is None else (change.before**0.5, change.after**0.5)
    return (
        group.name, str(len(group.changes)), str(group.count("equal")), *map(_number, norms),
        _lost(change.lost if change else None), _cosine(change), _number(group.largest),
    )  # fmt: skip


def _tensor_row(one: TensorChange) -> tuple[str, ...]:
    change = one.change
    return (
        one.name, WORDS[one.state], one.before or "-", one.after or "-", _lost(change.lost if change else None),
        _cosine(change), _number(one.largest),
    )  # fmt: skip


def _counts(stage: Stage | TensorsStage) -> str:
    counts = {words: stage.count(state) for state, words in WORDS.items()}
    return ", ".join(f"{count} {words}" for words, count in counts.items() if count) or "none"


def _value(value: Any, there: bool) -> str:
    text = str(value) if there else "-"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _lost(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.2%}" if share >= 1e-4 or not share else f"{share:.1e}"


def _cosine(change: Change | None) -> str:
    return "-" if change is None or change.cosine is None else f"{change.cosine:+.4f}"
