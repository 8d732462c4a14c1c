"""`mix(sql@best=0.7,chat=0.3)`: a `model` that asks for a mix, read, and nothing of it looked up."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from lorakit.errors import Refused, UsageError
from lorakit.mix.methods.registry import RANGES, checked_options, method_named
from lorakit.mix.reduce import MOST

OPENS = "mix("
LONGEST = 4096  # letters
MOST_ADAPTERS = 32

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_FORM = "write mix(ADAPTER=WEIGHT,ADAPTER=WEIGHT), as in mix(sql@best=0.7,chat=0.3)"
_NESTED = "a mix is made of adapters, not of mixes: name the adapters of the inner one, their weights multiplied out"


@dataclass(frozen=True, slots=True)
class MixText:
    """A mix as it is written: each adapter by whatever names one, with its weight.

    `rank` is the largest of any module: None is as many as the server takes, "exact" that and nothing cut.
    """

    adapters: tuple[tuple[str, float], ...]
    method: str = "linear"
    rank: int | str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{name}={_shown(weight)}" for name, weight in self.adapters]
        said += [f"method={self.method}"] if self.method != "linear" else []
        said += [f"rank={self.rank}"] if self.rank is not None else []
        said += [f"{name}={value}" for name, value in self.options.items()]
        return f"{OPENS}{','.join(said)})"


def parse_mix(text: str) -> MixText:
    """Take a mix apart. An adapter without a weight has 1, and one that is named twice the sum, as for `lorakit mix`.

    `method`, `rank` and the options of the methods are no adapters here; one of such a name is `rank@latest`.

    Raises:
        Refused: it can't be read; says what is wrong with it, and how it is written.
    """
    if len(text) > LONGEST:
        raise Refused(f"a mix may be {LONGEST} letters long, and this one has {len(text)}: give it a name")
    if not (text.startswith(OPENS) and text.endswith(")")):
        raise Refused(f"'{text}' begins as a mix and has no end: {_FORM}")
    inner = text[len(OPENS) : -1]
    if OPENS in inner:
        raise Refused(f"'{text}': {_NESTED}")
    weights: dict[str, float] = {}
    given: dict[str, str] = {}
    for entry in inner.split(","):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if name in ("method", "rank", *RANGES):
            if name in given or not value:
                raise Refused(f"'{text}': {name} {'stands twice' if value else 'has no value'}; {_FORM}")
            given[name] = value
        else:
            weights[name] = weights.get(name, 0.0) + (_weight(text, name, value) if equals else _alone(text, name))
    if not 0 < len(weights) <= MOST_ADAPTERS:
        raise Refused(f"'{text}' names {len(weights)} adapters, and may name 1 to {MOST_ADAPTERS}: {_FORM}")
    rank = _rank(text, given.pop("rank", None))
    try:
        method = method_named(given.pop("method", "linear"))
        options = checked_options(method, {name: _value(value) for name, value in given.items()})
    except UsageError as error:
        raise Refused(f"'{text}': {error}") from None
    return MixText(tuple(weights.items()), method.name, rank, options)


def _alone(text: str, name: str) -> float:
    if not name:
        raise Refused(f"'{text}' has an empty place: {_FORM}")
    return 1.0


def _weight(text: str, name: str, value: str) -> float:
    weight = float(value) if _NUMBER.fullmatch(value) else float("nan")
    if not name or not isfinite(weight):
        raise Refused(f"'{text}': the weight of '{name}' has to be a finite number, and is '{value}'; {_FORM}")
    return weight


def _rank(text: str, value: str | None) -> int | str | None:
    if value is None or value == "exact":
        return value
    if not re.fullmatch("[0-9]{1,4}", value) or not 0 < int(value) <= MOST:
        raise Refused(f"'{text}': rank={value} has to be a whole number from 1 to {MOST}, or 'exact'")
    return int(value)


def _value(value: str) -> int | float | str:
    if re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    return float(value) if _NUMBER.fullmatch(value) else value


def _shown(weight: float) -> str:
    short = f"{weight:g}"
    return short if float(short) == weight else repr(weight)
