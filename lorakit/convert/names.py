"""From the names that a trainer has for tensors to those of the model: wrappers and prefixes, found by what fits."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from heapq import nlargest
from itertools import takewhile

# Parts that DDP, torch.compile, FSDP, activation checkpointing and DeepSpeed put into a name, wherever they wrap.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_fpw_module"}
)

# Computed anew from the config wherever the model runs, and in files of older versions.
RECOMPUTED = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|inv_freq|masked_bias|position_ids"
    r"|(attn|attention)\.bias|_extra_state)$"
)
_DEEPEST = 4  # parts of a name that may be a prefix
_SAMPLED = 1000  # names that show which changes are worth a full count
_COUNTED = 16  # changes that are counted in full
_ADDED = 200  # prefixes of the model that are tried, the commonest first
_MOST = 8  # changes: what a model is put together from has few parts

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """Of the names that begin with `drop`: `add` in its place. Both are empty, or end with a dot."""

    drop: str = ""
    add: str = ""

    def of(self, name: str) -> str | None:
        return self.add + name.removeprefix(self.drop) if name.startswith(self.drop) else None

    @property
    def size(self) -> int:
        return len(self.drop) + len(self.add)


@dataclass(frozen=True, slots=True)
class Named:
    """`names`: those of the model, by those of the source; `recomputed` need none.

    `unplaced` have none: each with what it is called where most of the others are. `rivals` are two that fit one place
    equally well, each as one of many: nothing tells which are meant. Of `passed` the first is placed, and more of its
    like are.
    """

    names: Mapping[str, str]
    unplaced: Mapping[str, str]
    recomputed: tuple[str, ...]
    rivals: tuple[str, str] | None = None
    passed: tuple[str, str] | None = None


def named(sources: Mapping[str, Shape], expected: Mapping[str, Shape], spare: Collection[str] = ()) -> Named:
    """Give each its place: as it is called, without the wrappers' parts, and with one prefix changed for another.

    The change by which the most of them fit, by name and shape, comes first; what is left gets the next. Each module of
    the model is filled by one change alone, so that none fills another's holes, and a prefix is known by two modules
    that fit below it: a single one may be anybody's. Of `spare` places nobody has to fill any.
    """
    plain = {source: source if source in expected else without_wrappers(source) for source in sources}
    once = left = _once(plain)
    names: dict[str, str] = {}
    changes: list[Change] = []
    rivals = passed = None
    free = dict(expected)
    while left and len(changes) < _MOST:
        fits = [one for one in _fitting(left, sources, free, spare) if _is_known(one, changes)]
        if not fits:
            break
        best = max(fits, key=lambda fit: (*fit.score, -fit.change.size))
        rivals = rivals or _rivals(best, [fit for fit in fits if fit.score == best.score])
        passed = passed or _rivals(best, fits)
        names |= {source: target for target, source in best.sources.items()}
        filled = {_module(target) for target in best.sources}
        free = {target: shape for target, shape in free.items() if _module(target) not in filled}
        left = {name: source for name, source in left.items() if source not in names}
        changes.append(best.change)
    twice = ((one, other) for other, name in plain.items() if (one := once[name]) != other and one in names)
    first = changes[0] if changes else Change()
    rest = {source: first.of(name) or name for source, name in plain.items() if source not in names}
    recomputed = tuple(name for name in rest if RECOMPUTED.search(name))
    unplaced = {source: name for source, name in rest.items() if source not in recomputed}
    return Named(names, unplaced, recomputed, rivals or next(twice, None), passed)


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@dataclass(frozen=True, slots=True)
class _Fit:
    """What a change places: `sources` by their places. `score`: how many by name and shape, and by name alone."""

    change: Change
    sources: Mapping[str, str]
    score: tuple[int, int]


def _once(plain: Mapping[str, str]) -> dict[str, str]:
    """The first source of each name."""
    found: dict[str, str] = {}
    for source, name in plain.items():
        found.setdefault(name, source)
    return found


def _fitting(
    left: Mapping[str, str], shapes: Mapping[str, Shape], free: Mapping[str, Shape], spare: Collection[str]
) -> Iterator[_Fit]:
    """The changes by which the most names find a place that is free, each with all that it places."""
    every = list(left)
    votes: dict[Change, int] = {}
    adds = _adds(free)
    for name in every[:: -(-len(every) // _SAMPLED)]:
        for drop in _prefixes(name):
            for add in adds.get(name.removeprefix(drop), ()):
                votes[Change(drop, add)] = votes.get(Change(drop, add), 0) + 1
    for change in nlargest(_COUNTED, votes, key=lambda change: (votes[change], -change.size)):
        placed = ((change.of(name), source) for name, source in left.items())
        sources = {target: source for target, source in placed if target is not None and target in free}
        needed = [target for target in sources if target not in spare] or list(sources)
        exact = sum(shapes[sources[target]] == free[target] for target in needed)
        yield _Fit(change, sources, (exact, len(needed)))


def _adds(free: Mapping[str, Shape]) -> dict[str, list[str]]:
    """The prefixes of the places that are free, by what stands behind them there."""
    count: dict[str, int] = {}
    for target in free:
        for add in _prefixes(target):
            count[add] = count.get(add, 0) + 1
    tried = set(nlargest(_ADDED, count, key=lambda add: count[add]))
    found: dict[str, list[str]] = {}
    for target in free:
        for add in tried.intersection(_prefixes(target)):
            found.setdefault(target.removeprefix(add), []).append(add)
    return found


def _is_known(fit: _Fit, changes: Iterable[Change]) -> bool:
    """Whether its prefix is that of the model: it is none, is what others stand below, or holds two modules."""
    drop = fit.change.drop
    below = not drop or any(change.drop.startswith(drop) for change in changes)
    return below or len({target.rpartition(".")[0] for target in fit.sources}) > 1


def _rivals(best: _Fit, fits: Iterable[_Fit]) -> tuple[str, str] | None:
    """Two sources of one place, that of the best and another one's."""
    for fit in fits:
        for target, source in best.sources.items():
            if (other := fit.sources.get(target, source)) != source:
                return source, other
    return None


def _prefixes(name: str) -> Iterator[str]:
    """What a name may begin with: up to the number of a layer, and never so far that its module is not in the rest."""
    parts = name.split(".")[:-2]
    yield ""
    for end, _ in enumerate(takewhile(lambda part: not part.isdigit(), parts[:_DEEPEST]), 1):
        yield ".".join(parts[:end]) + "."


def _module(name: str) -> str:
    """What holds the module of a tensor, or that itself where nothing does; of all numbered layers it is the same."""
    first, *others = name.split(".")
    return ".".join([first, *takewhile(lambda part: not part.isdigit(), others[:-2])])
