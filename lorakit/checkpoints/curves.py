"""The losses of a run over its steps, as its trainer logged them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.checkpoints.metadata import Metadata
from lorakit.checkpoints.trainer_state import FILE
from lorakit.errors import InvalidFile
from lorakit.files.folders import read_json

NAN = math.nan
LARGEST = 1e100  # what is beyond can't be drawn: differences and products of such are no numbers


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over steps, of the same number; NaN is a gap: the value was none, or beyond `LARGEST`, or training began
    again there."""

    steps: tuple[float, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Losses:
    """What was logged while training, and at evaluations."""

    train: Curve = Curve()
    eval: Curve = Curve()

    def __bool__(self) -> bool:
        return any(math.isfinite(value) for curve in (self.train, self.eval) for value in curve.values)


def losses_of(rows: Sequence[Metadata]) -> Losses:
    """From the log of the newest finished checkpoint that has one, else from what is known of each checkpoint."""
    for row in reversed(rows):
        if row.state == "finished":
            try:
                log = read_json(Path(row.path) / FILE).get("log_history")
            except InvalidFile:
                continue
            if isinstance(log, list):
                return losses_in([entry for entry in log if isinstance(entry, dict)])
    known = [{"step": row.step, "loss": row.train_loss} for row in rows]
    known += [{"step": row.eval_step, "eval_loss": row.eval_loss} for row in rows]
    return losses_in(known)


def losses_in(log: Iterable[Mapping[str, Any]]) -> Losses:
    """The entries of a `log_history`, in its order."""
    entries = list(log)
    return Losses(_curve(entries, "loss"), _curve(entries, "eval_loss"))


def _curve(log: Iterable[Mapping[str, Any]], name: str) -> Curve:
    points: list[tuple[float, float]] = []
    for entry in log:
        step, value = _number(entry.get("step")), _number(entry.get(name))
        if step is None or value is None or not abs(step) < LARGEST:
            continue
        if points and step <= points[-1][0]:
            points.append((step, NAN))
        points.append((step, value if abs(value) < LARGEST else NAN))
    return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))


def _number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:  # a whole number too large for a float
        return None
