"""`lorakit prune`."""

from __future__ import annotations

import math
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from lorakit.cli.shared import dry_run_option, json_option, note, print_json
from lorakit.cli.tables import print_table, size_in_words
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.checkpoints.pruning import Pruned, PrunePlan, Verdict
    from lorakit.checkpoints.retention import Mode, Policy, Retention

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_BYTES = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


@click.command("prune")
@click.argument("run", type=click.Path())
@click.option(
    "--keep-last",
    type=click.IntRange(min=0),
    metavar="N",
    help="Keep the N largest steps. 0: not even the newest, unless something else keeps it.",
)
@click.option("--keep-best", type=click.IntRange(min=1), metavar="N", help="Keep the N best by a metric.")
@click.option("--metric", metavar="NAME", help="Of --keep-best, measured at a checkpoint's own step [eval_loss].")
@click.option(
    "--mode", type=click.Choice(["min", "max"]), help="Of --metric; min for those that are called a loss or perplexity."
)
@click.option("--keep-every", type=click.IntRange(min=1), metavar="STEPS", help="Keep the steps that are multiples.")
@click.option("--keep-for", metavar="TIME", help="Keep what is younger: 90m, 36h, 7d, 2w.")
@click.option(
    "--max-bytes",
    metavar="SIZE",
    help="Keep, of the rest, the newest that fit with all that stays: 20GB, 500MiB. What else is kept may be more.",
)
@click.option("--home", type=click.Path(file_okay=False), help="The store. Default: $LORAKIT_HOME.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@dry_run_option
@json_option
@click.pass_context
def command(
    context: click.Context,
    run: str,
    keep_last: int | None,
    keep_best: int | None,
    metric: str | None,
    mode: Mode | None,
    keep_every: int | None,
    keep_for: str | None,
    max_bytes: str | None,
    home: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove the checkpoints of a run that nothing keeps, and say why each stays or goes.

    One that any of the options keeps stays. The newest stays too, and so does what an alias of the store or a link in
    the run points at, and what is not finished, until nothing of it has changed for a day.

    \b
    lorakit prune runs/sql --keep-last 3 --keep-best 2 --dry-run
    lorakit prune runs/sql --keep-every 500 --max-bytes 20GB --yes
    """
    retention = _retention(keep_last, keep_best, metric, mode, keep_every, keep_for, max_bytes)
    if not (yes or dry_run) and (as_json or not sys.stdin.isatty()):
        raise UsageError("removing asks first, and there is nobody to ask: give --yes, or --dry-run to see what goes")
    from pathlib import Path

    from lorakit.checkpoints.pruning import execute_prune, plan_prune

    plan = plan_prune(Path(run), retention, home=Path(home).absolute() if home else None)
    if not as_json:
        _print(plan, _metrics_asked(retention))
    if plan.going and not (yes or dry_run) and not click.confirm(f"Remove {_count(plan.going)}?", err=True):
        note("nothing was removed")
        context.exit(1)
    done = None if dry_run else execute_prune(plan)
    if as_json:
        print_json(_as_dict(plan, done))
    _say(plan, done)


def _retention(
    keep_last: int | None, keep_best: int | None, metric: str | None, mode: Mode | None, keep_every: int | None,
    keep_for: str | None, max_bytes: str | None,
) -> Retention:  # fmt: skip
    from lorakit.checkpoints.retention import KeepBest, KeepEvery, KeepFor, KeepLast, Retention

    if keep_best is None and (metric or mode):
        raise UsageError("--metric and --mode say what is best, and nothing was asked to be: add --keep-best N")
    policies: list[Policy] = []
    if keep_last:
        policies.append(KeepLast(keep_last))
    if keep_best:
        metric = metric or "eval_loss"
        policies.append(KeepBest(keep_best, metric, mode or _mode_of(metric)))
    if keep_every:
        policies.append(KeepEvery(keep_every))
    if keep_for is not None:
        policies.append(KeepFor(seconds(keep_for)))
    return Retention(
        tuple(policies),
        max_bytes=None if max_bytes is None else bytes_of(max_bytes),
        spare_newest=keep_last != 0,
    )


def _mode_of(metric: str) -> Mode:
    """Raises UsageError when the name does not say whether less is better: the wrong guess would remove the best."""
    if metric.endswith(("loss", "perplexity")):
        return "min"
    raise UsageError(f"is more of '{metric}' better, or less? say --mode max or --mode min")


def seconds(said: str) -> float:
    """`7d` as 604,800; s, m, h, d and w are seconds, minutes, hours, days and weeks.

    Raises:
        UsageError: it is no time of that form, or none above 0.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([smhdw])", said.strip())
    value = _number(match[1]) * _SECONDS[match[2]] if match else math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"'{said}' is no time: write, for instance, 90m, 36h or 7d")
    return value


def bytes_of(said: str) -> int:
    """`20GB` as 20,000,000,000; `GiB` and its like count by 1024.

    Raises:
        UsageError: it is no size of that form, or below one byte.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", said.strip())
    value = _number(match[1]) * _BYTES.get(match[2].upper(), math.nan) if match else math.nan
    if not 1 <= value < math.inf:
        raise UsageError(f"'{said}' is no size: write, for instance, 500MB, 20GB or 20GiB")
    return int(value)


def _number(digits: str) -> float:
    try:
        return float(digits)
    except ValueError:
        return math.nan


def _metrics_asked(retention: Retention) -> list[str]:
    from lorakit.checkpoints.retention import KeepBest

    return [policy.metric for policy in retention.policies if isinstance(policy, KeepBest)] or ["eval_loss"]


def _print(plan: PrunePlan, metrics: list[str]) -> None:

    rows = [
        (
            verdict.name,
            size_in_words(verdict.size),
            *(_measured(verdict.sighted.checkpoint.metrics.get(metric)) for metric in metrics),
            "stays" if verdict.stays else "goes",
            "; ".join(verdict.reasons),
        )
        for verdict in plan.verdicts
    ]
    print_table(("checkpoint", "size", *metrics, "", "why"), rows)


def _measured(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _say(plan: PrunePlan, done: Pruned | None) -> None:
    if done is None:
        note(f"{_count(plan.going)} would go, {_count(plan.staying)} would stay; nothing was removed")
    else:
        removed = [verdict for verdict in plan.going if verdict.name in done.removed]
        note(f"removed {_count(removed)}")
        for name, reason in done.spared.items():
            note(f"note: {name} stays after all: {reason}")
        for trash in done.left:
            note(f"note: '{trash}' is out of the run, but can't be removed wholly: remove it by hand")
    limit = plan.retention.max_bytes
    staying = sum(verdict.size for verdict in plan.staying)
    if limit is not None and staying > limit:
        note(f"note: what else is kept comes to {size_in_words(staying)}, more than --max-bytes {size_in_words(limit)}")


def _as_dict(plan: PrunePlan, done: Pruned | None) -> dict[str, Any]:
    return {
        "run": str(plan.run),
        "dry_run": done is None,
        "checkpoints": [verdict.as_dict() for verdict in plan.verdicts],
        "bytes_staying": sum(verdict.size for verdict in plan.staying),
        "bytes_going": sum(verdict.size for verdict in plan.going),
        "removed": [] if done is None else list(done.removed),
        "spared": {} if done is None else dict(done.spared),
        "left": [] if done is None else [str(path) for path in done.left],
    }


def _count(verdicts: tuple[Verdict, ...] | list[Verdict]) -> str:
    size = size_in_words(sum(verdict.size for verdict in verdicts))
    return f"{len(verdicts)} checkpoint{'s' * (len(verdicts) != 1)} ({size})"
