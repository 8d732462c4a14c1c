"""What a server knows, as the JSON of `/v1/models` and `/v1/adapters`."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from lorakit.server.following.served import Served, Waiting
from lorakit.store.catalog import Facts, Revision, Run
from lorakit.store.names import model_name
from lorakit.store.splits import split_said

T = TypeVar("T")
NOWHERE = {"in_engine": False, "residency": None, "in_flight": 0}


def model_cards(known: Served) -> list[dict[str, Any]]:
    """OpenAI's model objects: the base, then each name with its aliases, then the revisions."""
    base = known.engine.limits.base
    cards = [{**known.engine.model_card(), "id": base, "object": "model"}] if known.is_base(base) else []
    names: list[tuple[str, Revision]] = []
    for name in sorted(known.runs):
        run = known.runs[name]
        aliases = aliases_of(known, run)
        names += [(model_name(name, alias), target) for alias, target in aliases.items()]
    for name in sorted(known.runs):
        run = known.runs[name]
        names += [(run.revisions[id].name, run.revisions[id]) for id in run.without(known.unusable)]
    names += [*known.mixes.targets().items(), *((revision.name, revision) for revision in known.mixes.revisions())]
    for id, revision in dict(names).items():
        cards.append(
            {
                "id": id,
                "object": "model",
                "created": int(revision.created),
                "owned_by": "lorakit",
                "parent": base,
                "root": revision.name,
                "step": revision.facts.step,
                "eval_loss": number(revision.facts.eval_loss),
                "metadata": {
                    "base": base,
                    "digest": revision.digest,
                    "rank": revision.rank,
                    **_said_of(revision.facts),
                },
            }
        )
    return cards


def adapter_view(known: Served, name: str, newest: int | None = None, skip: int = 0) -> dict[str, Any]:
    """One name: where it points, and each of its revisions, or so many of the newest, but for some; then what is
    unfinished or refused."""
    run = known.runs.get(name, Run(name))
    aliases = aliases_of(known, run)
    default = aliases.get("")
    revisions = [_revision_view(known, revision, aliases) for revision in _newest(_in_order(run), newest, skip)]
    waiting = [waiting for waiting in known.waiting.values() if waiting.candidate.run == name]
    revisions += [_waiting_view(each) for each in _newest(waiting, newest, 0)]
    state, reason = _state(known, default, revisions)
    own = [revision.id for revision in run.revisions.values()]
    return {
        "id": name,
        "object": "adapter",
        "name": name,
        "state": state,
        "reason": reason,
        "revision": default.name if default else None,
        **_said_of(default.facts if default else Facts()),
        "follow": "manual" if run.pinned else known.settings.follow,
        "aliases": {alias or name: revision.name for alias, revision in aliases.items()},
        "splits": {alias or name: split_said(split, run.revisions) for alias, split in run.splits.items()},
        "requests": sum(known.requests.get(id, 0) for id in own),
        "count": len(own),
        "revisions": revisions,
    }


def aliases_of(known: Served, run: Run) -> dict[str, Revision]:
    """What each alias means now, the default one under the empty name; those that mean nothing are left out."""
    unusable = known.unusable
    named = ["", "latest", "best", "final", *sorted(alias for alias in run.aliases if alias)]
    found = {alias: run.select(alias or None, unusable) for alias in named}
    return {alias: revision for alias, revision in found.items() if revision is not None}


def _state(known: Served, default: Revision | None, revisions: list[dict[str, Any]]) -> tuple[str, str | None]:
    if default is not None:
        return known.state_of(default)
    newest = revisions[-1] if revisions else None
    return (newest["state"], newest["reason"]) if newest else ("gone", None)


def _newest(found: list[T], newest: int | None, skip: int) -> list[T]:
    """Of what is in order, so many of the last, but for the very last `skip`."""
    end = max(0, len(found) - skip)
    return found[:end] if newest is None else found[max(0, end - newest) : end]


def _in_order(run: Run) -> list[Revision]:
    """As they finished, the newest last."""
    order = {finish.revision: position for position, finish in enumerate(run.finishes)}
    return sorted(run.revisions.values(), key=lambda revision: order.get(revision.id, -1))


def _revision_view(known: Served, revision: Revision, aliases: dict[str, Revision]) -> dict[str, Any]:
    state, reason = known.state_of(revision)
    return {
        "id": revision.name,
        "revision": revision.name.partition("@")[2],
        "state": state,
        "reason": reason,
        "passed_over": known.passed_over.get(revision.id),
        **_said_of(revision.facts),
        "digest": revision.digest,
        "rank": revision.rank,
        "size": revision.size,
        "source": revision.source,
        "created": revision.created,
        "repaired": revision.repaired,
        "aliases": [alias or revision.run for alias, target in aliases.items() if target.id == revision.id],
        **place_of(known, revision),
        "requests": known.requests.get(revision.id, 0),
    }


def place_of(known: Served, revision: Revision) -> dict[str, Any]:
    """Where it is, and how many requests it answers there."""
    resident = known.residency.find(revision.name)
    return {
        "in_engine": resident is not None,
        "residency": "store" if resident is None else "slot" if resident.busy else "memory",
        "in_flight": resident.in_flight if resident else 0,
    }


def _said_of(facts: Facts) -> dict[str, Any]:
    """What its trainer said of it."""
    return {
        "step": facts.step,
        "epoch": number(facts.epoch),
        "train_loss": number(facts.train_loss),
        "eval_loss": number(facts.eval_loss),
        "eval_step": facts.eval_step,
        "metrics": {name: number(value) for name, value in facts.metrics.items()},
    }


def _waiting_view(waiting: Waiting) -> dict[str, Any]:
    candidate = waiting.candidate
    label = f"step-{candidate.step}" if candidate.step is not None else candidate.kind
    return {
        "id": None,
        "revision": label,
        "state": waiting.state,
        "reason": waiting.reason,
        "passed_over": None,
        **_said_of(Facts(step=candidate.step)),
        "digest": None,
        "rank": None,
        "size": None,
        "source": str(candidate.folder),
        "created": None,
        "repaired": None,
        "aliases": [],
        **NOWHERE,
        "requests": 0,
    }


def number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is None or math.isfinite(value) else None
