"""From the names that a trainer has for tensors to those of the model: wrappers and prefixes, found by what fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

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
_SAMPLED = 1000  # names that tell which prefix fits the most

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """`names`: those of the model, by those of the source; `unplaced` have none, `recomputed` need none."""

    names: Mapping[str, str]
    unplaced: tuple[str, ...]
    recomputed: tuple[str, ...]


def named(sources: Iterable[str], expected: Collection[str]) -> Named:
    """Give each its place: as it is called, without the wrappers' parts, and with one prefix dropped or added.

    The prefix that most of them fit with comes first; for those that are left, the next, as long as places are left.
    """
    names: dict[str, str] = {}
    cleaned: dict[str, str] = {}
    for source in sources:
        plain = source if source in expected else without_wrappers(source)
        cleaned[source] = plain
    taken: set[str] = set()
    adds = _prefixes(expected)
    while left := {source: plain for source, plain in cleaned.items() if source not in names}:
        change = _best_change(left.values(), expected, taken, adds)
        if change is None:
            break
        for source, plain in left.items():
            target = _changed(plain, *change)
            if target is not None and target in expected and target not in taken:
                names[source] = target
                taken.add(target)
    rest = [source for source in cleaned if source not in names]
    recomputed = tuple(name for name in rest if RECOMPUTED.search(name))
    return Named(names, tuple(name for name in rest if name not in recomputed), recomputed)


def without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _best_change(
    plain: Iterable[str], expected: Collection[str], taken: Collection[str], adds: Collection[str]
) -> tuple[str, str] | None:
    """The (dropped, added) prefix by which the most find a place that is free; the smaller change where as many do."""
    every = list(plain)
    names = every[:: -(-len(every) // _SAMPLED)]
    found: Counter[tuple[str, str]] = Counter()
    for drop in _prefixes(every):
        rest = [name.removeprefix(drop) for name in names if name.startswith(drop)]
        for add in adds:
            if not (drop and add.endswith(drop)):
                found[drop, add] = len({target for one in rest if (target := add + one) in expected} - set(taken))
    best = max(found, key=lambda change: (found[change], -len("".join(change))), default=None)
    return best if best is not None and found[best] else None


def _changed(name: str, drop: str, add: str) -> str | None:
    return add + name.removeprefix(drop) if name.startswith(drop) else None


def _prefixes(names: Iterable[str]) -> list[str]:
    """What names begin with, up to the number of a layer; the empty one first."""
    found = {""}
    for name in names:
        parts = name.split(".")[:-1]
        for end in range(1, min(len(parts), _DEEPEST) + 1):
            if parts[end - 1].isdigit():
                break
            found.add(".".join(parts[:end]) + ".")
    return sorted(found, key=lambda prefix: (len(prefix), prefix))
