"""A state of a checkpoint that was read and checked, and what is left to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import Refused

NAMES = 5  # in a message


@dataclass(frozen=True, slots=True)
class Loaded:
    """What is loaded, in words, and what is not, with the reason."""

    state: str
    what: str
    left_out: str = ""

    def __str__(self) -> str:
        return f"{self.state} ({self.what})"


@dataclass(frozen=True, slots=True)
class Prepared:
    """`apply` loads it: nothing that could have been known before is left to fail."""

    loaded: Loaded
    apply: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Into:
    """What a state is loaded into, and how.

    `parts` are the model, optimizer, scheduler, trainer_state and loop of the training, by those names; `strict`
    refuses what does not fit; with `keeps_rates`, an optimizer's state comes without that of the scheduler, which then
    sets its own learning rates.
    """

    parts: Mapping[str, Any]
    strict: bool
    rank: int
    ranks: int
    keeps_rates: bool


def misfit(state: str, checkpoint: Path, reason: object, into: Into) -> Prepared:
    """Nothing to load. Raises Refused when it has to fit."""
    if into.strict:
        raise Refused(f"the {state} of '{checkpoint}' does not fit this training: {reason}. strict=False leaves it out")
    return Prepared(Loaded(state, "nothing", f"does not fit: {reason}"), lambda: None)


def named(keys: Iterable[str]) -> str:
    """The first few of some names."""
    names = list(keys)
    return f"{', '.join(names[:NAMES])}{more(names)}"


def more(names: list[str]) -> str:
    return f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
