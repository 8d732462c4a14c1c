"""What all machines know of one run: a value, as it stands in the bucket, and the changes that it can take.

A revision has one name everywhere, its key: `step-500-<sha256>`, `final-<sha256>`, or the digest alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lorakit.errors import InvalidFile, LorakitError, Refused
from lorakit.store.catalog import Facts, Label, attempt_of, label_of
from lorakit.store.names import check_alias, revision_name

FORMAT = 1
REMEMBERED = 16  # targets of one alias before the one that it has now
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KINDS = ("step", "final", "plain")


def key_of(kind: Label, step: int | None, digest: str) -> str:
    """The one name of a revision everywhere."""
    label = label_of(kind, step)
    return f"{label}-{digest}" if label else digest


@dataclass(frozen=True, slots=True)
class Recorded:
    """A revision, but for what is each machine's own: its number and its folder."""

    kind: Label
    digest: str
    facts: Facts
    rank: int
    size: int
    source: str
    created: float
    uid: str
    repaired: str | None = None

    @property
    def key(self) -> str:
        return key_of(self.kind, self.facts.step, self.digest)

    @property
    def label(self) -> str:
        return label_of(self.kind, self.facts.step)


@dataclass(frozen=True, slots=True)
class Finished:
    """A revision finished; `by` whom it was seen, and `stamp` what its files were like then."""

    key: str
    attempt: int
    by: str = ""
    stamp: str = ""


@dataclass(frozen=True, slots=True)
class Move:
    """An alias was pointed at a revision, `at` seconds since 1970."""

    key: str
    why: str
    at: float


@dataclass(frozen=True, slots=True)
class Meant:
    """What an alias means: the last of its moves; and whom it asks, where it is split."""

    moves: tuple[Move, ...]
    shares: Mapping[str, float] = field(default_factory=dict)
    shadows: tuple[str, ...] = ()
    seed: int = 0

    @property
    def target(self) -> str:
        return self.moves[-1].key

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.target, *self.shares, *self.shadows)))

    def means_as(self, other: Meant | None) -> bool:
        """Whether the next request is answered alike, however that came to be."""
        return other is not None and (self.target, self.shares, self.shadows, self.seed) == (
            other.target, other.shares, other.shadows, other.seed,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunState:
    """One run. Each `version` differs from the one before by one `change`, which has a name of its own. A run that is
    forgotten stays as this alone, so that who was away is told."""

    version: int = 0
    change: str = ""
    forgotten: bool = False
    revisions: Mapping[str, Recorded] = field(default_factory=dict)
    finishes: tuple[Finished, ...] = ()
    aliases: Mapping[str, Meant] = field(default_factory=dict)
    pinned: bool = False
    passed_over: Mapping[str, str] = field(default_factory=dict)

    @property
    def named(self) -> set[str]:
        """The keys that aliases mean, or ask."""
        return {key for meant in self.aliases.values() for key in meant.members}

    @property
    def digests(self) -> set[str]:
        return {recorded.digest for recorded in self.revisions.values()}

    # changes

    def with_added(
        self, run: str, recorded: Recorded, *, finished: bool, late: bool, by: str, stamp: str, looked_before: bool
    ) -> RunState:
        """One more revision, or what is known of it now.

        Args:
            finished, late: as `Store.add` has them.
            looked_before: the machine had taken this folder in before; where it had not, and the revision is here, it
                is what another machine saw finish.

        Raises:
            Refused: another content of the same step has the same first eight digits.
        """
        alike = [
            one for one in self.revisions.values()
            if (one.kind, one.facts.step, one.digest[:8]) == (recorded.kind, recorded.facts.step, recorded.digest[:8])
        ]  # fmt: skip
        if any(one.digest != recorded.digest for one in alike):
            name = revision_name(run, label_of(recorded.kind, recorded.facts.step), recorded.digest)
            raise Refused(f"its name, {name}, is another's already: their digests begin alike")
        if alike:
            known = alike[0]
            facts = recorded.facts.completed_by(known.facts)
            recorded = replace(recorded, facts=facts, created=known.created, uid=known.uid)
        state = replace(self, forgotten=False, revisions={**self.revisions, recorded.key: recorded})
        seen = any((one.key, one.stamp) == (recorded.key, stamp) and one.by != by for one in self.finishes)
        if alike and (not finished or not looked_before or seen):
            return state
        step = None if late else recorded.facts.step
        attempt = attempt_of(recorded.kind, step, *self._last_attempt())
        return replace(state, finishes=(*state.finishes, Finished(recorded.key, attempt, by, stamp)))

    def _last_attempt(self) -> tuple[int | None, int | None]:
        last = max((one.attempt for one in self.finishes), default=None)
        steps = [
            self.revisions[one.key].facts.step or 0
            for one in self.finishes
            if one.attempt == last and self.revisions[one.key].kind == "step"
        ]
        return last, max(steps, default=None)

    def with_moved(
        self, alias: str, move: Move, *, pinned: bool | None, passed_over: Mapping[str, str],
        shares: Mapping[str, float], shadows: tuple[str, ...], seed: int, lost: Iterable[Recorded] = (),
    ) -> RunState:  # fmt: skip
        """An alias means something else; `lost` are revisions that it needs and that may have been removed since."""
        before = self.aliases[alias].moves if alias in self.aliases else ()
        meant = Meant((*before, move)[-REMEMBERED - 1 :], dict(shares), shadows, seed)
        revisions = {**{one.key: one for one in lost}, **self.revisions}
        passed = {
            key: why for key, why in {**self.passed_over, **passed_over}.items()
            if key in revisions and key not in meant.members  # else it was removed meanwhile
        }  # fmt: skip
        return replace(
            self, aliases={**self.aliases, alias: meant}, pinned=self.pinned if pinned is None else pinned,
            passed_over=passed, revisions=revisions,
        )  # fmt: skip

    def with_passed_over(self, key: str, reason: str) -> RunState:
        if key not in self.revisions or key in self.passed_over:
            return self
        return replace(self, passed_over={**self.passed_over, key: reason})

    def without(self, keys: Collection[str]) -> RunState:
        """Without these, but for what an alias means."""
        going = {key for key in keys if key in self.revisions} - self.named
        if not going:
            return self
        return replace(
            self,
            revisions={key: one for key, one in self.revisions.items() if key not in going},
            finishes=tuple(one for one in self.finishes if one.key not in going),
            passed_over={key: why for key, why in self.passed_over.items() if key not in going},
        )

    def forgotten_now(self) -> RunState:
        return RunState(self.version, forgotten=True)

    def joined_by(self, local: RunState) -> RunState:
        """With what a machine has of the run that was never here: its revisions, as if they had been there before; and
        what it means by names that mean nothing yet."""
        more = [local.revisions[key] for key in local.revisions if key not in self.revisions]
        if not self.revisions:
            return replace(local, version=self.version)
        last = max((one.attempt for one in self.finishes), default=1)
        new = {one.key: one for one in more}
        aliases = {alias: meant for alias, meant in local.aliases.items() if alias and alias not in self.aliases}
        passed = {key: why for key, why in local.passed_over.items() if key in new}
        return replace(
            self,
            revisions={**self.revisions, **new},
            finishes=(*self.finishes, *(Finished(one.key, last) for one in local.finishes if one.key in new)),
            aliases={**self.aliases, **aliases},
            passed_over={**self.passed_over, **passed},
        )


def written(state: RunState, base: str) -> bytes:
    """As it stands in the bucket."""
    return json.dumps({"format": FORMAT, "base": base, **asdict(state)}, separators=(",", ":")).encode()


def read_state(raw: bytes, base: str, shown: str) -> RunState:
    """What an object says; `shown` says which.

    Raises:
        InvalidFile: it is none.
        LorakitError: a newer lorakit wrote it.
    """
    try:
        said = json.loads(raw)
        if said["format"] > FORMAT:
            raise LorakitError(f"'{shown}' was written by a newer lorakit: upgrade this one")
        if said["base"] != base:
            raise ValueError("it is of another base")
        state = RunState(
            int(said["version"]), str(said["change"]), said["forgotten"] is True,
            {str(key): _recorded(one) for key, one in said["revisions"].items()},
            tuple(Finished(str(one["key"]), int(one["attempt"]), str(one["by"]), str(one["stamp"]))
                  for one in said["finishes"]),
            {str(alias): _meant(one) for alias, one in said["aliases"].items()},
            said["pinned"] is True,
            {str(key): str(reason) for key, reason in said["passed_over"].items()},
        )  # fmt: skip
        ensure_whole(state)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, Refused) as error:
        raise InvalidFile(f"'{shown}' is not what a lorakit writes there: {error}") from None
    return state


def _recorded(said: Any) -> Recorded:
    facts = said["facts"]
    step = facts["step"]
    if said["kind"] not in _KINDS or not _DIGEST.fullmatch(said["digest"]):
        raise ValueError("a revision has no kind or no digest")
    if (said["kind"] == "step") != (isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 62):
        raise ValueError("a revision's step is none")
    repaired = said["repaired"]
    return Recorded(
        said["kind"], said["digest"], Facts(**facts), int(said["rank"]), int(said["size"]), str(said["source"]),
        float(said["created"]), str(said["uid"]), None if repaired is None else str(repaired),
    )  # fmt: skip


def _meant(said: Any) -> Meant:
    return Meant(
        tuple(Move(str(one["key"]), str(one["why"]), float(one["at"])) for one in said["moves"]),
        {str(key): float(share) for key, share in said["shares"].items()},
        tuple(str(key) for key in said["shadows"]),
        int(said["seed"]),
    )


def ensure_whole(state: RunState) -> None:
    """Raises ValueError, Refused where a part names what is not there."""
    if any(key != one.key for key, one in state.revisions.items()):
        raise ValueError("a revision stands under another's name")
    for alias, meant in state.aliases.items():
        if alias:
            check_alias(alias)
        if not meant.moves or not all(0 < share <= 1 for share in meant.shares.values()):
            raise ValueError(f"the alias '{alias}' means nothing")
    names = {*state.named, *state.passed_over, *(one.key for one in state.finishes)}
    if missing := names - state.revisions.keys():
        raise ValueError(f"it names {min(missing)}, and has no such revision")


Transition = Callable[[RunState], RunState]
