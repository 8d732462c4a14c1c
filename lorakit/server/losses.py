"""`/v1/adapters/{name}/losses`: a run's losses over its steps, and where its checkpoints are on them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from lorakit.checkpoints.curves import Curve, Losses, losses_in
from lorakit.checkpoints.trainer_state import FILE
from lorakit.errors import InvalidFile
from lorakit.files.folders import read_json
from lorakit.server.access.given import Known
from lorakit.server.described import EVERYWHERE, errors
from lorakit.server.file_work import file_work
from lorakit.server.views import number
from lorakit.store.catalog import Revision, own_eval_loss

LOOKED_AT = 4  # newest checkpoints whose folders are asked for the trainer's log: the others may be gone
_REMEMBERED = 32

Points = Annotated[int, Query(ge=10, le=5000)]


class Logs:
    """What trainers logged, read again when their files change."""

    def __init__(self) -> None:
        self._known: OrderedDict[Path, tuple[int, Losses]] = OrderedDict()

    def of(self, folders: Sequence[Path]) -> Losses | None:
        """The log in the first of these folders that has one. It touches the disk."""
        for folder in folders:
            file = folder / FILE
            try:
                written = file.stat().st_mtime_ns
            except OSError:
                continue
            known = self._known.get(file)
            if known is None or known[0] != written:
                try:
                    log = read_json(file).get("log_history")
                except InvalidFile:
                    continue
                entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
                known = self._known[file] = (written, losses_in(entries))
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
            return known[1]
        return None


def loss_router() -> APIRouter:
    router = APIRouter(tags=["lorakit"], responses=EVERYWHERE | errors(400, 404))
    router.add_api_route("/v1/adapters/{name}/losses", losses, methods=["GET"])
    return router


async def losses(request: Request, known: Known, name: str, points: Points = 500) -> dict[str, Any]:
    """Train and eval losses as the run's trainer logged them, or else as its checkpoints say, each as [step, loss]; and
    its checkpoints. Of each at most about so many points, with all that stands out."""
    run = known.run_named(name)
    order = {finish.revision: place for place, finish in enumerate(run.finishes)}
    revisions = list(run.revisions.values())
    return await file_work(_told, request.app.state.logs, name, revisions, order, points)


def _told(logs: Logs, name: str, revisions: list[Revision], order: dict[int, int], points: int) -> dict[str, Any]:
    revisions.sort(key=lambda revision: order.get(revision.id, -1))
    saved = [revision for revision in revisions if revision.facts.step is not None]
    local = [Path(revision.source) for revision in reversed(saved) if revision.source.startswith("/")]
    found = logs.of(local[:LOOKED_AT]) or _of_checkpoints(saved)
    return {
        "object": "losses",
        "name": name,
        "train": _points(thinned(found.train, points)),
        "eval": _points(thinned(found.eval, points)),
        "checkpoints": [
            {
                "revision": revision.name,
                "step": revision.facts.step,
                "train_loss": number(revision.facts.train_loss),
                "eval_loss": number(own_eval_loss(revision.facts)),
            }
            for revision in _spread(saved, points)
        ],
    }


def _of_checkpoints(saved: Sequence[Revision]) -> Losses:
    said = [{"step": one.facts.step, "loss": one.facts.train_loss} for one in saved]
    return losses_in([*said, *({"step": one.facts.eval_step, "eval_loss": one.facts.eval_loss} for one in saved)])


def thinned(curve: Curve, points: int) -> Curve:
    """About so many of its points: of each stretch the lowest and the highest, so that no peak is lost, its gaps, and
    both ends."""
    count = len(curve.steps)
    if count <= points:
        return curve
    stretch = math.ceil(count / max(1, points // 2))
    kept = {0, count - 1}
    for begin in range(0, count, stretch):
        places = range(begin, min(begin + stretch, count))
        finite = [place for place in places if math.isfinite(curve.values[place])]
        if finite:
            kept |= {min(finite, key=curve.values.__getitem__), max(finite, key=curve.values.__getitem__)}
        if len(finite) < len(places):
            kept.add(next(place for place in places if not math.isfinite(curve.values[place])))
    chosen = sorted(kept)
    return Curve(tuple(curve.steps[place] for place in chosen), tuple(curve.values[place] for place in chosen))


def _spread(revisions: Sequence[Revision], most: int) -> Sequence[Revision]:
    """At most so many, evenly, the first and the last among them."""
    if len(revisions) <= most:
        return revisions
    return [revisions[place * (len(revisions) - 1) // (most - 1)] for place in range(most)]


def _points(curve: Curve) -> list[list[float | None]]:
    return [[step, number(value)] for step, value in zip(curve.steps, curve.values, strict=True)]
