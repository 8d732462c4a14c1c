"""`lorakit.diff_tensors`: what changed from one checkpoint to the next, whatever wrote them.

report = lorakit.diff_tensors("runs/full/checkpoint-500", "runs/full/checkpoint-1000")
report.stages[1].most_changed()[0].change.lost

Models, regular checkpoints, torch files and distributed checkpoints, tensor by tensor and value by value.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from lorakit.adapters.patterns import names
from lorakit.adapters.truncation import one_thread
from lorakit.checkpoints.tensors import Tensors, listed, open_tensors
from lorakit.errors import UsageError
from lorakit.mix.changes import Change, Closeness, State, TensorChange, tensor_changes

WEIGHTS = "weights"  # what a file that holds nothing else is called


@dataclass(frozen=True, slots=True)
class ValueChange:
    """A number or a word beside the tensors; `there` says whether it stands in the first and in the second at all."""

    name: str
    before: Any
    after: Any
    there: tuple[bool, bool] = (True, True)

    def as_dict(self) -> dict[str, Any]:
        state = {(True, False): "only_before", (False, True): "only_after"}.get(self.there, "different")
        return {"value": self.name, "state": state, "before": _as_data(self.before), "after": _as_data(self.after)}


@dataclass(frozen=True, slots=True)
class GroupChange:
    """What belongs together in a checkpoint (`model`, `optimizer`), at one stage, beside the stage before."""

    name: str
    changes: tuple[TensorChange, ...]

    @property
    def change(self) -> Change | None:
        """Over all tensors that both have and that can be subtracted; None where there are none, or no finite sum."""
        known = [one.change for one in self.changes if one.change is not None]
        whole = reduce(Change.plus, known) if known else None
        return whole if whole is not None and whole.is_finite else None

    @property
    def not_counted(self) -> tuple[str, ...]:
        """The tensors that are in no sum: they came or went, or can't be subtracted."""
        return tuple(one.name for one in self.changes if one.change is None)

    @property
    def largest(self) -> float | None:
        return max((one.largest for one in self.changes if one.largest is not None), default=None)

    def count(self, state: State) -> int:
        return sum(one.state == state for one in self.changes)

    def as_dict(self) -> dict[str, Any]:
        change = self.change
        return {
            "group": self.name,
            "tensors": len(self.changes),
            "not_counted": len(self.not_counted),
            "norms": change and [sqrt(change.before), sqrt(change.after)],
            "difference": change and sqrt(change.difference),
            "lost": change and change.lost,
            "cosine": change and change.cosine,
            "largest": self.largest,
        }


@dataclass(frozen=True, slots=True)
class TensorsStage:
    """One checkpoint of the sequence; `changes` are of those tensors that it or the stage before it has."""

    path: str
    tensors: int
    changes: tuple[TensorChange, ...] = ()
    values: tuple[ValueChange, ...] = ()

    def count(self, state: State) -> int:
        return sum(change.state == state for change in self.changes)

    def groups(self) -> list[GroupChange]:
        names = dict.fromkeys(change.group for change in self.changes)
        return [GroupChange(name or WEIGHTS, tuple(one for one in self.changes if one.group == name)) for name in names]

    def most_changed(self) -> list[TensorChange]:
        """Those that aren't equal: what came, went or changed its shape first, then by how much was lost."""
        changed = [change for change in self.changes if change.state != "equal"]
        return sorted(changed, key=lambda one: -(_loss(one.change) if one.change else float("inf")))

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "tensors": self.tensors,
            "groups": [group.as_dict() for group in self.groups()],
            "changes": [change.as_dict() for change in self.changes],
            "values": [value.as_dict() for value in self.values],
        }


@dataclass(frozen=True, slots=True)
class TensorsReport:
    """The checkpoints in the order they were named."""

    stages: tuple[TensorsStage, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {"stages": [stage.as_dict() for stage in self.stages], "notes": list(self.notes)}


def diff_tensors(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *more: str | os.PathLike[str],
    pattern: str = "*",
    closeness: Closeness | None = None,
) -> TensorsReport:
    """Say what changed from each folder or file to the next. Two tensors are in memory at once, in blocks.

    Args:
        pattern: these tensors alone: "*.layers.0.*" as a shell would, "q_proj" or "q_proj.weight" as the end of a path.
        closeness: which tensors are called close; as numpy's allclose without.

    Raises:
        UsageError: no tensor matches.
        NotFound, Incomplete, InvalidFile, Refused: as `open_tensors`.
        Conflict: a file was written again meanwhile.
    """
    opened = [_matching(open_tensors(Path(path)), pattern) for path in (a, b, *more)]
    if not any(one.stored for one in opened):
        raise UsageError(f"no tensor matches {pattern!r}")
    with one_thread():
        stages = [
            TensorsStage(
                str(later.path),
                len(later.stored),
                tensor_changes(earlier.stored, later.stored, closeness, {**later.groups, **earlier.groups}),
                _value_changes(earlier, later),
            )
            for earlier, later in pairwise(opened)
        ]
    for one in opened:
        one.ensure_unchanged()
    first = TensorsStage(str(opened[0].path), len(opened[0].stored))
    told = dict.fromkeys(note for one in opened for note in one.notes)
    return TensorsReport((first, *stages), (*told, *_strangers(opened), *_not_counted(stages)))


def _matching(tensors: Tensors, pattern: str) -> Tensors:
    stored = {name: one for name, one in tensors.stored.items() if _means(pattern, name)}
    values = {name: one for name, one in tensors.values.items() if _means(pattern, name)}
    return replace(tensors, stored=stored, values=values)


def _means(pattern: str, name: str) -> bool:
    return names(pattern, name) or names(pattern, name.rpartition(".")[0])


def _value_changes(before: Tensors, after: Tensors) -> tuple[ValueChange, ...]:
    found = (
        ValueChange(
            name, before.values.get(name), after.values.get(name), (name in before.values, name in after.values)
        )
        for name in {**before.values, **after.values}
    )
    return tuple(one for one in found if not all(one.there) or not _same(one.before, one.after))


def _same(one: Any, other: Any) -> bool:
    """NaN is the same as NaN."""
    return type(one) is type(other) and (one == other or repr(one) == repr(other))


def _strangers(opened: Sequence[Tensors]) -> tuple[str, ...]:
    return tuple(
        f"'{earlier.path}' and '{later.path}' have no tensor of the same name: they are of different kinds, or their "
        f"writers name tensors differently"
        for earlier, later in pairwise(opened)
        if not earlier.stored.keys() & later.stored.keys()
    )


def _not_counted(stages: Sequence[TensorsStage]) -> tuple[str, ...]:
    left = [[name for group in stage.groups() for name in group.not_counted] for stage in stages]
    return tuple(
        f"in no norm of '{stage.path}': {listed(names)} (came, went, or can't be subtracted)"
        for stage, names in zip(stages, left, strict=True)
        if names and any(one.before and one.after for one in stage.changes)
    )


def _loss(change: Change) -> float:
    return float("inf") if change.difference and not change.before else change.lost or 0.0


def _as_data(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_data(one) for one in value]
    return repr(value) if isinstance(value, complex) or (isinstance(value, float) and not isfinite(value)) else value
