"""Names that several revisions share: given, changed, and taken from what fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import fsum

from lorakit.errors import NotFound, Refused
from lorakit.server.following.changes import Changes
from lorakit.server.following.served import Served, about, split_text
from lorakit.server.sharing.comparison import Comparison
from lorakit.store.catalog import Revision, Run
from lorakit.store.names import check_alias, model_name
from lorakit.store.splits import Split, are_whole, split_said

MOST_SHARES = 8
MOST_SHADOWS = 3


@dataclass(frozen=True, slots=True)
class NewSplit:
    """What is asked for: whatever names each revision, with its share of 1. Without a seed it is that of before."""

    shares: Sequence[tuple[str, float]]
    shadows: Sequence[str] = ()
    seed: int | None = None


class Splitting:
    """`prove` has a revision tried out before a request may meet it."""

    def __init__(
        self, known: Served, changes: Changes, comparison: Comparison, prove: Callable[[Revision], Awaitable[None]]
    ) -> None:
        self._known = known
        self._changes = changes
        self._comparison = comparison
        self._prove = prove

    async def set(self, name: str, alias: str, new: NewSplit) -> None:
        """Have several revisions share an alias, from the next request on; the default one then stays with them.

        Raises:
            NotFound: there is no such adapter, or no such revision.
            Refused: the alias can't be one, or the shares are none.
            LoadFailed, NoSlot: a revision is not to be had in the engine; nothing is changed.
        """
        alias = own_alias(name, alias)
        run = self._known.run_named(name)
        answering = [named_in(run, selector, self._known) for selector, _ in new.shares]
        shadows = [named_in(run, selector, self._known) for selector in new.shadows]
        shares = _checked(answering, [share for _, share in new.shares], shadows)
        for revision in (*answering, *shadows):
            await self._prove(revision)
        async with self._changes.of(name):
            run = self._known.run_named(name)
            for revision in (*answering, *shadows):
                if revision.id not in run.revisions:
                    raise NotFound(f"'{revision.name}' was removed meanwhile")
            before = run.splits.get(alias)
            seed = new.seed if new.seed is not None else before.seed if before is not None else 0
            split = Split(shares, tuple(shadow.id for shadow in shadows), seed)
            why = f"split: {split_text(split_said(split, run.revisions))}"
            main = run.revisions[split.main]
            await self._known.move(run, alias, main, why, pinned=None if alias else True, split=split)
            self._comparison.begin(name, alias, split.as_in(before) if before is not None else ())

    async def take_out(self, revision: Revision, reason: str) -> None:
        """Have it answer no more for any name that others share with it, and for none as a shadow; its share goes to
        the main revision of each."""
        async with self._changes.of(revision.run):
            run = self._known.runs.get(revision.run)
            if run is None or revision.id not in run.revisions:
                return
            for alias, split in list(run.splits.items()):
                if split.can_spare(revision.id):
                    await self._without(run, alias, split, revision, reason)

    async def _without(self, run: Run, alias: str, split: Split, revision: Revision, reason: str) -> None:
        left, is_shadow = split.without(revision.id), revision.id in split.shadows
        main = run.revisions[left.main]
        await self._known.move(
            run, alias, main, f"{'shadow dropped' if is_shadow else 'automatic rollback'}: {reason}",
            passed_over=None if is_shadow else {revision.id: reason}, split=None if left.is_plain else left,
        )  # fmt: skip
        if not is_shadow:
            shown = model_name(run.name, alias)
            told = f"{shown} asks {revision.name} no more: {reason}"
            self._known.events.tell("rollback", told, alias=shown, reason=reason, to=main.name, **about(revision))

    async def look(self) -> None:
        """Take out what the engine has refused since it was given a share."""
        for run in list(self._known.runs.values()):
            for _, revision in list(run.split_among()):
                state, reason = self._known.state_of(revision)
                if state == "refused":
                    await self.take_out(revision, f"the engine refuses it: {reason}")


def own_alias(name: str, alias: str) -> str:
    """An alias as it is kept: the default one, which has the name of its run, is empty.

    Raises:
        Refused: it can't be one.
    """
    if alias in ("", name, "default"):
        return ""
    check_alias(alias)
    return alias


def named_in(run: Run, selector: str, known: Served) -> Revision:
    """What names one of a run's revisions that can be served; `sql@step-500` is `step-500` there.

    Raises:
        NotFound: there is none.
    """
    selector = selector.removeprefix(f"{run.name}@")
    revision = run.select(selector, known.refused)
    if revision is None:
        raise NotFound(f"'{run.name}' has no revision '{selector}'")
    return revision


def _checked(answering: Sequence[Revision], shares: Sequence[float], shadows: Sequence[Revision]) -> dict[int, float]:
    """The shares by id, 1 together.

    Raises:
        Refused: they are not, or a revision stands twice, or there are too many.
    """
    if not 0 < len(answering) <= MOST_SHARES or len(shadows) > MOST_SHADOWS:
        raise Refused(
            f"an alias is shared by {MOST_SHARES} revisions at most, with {MOST_SHADOWS} shadows, not by "
            f"{len(answering)} with {len(shadows)}"
        )
    names = [revision.name for revision in (*answering, *shadows)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Refused(f"'{min(twice)}' is named twice: each revision has one share, or is a shadow")
    total = fsum(shares)
    if not (all(share > 0 for share in shares) and are_whole(shares)):
        raise Refused(f"the shares are {total:.4g} together, and have to be 1, each of them above 0")
    return {revision.id: share / total for revision, share in zip(answering, shares, strict=True)}
