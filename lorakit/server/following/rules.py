"""Where a run's default alias should point: pure decisions over what is known of the run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from lorakit.checkpoints.retention import Mode
from lorakit.store.catalog import Facts, Revision, Run, latest, own_eval_loss

Follow = Literal["latest", "best", "manual"]
FOLLOWS: tuple[Follow, ...] = ("latest", "best", "manual")
EVAL_LOSS = "eval_loss"


@dataclass(frozen=True, slots=True)
class Following:
    """What a name follows. `best` is by a metric of a checkpoint's own step, and moves only to what is better by
    `min_delta` at least; a checkpoint of fewer than `min_steps` steps is never moved to."""

    follow: Follow = "latest"
    metric: str = EVAL_LOSS
    mode: Mode = "min"
    min_delta: float = 0.0
    min_steps: int = 0


def followed(
    run: Run, possible: Mapping[int, Revision], following: Following, held: Collection[int] = ()
) -> Revision | None:
    """The revision for the default alias; `manual`, or a pin, leaves it where it was first, or where a person moved it.
    None when it can't be any, so that the alias stays as it is.

    Args:
        possible: revisions that can be served, by id.
        held: those that no alias moves to by itself.
    """
    current = possible.get(run.aliases.get("", -1))
    if run.pinned or (following.follow == "manual" and "" in run.aliases):
        return current
    eligible = {
        id: revision for id, revision in possible.items() if id not in held and why_not(revision, following) is None
    }
    if following.follow == "best" and (found := _best(run, eligible, following)) is not None:
        return found
    return latest(run.finishes, eligible)


def why_not(revision: Revision, following: Following) -> str | None:
    """Why no alias moves to it, whatever else there is; None when one may."""
    step = revision.facts.step
    if revision.kind == "step" and step is not None and step < following.min_steps:
        return f"step {step} is before --min-steps {following.min_steps}"
    return None


def finished_between(run: Run, first: Revision, last: Revision) -> list[int]:
    """The revisions that finished after one and before another, in that order."""
    order = {finish.revision: position for position, finish in enumerate(run.finishes)}
    begin, end = order.get(first.id, -1), order.get(last.id, -1)
    return [id for id, position in order.items() if begin < position < end]


def measured(facts: Facts, metric: str) -> float | None:
    """A metric of the checkpoint's own step; NaN was measured, too."""
    return own_eval_loss(facts) if metric == EVAL_LOSS else facts.metrics.get(metric)


def _best(run: Run, eligible: Mapping[int, Revision], following: Following) -> Revision | None:
    """Of equals the one that finished first; None when nothing is measured."""
    seen = {finish.revision: eligible[finish.revision] for finish in run.finishes if finish.revision in eligible}
    found = min(
        (revision for revision in seen.values() if measured(revision.facts, following.metric) is not None),
        key=lambda revision: _cost(revision, following),
        default=None,
    )
    current = seen.get(run.aliases.get("", -1))
    if found is None or current is None or measured(current.facts, following.metric) is None:
        return found
    gain = _cost(current, following) - _cost(found, following)
    return found if gain >= following.min_delta and gain > 0 else current


def _cost(revision: Revision, following: Following) -> float:
    """Less is better; NaN is worst."""
    value = measured(revision.facts, following.metric)
    if value is None or math.isnan(value):
        return math.inf
    return value if following.mode == "min" else -value
