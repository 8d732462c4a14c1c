"""How the revisions that answer for one name compare: what came of their last answers, side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any

from lorakit.server.following.guard import failed
from lorakit.server.requests.answered import Answered, Shadowed
from lorakit.server.sharing.texts import Agreement
from lorakit.store.catalog import Run
from lorakit.store.names import parse_selector, split_model
from lorakit.store.splits import Split

if TYPE_CHECKING:
    from lorakit.server.following.served import Served

WINDOW = 200  # answers whose times and lengths are remembered of each
LATELY = 4  # revisions of an alias that means one at a time
MOST_NAMES = 100  # without a split


def _window() -> deque[float]:
    return deque(maxlen=WINDOW)


@dataclass(slots=True)
class Tally:
    """Of one revision under one alias. Times in seconds and lengths in tokens, of the last answers that were none but
    good; all else since it began."""

    requests: int = 0
    errors: int = 0
    dropped: int = 0
    compared: int = 0
    equal: int = 0
    prefix: float = 0.0
    seconds: deque[float] = field(default_factory=_window)
    first_byte: deque[float] = field(default_factory=_window)
    generated: deque[float] = field(default_factory=_window)

    def add(self, answer: Answered) -> None:
        bad = failed(answer)
        self.requests += 1
        self.errors += bad is True
        if bad is not False:
            return
        self.seconds.append(answer.seconds)
        if answer.first_byte is not None:
            self.first_byte.append(answer.first_byte)
        if generated := answer.pieces if answer.completion_tokens is None else answer.completion_tokens:
            self.generated.append(generated)

    def compare(self, agreement: Agreement) -> None:
        self.compared += 1
        self.equal += agreement.equal
        self.prefix += agreement.prefix


Tallies = dict[tuple[str, int], Tally]  # by alias, and a revision's id; what answered last stands last


class Comparison:
    """Counts the answers that were asked for by a name or an alias; from nothing when the engine was started again."""

    def __init__(self, known: Served) -> None:
        self._known = known
        self._names: dict[str, Tallies] = {}  # the one that answered last stands last
        known.observers.append(self.answered)
        known.shadow_observers.append(self.shadowed)

    # what happens

    def answered(self, answer: Answered) -> None:
        if answer.revision is not None and (tally := self._tally(answer.model, answer.revision.id)) is not None:
            tally.add(answer)

    def shadowed(self, shadowed: Shadowed) -> None:
        tally = self._tally(shadowed.model, shadowed.revision.id)
        if tally is None:
            return
        if shadowed.answer is None:
            tally.dropped += 1
        else:
            tally.add(shadowed.answer)
        if shadowed.agreement is not None:
            tally.compare(shadowed.agreement)

    def begin(self, name: str, alias: str, go_on: Container[int]) -> None:
        """An alias is split from now on; only what is known of these revisions goes on."""
        tallies = self._names.get(name, {})
        for key in [key for key in tallies if key[0] == alias and key[1] not in go_on]:
            del tallies[key]

    def _tally(self, model: str, revision: int) -> Tally | None:
        """None where the model is no alias, or the revision is none of its own any more."""
        name, selector = split_model(model)
        run = self._known.runs.get(name)
        if run is None or revision not in run.revisions:
            return None
        if selector is not None and parse_selector(selector).alias is None:
            return None
        alias = selector or ""
        split = run.splits.get(alias)
        if split is not None and revision not in split.members:
            return None
        tallies = self._names.pop(name, {})
        self._names[name] = tallies
        known = tallies.pop((alias, revision), None)
        tallies[alias, revision] = tally = known or Tally()
        if known is None:
            self._forget_old(tallies, alias, split)
        return tally

    def _forget_old(self, tallies: Tallies, alias: str, split: Split | None) -> None:
        if split is None:
            for key in [key for key in tallies if key[0] == alias][:-LATELY]:
                del tallies[key]
        runs = self._known.runs
        idle = [name for name in self._names if name not in runs or not runs[name].splits]
        for name in idle[:-MOST_NAMES] if len(self._names) > MOST_NAMES else ():
            del self._names[name]

    # what is told

    def of(self, run: Run) -> list[dict[str, Any]]:
        """One row for each revision that a split of a name has; without a split, for each that answered lately."""
        tallies = self._names.get(run.name, {})
        if run.splits:
            return [
                _row(run, alias, id, split, tallies.get((alias, id), Tally()))
                for alias, split in run.splits.items()
                for id in split.members
                if id in run.revisions
            ]
        return [_row(run, alias, id, None, tally) for (alias, id), tally in tallies.items() if id in run.revisions]


def _row(run: Run, alias: str, id: int, split: Split | None, tally: Tally) -> dict[str, Any]:
    compared = tally.compared
    return {
        "revision": run.revisions[id].name,
        "aliases": [alias or run.name],
        "share": split.shares.get(id) if split is not None else None,
        "shadow": split is not None and id in split.shadows,
        "requests": tally.requests,
        "errors": tally.errors,
        "error_rate": tally.errors / tally.requests if tally.requests else None,
        "dropped": tally.dropped,
        "seconds": _quantiles(tally.seconds),
        "first_byte": _quantiles(tally.first_byte),
        "generated": {
            "mean": sum(tally.generated) / len(tally.generated) if tally.generated else None,
            "p50": _quantile(sorted(tally.generated), 0.5),
        },
        "agreement": {"compared": compared, "equal": tally.equal / compared, "prefix": tally.prefix / compared}
        if compared
        else None,
    }


def _quantiles(times: deque[float]) -> dict[str, float | None]:
    ordered = sorted(times)
    return {"p50": _quantile(ordered, 0.5), "p95": _quantile(ordered, 0.95)}


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest that so large a share of them does not exceed."""
    return ordered[ceil(share * len(ordered)) - 1] if ordered else None
