"""Which checkpoints, and in which order: pure functions over what is known of them."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal

from lorakit.checkpoints.metadata import Metadata
from lorakit.errors import NotFound, UsageError

NUMBERS = ("step", "epoch", "train_loss", "eval_loss", "eval_step", "rank", "size", "created")
FIELDS = tuple(field.name for field in fields(Metadata) if field.name != "metrics")
_TERM = re.compile(r"\s*([A-Za-z_][\w./-]*?)\s*(<=|>=|==|!=|<|>|=)\s*(.*?)\s*", re.S)
_AMOUNT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([kKMGT]?B)?")
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq, "==": operator.eq,
    "!=": operator.ne,
}  # fmt: skip

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Filter:
    """One condition. What is not known meets none, and of `aliases` one has to be the value (with `!=` none)."""

    field: str
    compare: str
    value: float | str

    def admits(self, row: Metadata) -> bool:
        found = value_of(row, self.field)
        if isinstance(found, tuple):
            return (self.value in found) == (self.compare != "!=")
        return found is not None and _COMPARE[self.compare](found, self.value)


def parse_filter(text: str) -> Filter:
    """`eval_loss<1.2`, `size>=1GB`, `state!=finished`, `aliases=prod`; any logged metric is a field of its name.

    Raises:
        UsageError: it is not FIELD, an operator and a value that fit one another.
    """
    term = _TERM.fullmatch(text)
    if term is None or not term[3]:
        raise UsageError(f"'{text}' is no filter: write a field, one of < <= > >= = !=, and a value: eval_loss<1.2")
    field, compare, said = term.groups()
    if field in FIELDS and field not in NUMBERS:
        if compare not in ("=", "==", "!="):
            raise UsageError(f"'{text}': {field} is a word, which = and != alone compare")
        return Filter(field, compare, said)
    amount = _AMOUNT.fullmatch(said)
    if amount is None or (amount[2] and field != "size"):
        near = [] if field in FIELDS else get_close_matches(field, FIELDS, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"'{text}': {field} is a number, and '{said}' is none{hint}")
    return Filter(field, compare, float(amount[1]) * _UNITS[amount[2] or "B"])


def admitted(rows: Sequence[Metadata], filters: Iterable[Filter]) -> list[Metadata]:
    """The rows that meet every filter, in their order.

    Raises:
        UsageError: a field is none of theirs; names the nearest.
    """
    wanted = list(filters)
    for each in wanted:
        _ensure_known(each.field, rows)
    return [row for row in rows if all(each.admits(row) for each in wanted)]


def in_order(rows: Sequence[Metadata], by: str) -> list[Metadata]:
    """Sorted by `FIELD`, `FIELD:asc` or `FIELD:desc`; what is not a number comes last, what is not known at the end.

    Raises:
        UsageError: as `admitted`, or what follows the colon is neither.
    """
    field, _, direction = by.partition(":")
    if direction not in ("", "asc", "desc"):
        raise UsageError(f"'{by}': sort by FIELD, FIELD:asc or FIELD:desc")
    _ensure_known(field, rows)
    found = [(value_of(row, field), row) for row in rows]
    known = [pair for pair in found if pair[0] not in (None, ()) and not _is_nan(pair[0])]
    known.sort(key=lambda pair: pair[0], reverse=direction == "desc")
    not_numbers = [row for value, row in found if _is_nan(value)]
    return [row for _, row in known] + not_numbers + [row for value, row in found if value in (None, ())]


def best_of(rows: Sequence[Metadata], metric: str = "eval_loss", mode: Mode | None = None) -> Metadata:
    """The finished one with the best value of its own step; NaN is worst, none is never best, of equals the first.

    Raises:
        NotFound: none has that metric; says what there is.
        UsageError: neither the name nor `mode` says whether less is better.
    """
    if mode is None and not metric.endswith("loss"):
        raise UsageError(f"say whether less or more of {metric} is better: --mode min or --mode max")
    finished = [row for row in rows if row.state == "finished"]
    measured = [(value, row) for row in finished if (value := row.metric(metric)) is not None]
    if not measured:
        raise NotFound(_why_none(rows, finished, metric))
    sign = -1 if mode == "max" else 1
    return min(measured, key=lambda pair: (math.isnan(pair[0]), 0.0 if math.isnan(pair[0]) else sign * pair[0]))[1]


def _why_none(rows: Sequence[Metadata], finished: Sequence[Metadata], metric: str) -> str:
    if not finished:
        last = f"; the last, '{rows[-1].path}', is {rows[-1].state}: {rows[-1].reason}" if rows else ""
        return f"no checkpoint is finished{last}"
    reason = f"none of {len(finished)} finished checkpoints has {metric} of its own step"
    if metric == "eval_loss" and any(row.eval_loss is not None for row in finished):
        return f"{reason}, as the evaluations are of other steps: evaluate where you save (eval_steps = save_steps)"
    there = sorted({name for row in finished for name in row.metrics or ()})
    return f"{reason}; there {'are ' + ', '.join(there) if there else 'is no other metric either'}"


def value_of(row: Metadata, field: str) -> Any:
    return getattr(row, field) if field in FIELDS else (row.metrics or {}).get(field)


def _ensure_known(field: str, rows: Sequence[Metadata]) -> None:
    metrics = sorted({name for row in rows for name in row.metrics or ()})
    if rows and field not in FIELDS and field not in metrics:
        near = get_close_matches(field, (*FIELDS, *metrics), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join((*FIELDS, *metrics))}"
        raise UsageError(f"no checkpoint has a field or metric '{field}': {hint}")


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
