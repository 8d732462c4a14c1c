"""`lorakit.mix`: several adapters as one, on their factors alone.

Exact unless asked otherwise: the weighted sum, with stacked factors, whatever the ranks and modules.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, reduce
from operator import index
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta, made
from lorakit.adapters.patterns import weight_of, weights_by_module
from lorakit.adapters.report import Weight
from lorakit.adapters.source import Stage
from lorakit.adapters.trained import Trained, Weigh, averaged, owner_of
from lorakit.errors import UsageError
from lorakit.merge.base import read_base
from lorakit.mix.methods.low_rank import LowRank
from lorakit.mix.methods.registry import Method, checked_options, method_named
from lorakit.mix.opened import AdapterLike, BaseLike, opened, require_device, with_one_naming, with_trained
from lorakit.mix.reduce import Change, Dense, RankChoice, reduced
from lorakit.mix.report import report_of


def mix(
    pairs: Iterable[tuple[AdapterLike, Weight] | AdapterLike],
    method: str = "linear",
    rank: int | str | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    trained: str = "refuse",
    own_ranks: bool | None = None,
    base: BaseLike | None = None,
    device: str = "auto",
    **options: Any,
) -> Adapter:
    """Mix adapters into one. Its `report` says how exact that was, and how they lie to one another.

    Nothing is computed before it is asked for (`save`, `report`, a delta's factors), but for a budget.

    Args:
        pairs: (adapter, weight), or an adapter alone for 1. A weight may be given by pattern of modules,
            `{"*.self_attn.*": 0.8, "*": 0.4}`: the first that fits counts. The same adapter twice adds up its weights.
        method: "linear", the weighted sum, or another of `lorakit methods`.
        rank: "exact" (the default), or the largest rank of any module.
        energy: instead, the share of each module's squared norm to keep.
        budget: instead, how many parameters all factors may have together; shared out by singular value.
        trained: "average" takes the weighted average of trained copies of the base's values (`modules_to_save`, rows
            of `trainable_token_indices`, trained biases), which otherwise are refused.
        own_ranks: write each module with its own rank (`rank_pattern`), which vLLM before 0.32 ignores; the default
            with a budget. Else all get the largest, padded with zeros.
        base: its headers say how large a layer is where an adapter's file does not (VeRA, MiSS), and what a module is
            called where the adapters don't agree. For the first, the base that the adapter names will do.
        device: where a method computes: "auto", "cpu", "cuda", "cuda:1".
        options: the method's own, as `density`, `seed`.

    Raises:
        UsageError: there is no such method, rank, option or device, or nothing to mix.
        WrongBase: a module has different shapes in two adapters, or they call the modules by different names.
        UnsupportedAdapter: an adapter has more than deltas.
    """
    choice = rank_choice(rank, energy, budget)
    chosen = method_named(method)
    settings = checked_options(chosen, options)
    if trained not in ("refuse", "average"):
        raise UsageError(f"trained '{trained}': it is 'refuse' or 'average'")
    require_device(device)
    adapters, weights = _opened(pairs, base)
    ready = [with_trained(adapter) if trained == "average" else adapter.plain(work="mixed") for adapter in adapters]
    weighted = [adapter.weighted(weight) for adapter, weight in zip(ready, weights, strict=True)]
    plain = [replace(adapter, trained=Trained()).plain(work="mixed") for adapter in ready]
    parts = [replace(adapter, trained=Trained()) for adapter in weighted]
    total = reduce(Adapter.plus, parts)
    by_method = chosen.name != "linear"
    changes = _merged(chosen, plain, weights, settings, device) if by_method else total.deltas
    result = reduced(changes, choice, keep=total.biases)
    copies = [(adapter.trained, _weigh(adapter, weight)) for adapter, weight in zip(ready, weights, strict=True)]
    average, notes = averaged(copies)
    said = {"method": method, **choice.as_dict(), **settings, **({"trained": trained} if average else {})}
    flat = not by_method and choice.is_exact and not average
    reported = cache(
        lambda: report_of(result, plain, weights, method, said, (*notes, *_on_biases(total, by_method=by_method)))
    )
    sources = tuple(source for part in parts for source in part.sources)
    return replace(
        total,
        deltas=result.deltas,
        sources=total.sources if flat else (Stage("mix", said, sources, reported=reported),),
        trained=average,
        own_ranks=budget is not None if own_ranks is None else own_ranks,
        reported=reported,
    )


def _opened(
    pairs: Iterable[tuple[AdapterLike, Weight] | AdapterLike], base: BaseLike | None
) -> tuple[list[Adapter], list[Weight]]:
    """Each adapter once, with its weights added up, as far as they are numbers."""
    model = None if base is None else read_base(base)
    adapters: list[Adapter] = []
    weights: list[Weight] = []
    places: dict[Any, int] = {}
    if isinstance(pairs, Mapping | str | os.PathLike | Adapter):
        raise UsageError("give the adapters to mix as a list of (adapter, weight)")
    for pair in pairs:
        named, weight = pair if isinstance(pair, tuple | list) and len(pair) == 2 else (pair, 1.0)
        if not isinstance(named, Adapter | str | os.PathLike):
            raise UsageError(f"{named!r} is no adapter: give a list of (adapter, weight)")
        adapter = opened(named, model)
        given = _as_weight(weight)
        key = tuple((source.key, source.weight) for source in adapter.sources)
        before = weights[places[key]] if key in places else None
        if isinstance(before, float) and isinstance(given, float):
            weights[places[key]] = before + given
            continue
        if key:
            places[key] = len(adapters)
        adapters.append(adapter)
        weights.append(given)
    if not adapters:
        raise UsageError("no adapter is named: there is nothing to mix")
    return with_one_naming(adapters, model), weights


def _as_weight(weight: Any) -> Weight:
    try:
        if isinstance(weight, Mapping):
            return {str(pattern): float(value) for pattern, value in weight.items()}
        return float(weight)
    except (TypeError, ValueError):
        raise UsageError(f"the weight {weight!r} is neither a number nor patterns of modules with numbers") from None


def _on_biases(total: Adapter, *, by_method: bool) -> list[str]:
    if not total.biases:
        return []
    notes = ["biases of lora_B are added up by weight, whatever the method"] if by_method else []
    if len(total.biases) < len(total.deltas):
        notes.append(
            "lora_bias goes for all modules of an adapter, so those without a bias get zeros: PEFT loads them, but its "
            "own merge refuses modules whose base has no bias (lorakit merge takes them)"
        )
    return notes


def rank_choice(rank: int | str | None, energy: float | None, budget: int | None) -> RankChoice:
    """Raises UsageError as `RankChoice` does, and for a rank that is neither a number nor "exact"."""
    if isinstance(rank, str):
        if rank != "exact" and not rank.isdecimal():
            raise UsageError(f"rank '{rank}': it is a whole number above 0, or 'exact'")
        if rank == "exact" and (energy is not None or budget is not None):
            raise UsageError("rank 'exact' keeps all: leave energy and budget out")
        rank = None if rank == "exact" else int(rank)
    return RankChoice(_whole("rank", rank), None if energy is None else float(energy), _whole("budget", budget))


def _whole(name: str, number: Any) -> int | None:
    try:
        return None if number is None else index(number)
    except TypeError:
        raise UsageError(f"{name} {number!r}: it is a whole number") from None


def _weigh(adapter: Adapter, weight: Weight) -> Weigh:
    """The weight for the path of a trained tensor."""
    if not isinstance(weight, Mapping):
        return lambda _: weight
    weights = weights_by_module(weight, (*adapter.deltas, *adapter.trained.owners), adapter.name)
    return lambda path: weights[owner_of(path)]


def _merged(
    method: Method, adapters: Sequence[Adapter], weights: Sequence[Weight], settings: Mapping[str, Any], device: str
) -> dict[str, Change]:
    """What a method makes of each module, when it is asked for."""
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.deltas)
    return {
        module: _change(
            method,
            module,
            [adapter.deltas.get(module) for adapter in adapters],
            [weight_of(weight, module) if isinstance(weight, Mapping) else weight for weight in weights],
            settings,
            device,
        )
        for module in modules
    }


def _change(
    method: Method,
    module: str,
    deltas: Sequence[Delta | None],
    weights: Sequence[float],
    settings: Mapping[str, Any],
    device: str,
) -> Change:
    there = [delta for delta in deltas if delta is not None]
    shape = there[0].terms[0].shape

    def merged() -> Any:
        from lorakit.merge.blocks import usable_device

        given = [_low_rank(delta, shape, usable_device(device)) for delta in deltas]
        return method.merged(given, weights, module=module, options=settings)

    def factors() -> Any:
        found = merged()
        return (found.B.double() * found.scale).cpu(), found.A.cpu()

    if method.gives == "dense":
        return Dense(shape, merged, module, there[0].kind)
    return Delta((made(shape, factors),), there[0].kind)


def _low_rank(delta: Delta | None, shape: tuple[int, int], device: str) -> LowRank:
    import torch

    if delta is None:
        return LowRank(torch.zeros(shape[0], 0, device=device), torch.zeros(0, shape[1], device=device))
    return LowRank(delta.B.to(device), delta.A.to(device), delta.scale)
