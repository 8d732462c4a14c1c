"""`lorakit prune`."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from lorakit.checkpoints.amounts import bytes_of, seconds
from lorakit.cli.shared import dry_run_option, json_option, note, print_json
from lorakit.cli.tables import print_table, size_in_words
from lorakit.errors import UsageError

if TYPE_CHECKING:
    from lorakit.checkpoints.pruning import Pruned, PrunePlan, Verdict
    from lorakit.checkpoints.retention import Mode, Policy, Retention


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
@click.option("--config", type=click.Path(), metavar="FILE", help="YAML that says what to keep: keep_last: 3, ...")
@click.option("--home", type=click.Path(file_okay=False), help="The store. Default: $LORAKIT_HOME.")
@click.option("--trash", is_flag=True, help="Into the run's trash, whose space is not free yet; see lorakit undelete.")
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
    config: str | None,
    home: str | None,
    trash: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove the checkpoints of a run that nothing keeps, and say why each stays or goes.

    One that any of the options, or the file, keeps stays. The newest stays too, and so does what an alias of the store
    or a link in the run points at, and what is not finished, until nothing of it has changed for a day.

    \b
    lorakit prune runs/sql --keep-last 3 --keep-best 2 --dry-run
    lorakit prune runs/sql --keep-every 500 --max-bytes 20GB --yes
    lorakit prune runs/sql --config keep.yaml --yes
    """
    retention = _retention(keep_last, keep_best, metric, mode, keep_every, keep_for, max_bytes, config)
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
    done = None if dry_run else execute_prune(plan, to_trash=trash)
    if as_json:
        print_json(_as_dict(plan, done))
    _say(plan, done, "moved to the trash" if trash else "removed")


def _retention(
    keep_last: int | None, keep_best: int | None, metric: str | None, mode: Mode | None, keep_every: int | None,
    keep_for: str | None, max_bytes: str | None, config: str | None,
) -> Retention:  # fmt: skip
    """The options and the file together: what either of them keeps stays."""
    from pathlib import Path

    from lorakit.checkpoints.retention import KeepBest, KeepEvery, KeepFor, KeepLast, Retention
    from lorakit.checkpoints.retention_file import mode_of, read_retention

    if keep_best is None and (metric or mode):
        raise UsageError("--metric and --mode say what is best, and nothing was asked to be: add --keep-best N")
    said = read_retention(Path(config)) if config is not None else None
    policies: list[Policy] = [*said.policies] if said else []
    if keep_last:
        policies.append(KeepLast(keep_last))
    if keep_best:
        metric = metric or "eval_loss"
        policies.append(KeepBest(keep_best, metric, mode or mode_of(metric)))
    if keep_every:
        policies.append(KeepEvery(keep_every))
    if keep_for is not None:
        policies.append(KeepFor(seconds(keep_for)))
    sizes = [said.max_bytes] if said and said.max_bytes is not None else []
    if max_bytes is not None:
        sizes.append(bytes_of(max_bytes))
    spare_newest = keep_last != 0 and (said is None or said.spare_newest)
    return Retention(tuple(policies), max_bytes=max(sizes, default=None), spare_newest=spare_newest)


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


def _say(plan: PrunePlan, done: Pruned | None, what: str) -> None:
    if done is None:
        note(f"{_count(plan.going)} would go, {_count(plan.staying)} would stay; nothing was removed")
    else:
        removed = [verdict for verdict in plan.going if verdict.name in done.removed]
        note(f"{what} {_count(removed)}")
        for name in done.trashed:
            note(f"take it back: lorakit undelete {shlex.quote(str(plan.run / name))}")
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
        "trash": {} if done is None else dict(done.trashed),
        "left": [] if done is None else [str(path) for path in done.left],
    }


def _count(verdicts: tuple[Verdict, ...] | list[Verdict]) -> str:
    size = size_in_words(sum(verdict.size for verdict in verdicts))
    return f"{len(verdicts)} checkpoint{'s' * (len(verdicts) != 1)} ({size})"
