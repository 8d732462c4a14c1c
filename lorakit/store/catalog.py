"""Which revision a name means: pure functions over what is known of one run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lorakit.store.names import model_name, parse_selector, revision_name
from lorakit.store.splits import Split

Label = Literal["step", "final", "plain", "mix"]


def label_of(kind: Label, step: int | None) -> str:
    """What stands between a run's name and a digest: `step-500`, `final`, or nothing."""
    if kind == "step":
        return f"step-{step}"
    return "final" if kind == "final" else ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a trainer said of a checkpoint; None is not known."""

    step: int | None = None
    epoch: float | None = None
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def completed_by(self, earlier: Facts) -> Facts:
        """The same, with what was known earlier where nothing is said now: not every copy of a checkpoint has a log."""
        said = {name: value for name, value in asdict(self).items() if value not in (None, {})}
        return Facts(**{**asdict(earlier), **said})


@dataclass(frozen=True, slots=True)
class Revision:
    """An immutable copy of an adapter in the store."""

    id: int
    run: str
    kind: Label
    digest: str
    folder: Path
    facts: Facts
    rank: int
    size: int
    source: str
    created: float
    repaired: str | None = None

    @property
    def label(self) -> str:
        return label_of(self.kind, self.facts.step)

    @property
    def name(self) -> str:
        return revision_name(self.run, self.label, self.digest)


@dataclass(frozen=True, slots=True)
class Finish:
    """A revision finished, in the order in which it was seen; the same content may finish again."""

    revision: int
    attempt: int


def attempt_of(kind: Label, step: int | None, last: int | None, largest: int | None) -> int:
    """The attempt that something which finishes now belongs to: a step not above an earlier one begins a new one.

    `last` is the attempt of what finished before it, `largest` the largest step of that attempt; None for none.
    """
    if last is None:
        return 1
    if kind != "step" or step is None or largest is None:
        return last
    return last + 1 if step <= largest else last


def latest(finishes: Sequence[Finish], revisions: Mapping[int, Revision]) -> Revision | None:
    """The largest step of the last attempt; the run's own root, or an adapter that is no checkpoint, is newer."""
    attempt, found, newest_so_far = None, None, (False, -1)
    for order in range(len(finishes) - 1, -1, -1):  # asked for at every request to `@latest`
        revision = revisions.get(finishes[order].revision)
        if revision is None:
            continue
        if attempt is not None and finishes[order].attempt != attempt:
            break
        attempt = finishes[order].attempt
        is_step = revision.kind == "step"
        rank = (not is_step, (revision.facts.step or 0) if is_step else order)
        if rank > newest_so_far:  # of equals the last
            found, newest_so_far = revision, rank
    return found


def best(finishes: Sequence[Finish], revisions: Mapping[int, Revision]) -> Revision | None:
    """The lowest eval_loss measured at the checkpoint's own step; of equals the one that came first."""
    found, lowest = None, (True, math.inf)
    for finish in finishes:
        revision = revisions.get(finish.revision)
        loss = own_eval_loss(revision.facts) if revision is not None else None
        if loss is not None and (found is None or _nan_last(loss) < lowest):
            found, lowest = revision, _nan_last(loss)
    return found


def own_eval_loss(facts: Facts) -> float | None:
    """The eval_loss when it was measured at this very step."""
    return facts.eval_loss if facts.step is not None and facts.eval_step == facts.step else None


def _nan_last(loss: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(loss) else (False, loss)


def newest(candidates: Iterable[Revision], finishes: Sequence[Finish]) -> Revision | None:
    """Of some revisions, the one that finished last."""
    order = {finish.revision: position for position, finish in enumerate(finishes)}
    return max(candidates, key=lambda revision: order.get(revision.id, -1), default=None)


@dataclass(slots=True)
class Run:
    """All that is known of one name: revisions by id, finishes in order, aliases that a person or `follow` set, and
    splits of these, whose main revisions they mean."""

    name: str
    revisions: dict[int, Revision] = field(default_factory=dict)
    finishes: list[Finish] = field(default_factory=list)
    aliases: dict[str, int] = field(default_factory=dict)
    pinned: bool = False
    splits: dict[str, Split] = field(default_factory=dict)

    def split_among(self) -> Iterator[tuple[str, Revision]]:
        """Each alias that is split, with each revision that answers for it, or beside it."""
        for alias, split in self.splits.items():
            yield from ((alias, self.revisions[id]) for id in split.members if id in self.revisions)

    def pointed_at(self) -> Iterator[tuple[str, Revision]]:
        """Each name with a revision that it means or shares: of the aliases that were set, and those worked out."""
        for alias in dict.fromkeys((*self.aliases, "latest", "best")):
            revision = self.select(alias or None)
            if revision is not None:
                yield model_name(self.name, alias), revision
        for alias, revision in self.split_among():
            yield model_name(self.name, alias), revision

    def without(self, ids: Collection[int]) -> Mapping[int, Revision]:
        """The revisions but for these, which are few where the revisions are many."""
        if not any(id in self.revisions for id in ids):
            return self.revisions
        return {id: revision for id, revision in self.revisions.items() if id not in ids}

    def select(self, text: str | None, unusable: Collection[int] = ()) -> Revision | None:
        """What `name@text` means, but for the unusable revisions; None when nothing.

        The default alias is kept in `aliases` under the empty name.
        """
        revisions = self.without(unusable)
        if text is None:
            return revisions.get(self.aliases.get("", -1))
        if text == "latest":
            return latest(self.finishes, revisions)
        if text == "best":
            return best(self.finishes, revisions)
        if text == "final":
            return newest((r for r in revisions.values() if r.kind == "final"), self.finishes)
        if text and text in self.aliases:
            return revisions.get(self.aliases[text])
        wanted = parse_selector(text)
        if wanted.alias is not None:
            return None
        found = [
            revision
            for revision in revisions.values()
            if (wanted.step is None or (revision.kind == "step" and revision.facts.step == wanted.step))
            and (not wanted.final or revision.kind == "final")
            and revision.digest.startswith(wanted.digest or "")
        ]
        return newest(found, self.finishes)
