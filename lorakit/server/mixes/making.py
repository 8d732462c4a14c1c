"""What a mix is made of, to the revision, and the making: on the factors alone, cut to what the server takes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import InvalidFile, LorakitError, NotFound, Refused, UsageError
from lorakit.server.mixes.text import MixText
from lorakit.server.requests.templates import shared_templates
from lorakit.store.catalog import Revision

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter


ELEMENTS = 1 << 25  # of the modules that are computed at once: some methods hold copies of them as dense matrices


class MixRefused(Refused):
    """A mix that can be read, and not be served: what it would lose, or hold, and what to do about it."""


class MixNotMade(LorakitError):
    """A mix could not be made now; later it may."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """`asked` is how it was written, `parents` each revision that its names meant, once; `most` is the server's rank.

    What two recipes with the same key give is the same.
    """

    asked: MixText
    parents: tuple[tuple[Revision, float], ...]
    most: int

    @property
    def rank(self) -> int:
        """The largest that a module may have."""
        return min(self.asked.rank, self.most) if isinstance(self.asked.rank, int) else self.most

    @property
    def exact(self) -> bool:
        """Whether nothing may be cut."""
        return self.asked.rank == "exact"

    @property
    def key(self) -> str:
        # of two names for the same content, one may not be for the ears of who asks by the other
        parents = [[parent.run, parent.digest, weight] for parent, weight in self.parents]
        said = {"method": self.asked.method, "options": dict(self.asked.options), "rank": self.rank}
        return json.dumps({"parents": parents, "exact": self.exact, **said}, sort_keys=True)

    def __str__(self) -> str:
        """With the exact name of each revision."""
        return str(replace(self.asked, adapters=tuple((parent.name, weight) for parent, weight in self.parents)))


@dataclass(frozen=True, slots=True)
class Written:
    """`error` is ‖Δ - Δ'‖ / ‖Δ‖ of the mix and what was written of it: 0 where nothing was cut."""

    rank: int
    error: float


def write_mix(recipe: Recipe, base: Path, folder: Path, *, most_error: float) -> Written:
    """Make a mix and write it into a folder that is there, with its lineage.

    `base` is asked what a module is called where two adapters don't agree.

    Raises:
        MixRefused: it can't be made, or not at this rank within this error.
        NotFound: one of its revisions was removed meanwhile.
    """
    try:
        return _written(recipe, base, folder, most_error)
    except (FileNotFoundError, InvalidFile, NotFound) as error:
        raise NotFound(f"one of the adapters of {recipe} was removed while they were mixed: {error}") from None
    except (UsageError, Refused) as error:
        raise error if isinstance(error, MixRefused) else MixRefused(f"{recipe} can't be made: {error}") from None


def _written(recipe: Recipe, base: Path, folder: Path, most_error: float) -> Written:
    from lorakit.adapters.reading import WEIGHTS, load_adapter
    from lorakit.adapters.writing import write_adapter_files
    from lorakit.files.digests import file_digest
    from lorakit.files.provenance import write_provenance
    from lorakit.mix.mix import mix

    asked = recipe.asked
    pairs = [(load_adapter(parent.folder), weight) for parent, weight in recipe.parents]
    # on a CPU: what a GPU has left is the engine's
    rank = None if recipe.exact else recipe.rank
    mixed = mix(pairs, asked.method, rank, base=base, device="cpu", **asked.options)
    _compute(mixed)
    if mixed.rank > recipe.rank:
        raise MixRefused(
            f"{recipe} has rank {mixed.rank}, and this server takes {recipe.rank}: ask without rank=exact, "
            f"or start the server with --max-lora-rank {mixed.rank}"
        )
    error = 0.0 if recipe.exact or _is_stored(mixed) or mixed.report is None else mixed.report.truncation_error
    if not error <= most_error:
        raise MixRefused(_too_much(recipe, [adapter for adapter, _ in pairs], error, most_error))
    write_adapter_files(mixed, folder)
    for name, text in shared_templates([parent for parent, _ in recipe.parents]).items():
        (folder / name).write_text(text, encoding="utf-8")
    parents = [
        {"path": str(parent.folder), "sha256": file_digest(parent.folder / WEIGHTS), "revision": parent.name,
         "weight": weight}
        for parent, weight in recipe.parents
    ]  # fmt: skip
    settings = {"method": asked.method, "rank": rank or "exact", **asked.options}
    write_provenance(folder, "mix", parents, settings, rank=mixed.rank, truncation_error=error)
    return Written(max(1, mixed.rank), error)


def _is_stored(mixed: Adapter) -> bool:
    """Whether it is made of factors as they are stored: then nothing was cut, and none has to be computed to say so."""
    from lorakit.adapters.delta import Term

    return all(isinstance(term, Term) for delta in mixed.deltas.values() for term in delta.terms)


def _compute(mixed: Adapter) -> None:
    """All factors, several modules at once where they are small."""
    from lorakit.adapters.delta import Made
    from lorakit.adapters.truncation import one_thread

    if _is_stored(mixed):
        return
    terms = [term for delta in mixed.deltas.values() for term in delta.terms if isinstance(term, Made)]
    largest = max(delta.shape[0] * delta.shape[1] for delta in mixed.deltas.values())
    with one_thread(), ThreadPoolExecutor(max(1, min(os.cpu_count() or 1, ELEMENTS // largest))) as pool:
        list(pool.map(lambda term: term.load(), terms))


def _too_much(recipe: Recipe, adapters: Sequence[Adapter], error: float, most_error: float) -> str:
    cures = [f"let it lose more (--max-mix-error {_above(error):g})"]
    if recipe.rank < recipe.most:
        cures.insert(0, f"ask for a larger rank, or for none: this server takes {recipe.most}")
    elif recipe.asked.method == "linear":
        modules = {module for adapter in adapters for module in adapter.deltas}
        ranks = [sum(a.deltas[module].rank for a in adapters if module in a.deltas) for module in modules]
        cures.insert(0, f"start the server with --max-lora-rank {max(ranks)}, where it is exact")
    else:
        cures.insert(0, "start the server with a larger --max-lora-rank")
    return (
        f"{recipe} would lose {error:.3g} of its norm at rank {recipe.rank}, and this server lets a mix lose "
        f"{most_error:g}: {', or '.join(cures)}"
    )


def _above(error: float) -> float:
    """Rounded up to two digits."""
    return ceil(error * 100) / 100
