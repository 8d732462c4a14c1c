"""`lorakit.mix`: several adapters as one, on their factors alone.

Exact unless asked otherwise: the weighted sum, with stacked factors, whatever the ranks and modules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from lorakit.adapters.adapter import Adapter, Weight
from lorakit.adapters.delta import Delta, made
from lorakit.adapters.patterns import names, weights_by_module
from lorakit.adapters.source import Stage
from lorakit.adapters.trained import Trained, Weigh, averaged
from lorakit.errors import UsageError, WrongBase
from lorakit.mix.methods.low_rank import LowRank
from lorakit.mix.methods.registry import Method, checked_options, method_named
from lorakit.mix.opened import AdapterLike, BaseLike, opened, with_trained
from lorakit.mix.reduce import Change, Dense, RankChoice, Reduced, reduced
from lorakit.mix.report import MixReport, norms_and_cosines, overall_error


def mix(
    pairs: Sequence[tuple[AdapterLike, Weight]],
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
        pairs: (adapter, weight). A weight may be given by pattern of modules, `{"*.self_attn.*": 0.8, "*": 0.4}`: the
            first that fits counts. The same adapter twice adds up its weights.
        method: "linear", the weighted sum, or another of `lorakit methods`.
        rank: "exact" (the default), or the largest rank of any module.
        energy: instead, the share of each module's squared norm to keep.
        budget: instead, how many parameters all factors may have together; shared out by singular value.
        trained: "average" takes the weighted average of trained copies of the base's values (`modules_to_save`, rows
            of `trainable_token_indices`, trained biases), which otherwise are refused.
        own_ranks: write each module with its own rank (`rank_pattern`), which vLLM before 0.32 ignores; the default
            with a budget. Else all get the largest, padded with zeros.
        base: for adapters (VeRA, MiSS) whose files don't say how large a layer is; else the one they name.
        device: where a method computes: "auto", "cpu", "cuda", "cuda:1".
        options: the method's own, as `density`, `seed`.

    Raises:
        UsageError: there is no such method, rank or option, or nothing to mix.
        WrongBase: a module has different shapes in two adapters.
        UnsupportedAdapter: an adapter has more than deltas.
    """
    choice = rank_choice(rank, energy, budget)
    chosen = method_named(method)
    settings = checked_options(chosen, options)
    if trained not in ("refuse", "average"):
        raise UsageError(f"trained '{trained}': it is 'refuse' or 'average'")
    if not pairs:
        raise UsageError("no adapter is named: there is nothing to mix")
    adapters = [opened(adapter, base) for adapter, _ in pairs]
    weights = [weight if isinstance(weight, Mapping) else float(weight) for _, weight in pairs]
    ready = [with_trained(adapter) if trained == "average" else adapter for adapter in adapters]
    copies = [adapter.trained for adapter in ready]
    plain = [replace(adapter.plain(work="mixed"), trained=Trained()) for adapter in ready]
    sum_of_all = _sum(plain, weights)
    changes = sum_of_all.deltas if chosen.name == "linear" else _merged(chosen, plain, weights, settings, device)
    result = reduced(changes, choice)
    average, notes = averaged(list(zip(copies, (_weigh(weight) for weight in weights), strict=True)))
    said = {"method": method, **choice.as_dict(), **settings, **({"trained": trained} if average else {})}
    flat = chosen.name == "linear" and choice.is_exact and not average
    return replace(
        sum_of_all,
        deltas=result.deltas,
        sources=sum_of_all.sources if flat else (Stage("mix", said, _sources(plain, weights)),),
        trained=average,
        own_ranks=budget is not None if own_ranks is None else own_ranks,
        reported=cache(lambda: report_of(result, plain, weights, method, said, notes)),
    )


def rank_choice(rank: int | str | None, energy: float | None, budget: int | None) -> RankChoice:
    """Raises UsageError as `RankChoice` does, and for a rank that is neither a number nor "exact"."""
    if isinstance(rank, str):
        if rank != "exact" and not rank.isdecimal():
            raise UsageError(f"rank '{rank}': it is a whole number above 0, or 'exact'")
        if rank == "exact" and (energy is not None or budget is not None):
            raise UsageError("rank 'exact' keeps all: leave energy and budget out")
        rank = None if rank == "exact" else int(rank)
    return RankChoice(rank, energy, budget)


def _sum(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> Adapter:
    total = adapters[0].weighted(weights[0])
    for adapter, weight in zip(adapters[1:], weights[1:], strict=True):
        total = total.plus(adapter.weighted(weight))
    return total


def _sources(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> tuple[Any, ...]:
    weighted = (adapter.weighted(weight) for adapter, weight in zip(adapters, weights, strict=True))
    return tuple(source for adapter in weighted for source in adapter.sources)


def _weigh(weight: Weight) -> Weigh:
    """The weight for the path of a tensor."""

    def weight_of(path: str) -> float:
        if not isinstance(weight, Mapping):
            return weight
        module = path.removesuffix(".weight").removesuffix(".bias")
        found = next((value for pattern, value in weight.items() if names(pattern, module)), None)
        if found is None:
            raise UsageError(f"no pattern gives a weight to the trained '{path}': add '*' behind the others")
        return found

    return weight_of


def _merged(
    method: Method, adapters: Sequence[Adapter], weights: Sequence[Weight], settings: Mapping[str, Any], device: str
) -> dict[str, Change]:
    """What a method makes of each module, when it is asked for."""
    by_module = [
        weights_by_module(weight, adapter.deltas, adapter.name) if isinstance(weight, Mapping) else weight
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    modules = dict.fromkeys(module for adapter in adapters for module in adapter.deltas)
    return {
        module: _change(
            method,
            module,
            [adapter.deltas.get(module) for adapter in adapters],
            [weight.get(module, 0.0) if isinstance(weight, Mapping) else weight for weight in by_module],
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
    for delta in there[1:]:
        if (delta.shape, delta.kind) != (there[0].shape, there[0].kind):
            raise WrongBase(
                f"'{module}' is {there[0].kind} {list(there[0].shape)} in one adapter and {delta.kind} "
                f"{list(delta.shape)} in another: they were made for different bases"
            )
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


def report_of(
    result: Reduced,
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    method: str,
    settings: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> MixReport:
    """Computes what was not computed yet."""
    norms, cosines = norms_and_cosines([adapter.deltas for adapter in adapters])
    by_module = result.reports()
    bases = dict.fromkeys(str(adapter.base) for adapter in adapters)
    different = (f"the adapters name different bases: {', '.join(bases)}",) if len(bases) > 1 else ()
    return MixReport(
        method=method,
        adapters=tuple(adapter.name for adapter in adapters),
        weights=tuple(weights),
        rank=max((report.rank for report in by_module.values()), default=0),
        modules=len(result.deltas),
        norms=norms,
        cosines=cosines,
        parameters=sum(by_module[module].rank * sum(delta.shape) for module, delta in result.deltas.items()),
        truncation_error=overall_error(by_module),
        notes=(*different, *notes),
        settings=settings,
        by_module=by_module,
    )
