"""Which revisions of a run leave the store: the policies of `lorakit prune` over what was served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.checkpoints.retention import Checkpoint, Policy, Retention
from lorakit.checkpoints.retention_file import read_retention
from lorakit.server.following.rules import EVAL_LOSS
from lorakit.store.catalog import Revision, Run, own_eval_loss


@dataclass(frozen=True, slots=True)
class KeepFinished:
    """The `count` that finished last, whatever their steps: a run that began again counts on."""

    count: int

    def reasons(self, checkpoints: Sequence[Checkpoint], now: float) -> dict[str, str]:
        return {checkpoint.name: f"of the last {self.count} that finished" for checkpoint in checkpoints[-self.count :]}


def retention_of(keep_revisions: int, file: str) -> Retention | None:
    """What a server was told; None when all is kept.

    Raises:
        NotFound, UsageError: as `read_retention`.
    """
    said = read_retention(Path(file)) if file else None
    policies: list[Policy] = [*said.policies] if said else []
    if keep_revisions:
        policies.append(KeepFinished(keep_revisions))
    if said is None and not policies:
        return None
    return Retention(tuple(policies), max_bytes=said.max_bytes if said else None, spare_newest=False)


def going(run: Run, retention: Retention, held: Mapping[int, str], now: float) -> list[Revision]:
    """The revisions that nothing keeps, the oldest first; `held` says why some stay whatever is asked, by id."""
    order = {finish.revision: position for position, finish in enumerate(run.finishes)}
    revisions = sorted(run.revisions.values(), key=lambda revision: order.get(revision.id, -1))
    largest = max((revision.facts.step or 0 for revision in revisions), default=0)
    kept = retention.decide(
        [_checkpoint(revision, largest) for revision in revisions],
        now=now,
        held={str(id): (reason,) for id, reason in held.items()},
    )
    return [revision for revision in revisions if not kept[str(revision.id)]]


def _checkpoint(revision: Revision, largest: int) -> Checkpoint:
    """By its id; what has no step of its own is a run's last save, or all there is of it."""
    facts = revision.facts
    loss = own_eval_loss(facts)
    metrics = dict(facts.metrics) | ({EVAL_LOSS: loss} if loss is not None else {})
    step = largest + 1 if facts.step is None else facts.step
    return Checkpoint(str(revision.id), step, revision.size, revision.created, metrics)
