"""Which checkpoints of a run stay: pure policies on values, joined by "any".

A policy says which checkpoints it keeps, and why; one that any policy keeps stays, with all the reasons there are. The
shape is that of Orbax's preservation policies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lorakit.errors import UsageError

Mode = Literal["min", "max"]
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished checkpoint. `size` in bytes, `written` in seconds since 1970, `metrics` measured at its own step."""

    name: str
    step: int
    size: int = 0
    written: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


class Policy(Protocol):
    """Keeps some checkpoints, whatever the other policies say."""

    def reasons(self, checkpoints: Sequence[Checkpoint], now: float) -> dict[str, str]:
        """Why it keeps those that it keeps, by name; `now` in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class KeepLast:
    """The `count` largest steps.

    Raises:
        UsageError: `count` is below 1.
    """

    count: int

    def __post_init__(self) -> None:
        _at_least_one("keep-last", self.count)

    def reasons(self, checkpoints: Sequence[Checkpoint], now: float) -> dict[str, str]:
        last = sorted(checkpoints, key=_by_step, reverse=True)[: self.count]
        return {checkpoint.name: f"of the last {self.count}" for checkpoint in last}


@dataclass(frozen=True, slots=True)
class KeepBest:
    """The `count` best by a metric of their own step; of equals the earlier. What is not finite is never best.

    Raises:
        UsageError: `count` is below 1.
    """

    count: int
    metric: str = "eval_loss"
    mode: Mode = "min"

    def __post_init__(self) -> None:
        _at_least_one("keep-best", self.count)

    def reasons(self, checkpoints: Sequence[Checkpoint], now: float) -> dict[str, str]:
        sign = 1 if self.mode == "min" else -1
        ranked = sorted(self.measured(checkpoints), key=lambda one: (sign * one.metrics[self.metric], *_by_step(one)))
        return {
            one.name: f"of the best {self.count} by {self.metric} ({one.metrics[self.metric]:.4g})"
            for one in ranked[: self.count]
        }

    def measured(self, checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
        """Those that the metric is known of."""
        return [one for one in checkpoints if math.isfinite(one.metrics.get(self.metric, math.nan))]


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """The steps that are multiples of `steps`.

    Raises:
        UsageError: `steps` is below 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _at_least_one("keep-every", self.steps)

    def reasons(self, checkpoints: Sequence[Checkpoint], now: float) -> dict[str, str]:
        return {one.name: f"a multiple of {self.steps} steps" for one in checkpoints if one.step % self.steps == 0}


@dataclass(frozen=True, slots=True)
class KeepFor:
    """Those that were written less than so many seconds ago.

    Raises:
        UsageError: it is no finite number above 0.
    """

    seconds: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise UsageError(f"keep-for {self.seconds:g} s keeps nothing: give a time above 0")

    def reasons(self, checkpoints: Sequence[Checkpoint], now: float) -> dict[str, str]:
        age = in_words(self.seconds)
        return {one.name: f"younger than {age}" for one in checkpoints if now - one.written < self.seconds}


@dataclass(frozen=True, slots=True)
class Retention:
    """What a run's checkpoints stay for.

    `max_bytes` keeps, of those that nothing else keeps, the largest steps whose sizes, with all else that stays, come
    to no more than that. The smallest steps go first: where one does not fit, none below it stays for this reason. What
    else stays is counted, and stays though it be more alone. So it is no limit for the others, and alone it is
    "the newest that fit"; a further policy may leave it less room, and the others keep what they keep whatever is asked
    beside them.

    `spare_newest`: the largest step stays, which training resumes from, and so does what was written last, which is
    another one when training began again below it.

    Raises:
        UsageError: `max_bytes` is below 1, or nothing says what to keep.
    """

    policies: tuple[Policy, ...] = ()
    max_bytes: int | None = None
    spare_newest: bool = True

    def __post_init__(self) -> None:
        if self.max_bytes is not None:
            _at_least_one("max-bytes", self.max_bytes)
        if not self.policies and self.max_bytes is None:
            raise UsageError(
                "nothing says which checkpoints to keep, and all others would go: "
                "give --keep-last, --keep-best, --keep-every, --keep-for or --max-bytes"
            )

    def decide(
        self,
        checkpoints: Sequence[Checkpoint],
        *,
        now: float,
        held: Mapping[str, Sequence[str]] | None = None,
        beside: int = 0,
    ) -> dict[str, tuple[str, ...]]:
        """Why each checkpoint stays, by name; one without a reason goes.

        Args:
            now: seconds since 1970.
            held: why some stay whatever the policies say, by name.
            beside: bytes of what stays and is not judged here, which count for `max_bytes`.
        """
        held = held or {}
        said = [policy.reasons(checkpoints, now) for policy in self.policies]
        if self.spare_newest:
            said.insert(0, newest(checkpoints))
        kept = {
            one.name: (*held.get(one.name, ()), *(reasons[one.name] for reasons in said if one.name in reasons))
            for one in checkpoints
        }
        if self.max_bytes is None:
            return kept
        counted = beside + sum(one.size for one in checkpoints if kept[one.name])
        free = [one for one in checkpoints if not kept[one.name]]
        reason = (f"fits into {self.max_bytes / 1e9:g} GB",)
        return kept | {one.name: reason for one in _newest_within(free, self.max_bytes - counted)}


def newest(checkpoints: Sequence[Checkpoint]) -> dict[str, str]:
    """What training would go on from: the largest step, and what was written last; why, by name."""
    if not checkpoints:
        return {}
    written = max(checkpoints, key=lambda one: (one.written, _by_step(one)))
    step = max(checkpoints, key=_by_step)
    return {written.name: "written last", step.name: "the newest"}


def in_words(seconds: float) -> str:
    """`7 d`, `1.5 h`: in the largest unit that there is one of."""
    scale, unit = next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])
    return f"{seconds / scale:.3g} {unit}"


def _newest_within(checkpoints: Iterable[Checkpoint], room: int) -> list[Checkpoint]:
    """From the largest step on, as long as they fit into so many bytes."""
    fitting = []
    for checkpoint in sorted(checkpoints, key=_by_step, reverse=True):
        room -= checkpoint.size
        if room < 0:
            break
        fitting.append(checkpoint)
    return fitting


def _by_step(checkpoint: Checkpoint) -> tuple[int, float, str]:
    """`checkpoint-5` and `checkpoint-05` are the same step."""
    return checkpoint.step, checkpoint.written, checkpoint.name


def _at_least_one(what: str, number: int) -> None:
    if number < 1:
        raise UsageError(f"{what} {number} keeps nothing: give a number above 0")
