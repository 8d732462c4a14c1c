"""What a server knows, as the JSON of `/v1/models` and `/v1/adapters`."""

from __future__ import annotations

import math
from typing import Any

from lorakit.server.reconciler import Reconciler
from lorakit.server.served import Waiting
from lorakit.store.catalog import Revision, Run


def model_cards(known: Reconciler) -> list[dict[str, Any]]:
    """OpenAI's model objects: the base, then each name with its aliases, then the revisions."""
    base = known.engine.limits.base
    cards = [{**known.engine.model_card(), "id": base, "object": "model"}]
    names: list[tuple[str, Revision]] = []
    for name in sorted(known.runs):
        run = known.runs[name]
        names += [(name if not alias else f"{name}@{alias}", target) for alias, target in _aliases(known, run).items()]
    for name in sorted(known.runs):
        run = known.runs[name]
        names += [(run.revisions[id].name, run.revisions[id]) for id in known.usable(run)]
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
                "eval_loss": _number(revision.facts.eval_loss),
            }
        )
    return cards


def adapter_view(known: Reconciler, name: str) -> dict[str, Any]:
    """One name: where it points, and each of its revisions, the unfinished and refused ones among them."""
    run = known.runs.get(name, Run(name))
    aliases = _aliases(known, run)
    default = aliases.get("")
    revisions = [_revision_view(known, revision, aliases) for revision in _in_order(run)]
    revisions += [_waiting_view(waiting) for waiting in known.waiting.values() if waiting.candidate.run == name]
    state, reason = _state(known, default, revisions)
    own = [revision.id for revision in run.revisions.values()]
    return {
        "id": name,
        "object": "adapter",
        "name": name,
        "state": state,
        "reason": reason,
        "revision": default.name if default else None,
        "follow": "manual" if run.pinned else known.settings.follow,
        "aliases": {alias or name: revision.name for alias, revision in aliases.items()},
        "requests": sum(known.requests.get(id, 0) for id in own),
        "revisions": revisions,
    }


def _aliases(known: Reconciler, run: Run) -> dict[str, Revision]:
    """What each alias means now, the default one under the empty name; those that mean nothing are left out."""
    usable = known.usable(run)
    named = ["", "latest", "best", "final", *sorted(alias for alias in run.aliases if alias)]
    found = {alias: run.select(alias or None, usable) for alias in named}
    return {alias: revision for alias, revision in found.items() if revision is not None}


def _state(known: Reconciler, default: Revision | None, revisions: list[dict[str, Any]]) -> tuple[str, str | None]:
    if default is not None:
        return known.state_of(default)
    newest = revisions[-1] if revisions else None
    return (newest["state"], newest["reason"]) if newest else ("gone", None)


def _in_order(run: Run) -> list[Revision]:
    """As they finished, the newest last."""
    order = {finish.revision: position for position, finish in enumerate(run.finishes)}
    return sorted(run.revisions.values(), key=lambda revision: order.get(revision.id, -1))


def _revision_view(known: Reconciler, revision: Revision, aliases: dict[str, Revision]) -> dict[str, Any]:
    state, reason = known.state_of(revision)
    resident = known.residency.find(revision.name)
    facts = revision.facts
    return {
        "id": revision.name,
        "revision": revision.name.partition("@")[2],
        "state": state,
        "reason": reason,
        "step": facts.step,
        "epoch": _number(facts.epoch),
        "train_loss": _number(facts.train_loss),
        "eval_loss": _number(facts.eval_loss),
        "eval_step": facts.eval_step,
        "metrics": {name: _number(value) for name, value in facts.metrics.items()},
        "digest": revision.digest,
        "rank": revision.rank,
        "size": revision.size,
        "source": revision.source,
        "created": revision.created,
        "repaired": revision.repaired,
        "aliases": [alias or revision.run for alias, target in aliases.items() if target.id == revision.id],
        "in_engine": resident is not None,
        "in_flight": resident.in_flight if resident else 0,
        "requests": known.requests.get(revision.id, 0),
    }


def _waiting_view(waiting: Waiting) -> dict[str, Any]:
    candidate = waiting.candidate
    label = f"step-{candidate.step}" if candidate.step is not None else candidate.kind
    return {
        "id": None,
        "revision": label,
        "state": waiting.state,
        "reason": waiting.reason,
        "step": candidate.step,
        "source": str(candidate.folder),
        "aliases": [],
        "in_engine": False,
        "in_flight": 0,
        "requests": 0,
    }


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is None or math.isfinite(value) else None
