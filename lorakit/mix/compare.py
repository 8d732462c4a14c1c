"""`lorakit.compare`: how adapters lie to one another, module by module, from their factors alone.

report = lorakit.compare("runs/sql/checkpoint-500", "runs/chat")
report.pairs[0].overall.cosine

What is computed of one module takes its factors and little more; no dense delta is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from math import sqrt
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta
from lorakit.adapters.naming import ensure_one_naming
from lorakit.adapters.patterns import names
from lorakit.adapters.trained import Trained
from lorakit.adapters.truncation import Factors, inner_product, noise_of, one_thread, product_svd
from lorakit.errors import UsageError, WrongBase
from lorakit.mix.opened import AdapterLike, opened, with_trained

if TYPE_CHECKING:
    import torch


CUTOFF = 1e-6  # of the largest singular value: what float32 factors can't tell from zero


def cosine(product: float, norm: float, other_norm: float) -> float | None:
    """⟨Δ₁, Δ₂⟩ / (‖Δ₁‖ ‖Δ₂‖), in [-1, 1]; None where one of the two is zero."""
    return max(-1.0, min(1.0, product / norm / other_norm)) if norm and other_norm else None


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Σ cos² of the principal angles between the spans of orthonormal columns (n, k₁) and (n, k₂): ‖Q₁ᵀQ₂‖²_F
    (Björck and Golub, Math. Comp. 27, 1973); from 0 to min(k₁, k₂).
    """
    return float((one.T @ other).square().sum())


@dataclass(frozen=True, slots=True)
class Spaces:
    """One delta, and orthonormal bases of what it writes to (`columns`, (out, k)) and reads from (`rows`, (in, k)).

    k is its numerical rank: directions below `CUTOFF` of the strongest are not counted. `turned` is all of it but for
    a rotation of what it writes: S Vᵀ (min(r, out, in), in), of the SVD U S Vᵀ.
    """

    factors: Factors
    norm: float
    columns: torch.Tensor
    rows: torch.Tensor
    turned: torch.Tensor

    @property
    def rank(self) -> int:
        return self.rows.shape[1]


def spaces(factors: Factors) -> Spaces:
    """The norm is that of all singular values, which loses nothing where terms cancel."""
    left, right = factors
    u, s, vh = product_svd(left, right)
    noise = noise_of(left, right)
    kept = int(((s > CUTOFF * s[:1]) & (s > noise)).sum())
    norm = float(s.norm()) if kept else 0.0
    return Spaces(factors, norm, u[:, :kept], vh[:kept].T, s[:, None] * vh)


@dataclass(frozen=True, slots=True)
class Relation:
    """How two deltas lie to one another. What it holds are sums, which add up over modules; what is read are ratios.

    `squares` are ‖Δ₁‖² and ‖Δ₂‖², `product` is ⟨Δ₁, Δ₂⟩, `columns` and `rows` are the overlaps of the spaces that
    share at most `directions`, `strays` are ‖Δ₂P₁‖² and ‖Δ₁P₂‖², with Pᵢ the projection on Δᵢ's row space.
    """

    squares: tuple[float, float]
    product: float = 0.0
    columns: float = 0.0
    rows: float = 0.0
    directions: int = 0
    strays: tuple[float, float] = (0.0, 0.0)

    @property
    def norms(self) -> tuple[float, float]:
        """Frobenius norms."""
        return sqrt(self.squares[0]), sqrt(self.squares[1])

    @property
    def cosine(self) -> float | None:
        """Near 0 the two leave each other's weights alone, below 0 they undo each other."""
        return cosine(self.product, *self.norms)

    @property
    def column_overlap(self) -> float | None:
        """Mean cos² of the principal angles between what the two write to; by chance about max(k₁, k₂) / out."""
        return min(1.0, self.columns / self.directions) if self.directions else None

    @property
    def row_overlap(self) -> float | None:
        """Mean cos² of the principal angles between what the two read from; by chance about max(k₁, k₂) / in."""
        return min(1.0, self.rows / self.directions) if self.directions else None

    @property
    def interference(self) -> tuple[float | None, float | None]:
        """By how much each of the two is disturbed when the other is added with the same weight: ‖Δ₂P₁‖ / ‖Δ₁‖, and
        ‖Δ₁P₂‖ / ‖Δ₂‖.

        For inputs x drawn alike from all directions that Δ₁ reads, E‖Δ₁x‖² = ‖Δ₁‖²/k₁ is what the first adds, and
        E‖Δ₂x‖² = ‖Δ₂P₁‖²/k₁ is what the second adds to that unasked: their ratio, root mean square. 0: the first works
        as if it were alone; 1: what disturbs it is as large as what it adds itself. It grows with the other's weight.
        """
        first, second = self.norms
        return (
            sqrt(self.strays[0]) / first if first else None,
            sqrt(self.strays[1]) / second if second else None,
        )

    @property
    def worst(self) -> float:
        """The larger of the two interferences."""
        return max((value for value in self.interference if value is not None), default=0.0)

    def plus(self, other: Relation) -> Relation:
        return Relation(
            (self.squares[0] + other.squares[0], self.squares[1] + other.squares[1]),
            self.product + other.product,
            self.columns + other.columns,
            self.rows + other.rows,
            self.directions + other.directions,
            (self.strays[0] + other.strays[0], self.strays[1] + other.strays[1]),
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "norms": list(self.norms),
            "cosine": self.cosine,
            "column_overlap": self.column_overlap,
            "row_overlap": self.row_overlap,
            "interference": list(self.interference),
        }


def relation(one: Spaces, other: Spaces) -> Relation:
    """Of two deltas of the same shape."""
    return Relation(
        (one.norm**2, other.norm**2),
        inner_product(one.factors, other.factors) if one.rank and other.rank else 0.0,
        overlap(one.columns, other.columns),
        overlap(one.rows, other.rows),
        min(one.rank, other.rank),
        (_stray(other, one), _stray(one, other)),
    )


def _stray(delta: Spaces, reader: Spaces) -> float:
    """‖Δ P‖²_F, with P on the rows of `reader`."""
    return float((delta.turned @ reader.rows).square().sum()) if delta.rank else 0.0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two of the adapters, by their places in the report: over all modules, at each that both have, and the others."""

    first: int
    second: int
    overall: Relation
    modules: Mapping[str, Relation]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def worst_modules(self) -> list[tuple[str, Relation]]:
        """Those with the most interference first."""
        return sorted(self.modules.items(), key=lambda item: -item[1].worst)


@dataclass(frozen=True, slots=True)
class CompareReport:
    """How adapters lie to one another: `norms` by adapter, over its modules; a `Pair` for each two of them."""

    adapters: tuple[str, ...]
    norms: tuple[float, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    @property
    def cosines(self) -> tuple[tuple[float | None, ...], ...]:
        """Over all modules, each adapter with each."""
        known = {(pair.first, pair.second): pair.overall.cosine for pair in self.pairs}
        return tuple(
            tuple(
                (1.0 if norm else None) if i == j else known[min(i, j), max(i, j)]
                for j in range(len(self.adapters))
            )
            for i, norm in enumerate(self.norms)
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        return {
            "adapters": [
                {"path": path, "norm": norm} for path, norm in zip(self.adapters, self.norms, strict=True)
            ],
            "cosines": [list(row) for row in self.cosines],
            "pairs": [
                {
                    "first": pair.first,
                    "second": pair.second,
                    **pair.overall.as_dict(),
                    "modules": {module: found.as_dict() for module, found in pair.modules.items()},
                    "only_first": list(pair.only_first),
                    "only_second": list(pair.only_second),
                }
                for pair in self.pairs
            ],
            "notes": list(self.notes),
        }  # fmt: skip


def compare(a: AdapterLike, b: AdapterLike, *more: AdapterLike, modules: str = "*") -> CompareReport:
    """Say how adapters lie to one another: norms, cosines, subspace overlap, expected interference.

    Args:
        modules: only those that it means: "*.layers.0.*" as a shell would, "q_proj" as the end of a path.

    Raises:
        UsageError: no module matches.
        WrongBase: a module has different shapes in two adapters.
        UnsupportedAdapter: an adapter does more than add deltas of low rank.
        InvalidFile: a factor holds NaN or infinity.
    """
    ready = [with_trained(opened(adapter)) for adapter in (a, b, *more)]
    adapters = [replace(adapter, trained=Trained()).plain(work="compared") for adapter in ready]
    for one, other in combinations(adapters, 2):
        ensure_one_naming(one, other)
    with one_thread():
        found = {module: _relations(adapters, module) for module in matching_modules(adapters, modules)}
    for adapter in adapters:
        adapter.ensure_unchanged()
    pairs = tuple(_pair(adapters, i, j, found) for i, j in combinations(range(len(adapters)), 2))
    return CompareReport(
        adapters=tuple(adapter.name for adapter in adapters),
        norms=(pairs[0].overall.norms[0], *(pair.overall.norms[1] for pair in pairs if pair.first == 0)),
        pairs=pairs,
        notes=(*different_bases(adapters), *with_biases(adapters), *with_copies(ready)),
    )


def _relations(adapters: Sequence[Adapter], module: str) -> dict[tuple[int, int], Relation]:
    """For each two adapters, by their places, of which one has the module at least."""
    there = {i: adapter.deltas[module] for i, adapter in enumerate(adapters) if module in adapter.deltas}
    _require_same_shape(module, list(there.values()))
    known = {i: spaces(delta.stacked()) for i, delta in there.items()}
    found = {}
    for i, j in combinations(range(len(adapters)), 2):
        one, other = known.get(i), known.get(j)
        if one and other:
            found[i, j] = relation(one, other)
        elif one or other:
            found[i, j] = Relation((one.norm**2 if one else 0.0, other.norm**2 if other else 0.0))
    return found


def _pair(
    adapters: Sequence[Adapter], first: int, second: int, found: Mapping[str, Mapping[tuple[int, int], Relation]]
) -> Pair:
    relations = {module: pairs[first, second] for module, pairs in found.items() if (first, second) in pairs}
    mine, theirs = adapters[first].deltas, adapters[second].deltas
    return Pair(
        first,
        second,
        reduce(Relation.plus, relations.values(), Relation((0.0, 0.0))),
        {module: relation for module, relation in relations.items() if module in mine and module in theirs},
        tuple(module for module in relations if module not in theirs),
        tuple(module for module in relations if module not in mine),
    )


def matching_modules(adapters: Sequence[Adapter], pattern: str) -> list[str]:
    """The modules of any of the adapters that `pattern` means.

    Raises:
        UsageError: it means none, and there are some.
    """
    modules = list(dict.fromkeys(module for adapter in adapters for module in adapter.deltas))
    matching = [module for module in modules if names(pattern, module)]
    if modules and not matching:
        raise UsageError(f"no module matches {pattern!r}; there are {len(modules)}, the first is {modules[0]!r}")
    return matching


def different_bases(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A note where the adapters' configs name different bases."""
    bases = dict.fromkeys(str(adapter.base) for adapter in adapters)
    return (f"the adapters name different bases: {', '.join(bases)}",) if len(bases) > 1 else ()


def with_copies(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A note for each adapter that holds trained copies of the base's values."""
    return tuple(
        f"adapter '{adapter.name}' holds trained copies of the base's values too: its deltas alone are compared"
        for adapter in adapters
        if adapter.trained
    )


def with_biases(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A note for each adapter that adds to biases as well."""
    return tuple(
        f"adapter '{adapter.name}' adds to biases too (lora_bias): its deltas alone are compared"
        for adapter in adapters
        if adapter.biases
    )


def _require_same_shape(module: str, deltas: Sequence[Delta]) -> None:
    first = deltas[0]
    for other in deltas[1:]:
        if (other.shape, other.kind) != (first.shape, first.kind):
            raise WrongBase(
                f"{module!r} is {first.kind} {list(first.shape)} in one adapter and {other.kind} {list(other.shape)} "
                f"in another: they were made for different bases, and can't be compared"
            )
