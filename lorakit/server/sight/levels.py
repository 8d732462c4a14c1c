"""Where everything is at this moment, for `/metrics`: cheap enough to be asked while requests are answered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice

from lorakit import __version__
from lorakit.server.engines.vllm import ADAPTERS_INFO
from lorakit.server.following.served import Served
from lorakit.server.following.turns import Resident
from lorakit.server.sight.tallies import Count, Labels, Level
from lorakit.server.views import aliases_of
from lorakit.store.catalog import Revision
from lorakit.store.names import model_name, split_model

MOST_ALIASES = 100


def levels(known: Served) -> list[Level | Count]:
    """Where everything is now, and how often that changed."""
    residents, limits = known.residency.residents, known.engine.limits
    stored = len(known.mixes.revisions()) + sum(len(run.revisions) for run in known.runs.values())
    answering = sum(resident.busy for resident in residents)
    tiers = {
        "slot": answering,
        "memory": len(residents) - answering,
        "store": max(0, stored - len(known.residency.names)),
    }
    loaded: dict[Labels, float] = {(resident.name, "slot" if resident.busy else "memory"): 1 for resident in residents}
    in_flight: dict[Labels, float] = {}
    for resident in residents:  # of several engines, each may have it
        in_flight[resident.name,] = in_flight.get((resident.name,), 0) + resident.in_flight
    info = list(islice(_pointed_at(known), MOST_ALIASES))
    steps: dict[Labels, float] = {
        (alias,): revision.facts.step for alias, revision in info if revision.facts.step is not None
    }
    return [
        Level("lorakit_info", "What runs here.", ("version", "engine", "base"),
              {(__version__, limits.engine, limits.base): 1}),
        Level("lorakit_engine_slots", "Adapters that can answer at once.", (), {(): limits.slots}),
        Level("lorakit_resident_revisions", "Revisions by the nearest place that holds them.", ("tier",),
              {(tier,): count for tier, count in tiers.items()}),
        Level("lorakit_adapter_loaded", "What is in the engine: in a slot as it answers, or in its memory.",
              ("revision", "tier"), loaded),
        Level("lorakit_requests_in_flight", "Requests that a revision answers now.", ("revision",), in_flight),
        Level("lorakit_requests_waiting", "Requests that wait for a revision to come into the engine.", (),
              {(): known.residency.waiting}),
        Count("lorakit_engine_loads", "Adapters that were loaded into the engine, some again and again.",
              (), {(): known.residency.counted.loads}),
        Count("lorakit_engine_removals", "Adapters that were taken out of the engine.",
              (), {(): known.residency.counted.removes}),
        Level("lorakit_adapters", "Names that are served.", (), {(): len(known.runs)}),
        Level("lorakit_unserved", "Folders that are not served, by their state.", ("state",),
              {(state,): count for state, count in _unserved(known).items()}),
        Level("lorakit_alias_info", "Which revision an alias means now.", ("alias", "revision"),
              {(alias, revision.name): 1 for alias, revision in info}),
        Level("lorakit_split_share", "The share of an alias' requests that a revision answers, where several do.",
              ("alias", "revision"), dict(islice(_shares(known), MOST_ALIASES))),
        Level("lorakit_alias_step", "The step of the revision that an alias means now.", ("alias",), steps),
        _adapters_info(known, residents),
    ]  # fmt: skip


def _unserved(known: Served) -> dict[str, int]:
    return {"incomplete": 0, "refused": 0, **Counter(waiting.state for waiting in known.waiting.values())}


def _pointed_at(known: Served) -> Iterable[tuple[str, Revision]]:
    """The aliases that were set, by a person or by what is followed; the others are found by looking at every step."""
    for name, run in known.runs.items():
        for alias, id in run.aliases.items():
            if id in run.revisions:
                yield model_name(name, alias), run.revisions[id]


def _shares(known: Served) -> Iterable[tuple[Labels, float]]:
    for name, run in known.runs.items():
        for alias, split in run.splits.items():
            for id, share in split.shares.items():
                if id in run.revisions:
                    yield (model_name(name, alias), run.revisions[id].name), share


def _adapters_info(known: Served, residents: Iterable[Resident]) -> Level:
    """vLLM's gauge for gateways that send a request where its adapter is: its value is the time, and names are those
    that clients use. What is in the engine and idle counts as running: it could answer at once."""
    inside = {name for resident in residents for name in resident.names}
    names = _names_of(known, inside)
    running: set[str] = set()
    waiting: set[str] = set()
    for resident in residents:
        (waiting if resident.draining else running).update(*(names[name] for name in resident.names))
    shown = [",".join(sorted(name for name in names if "," not in name)) for names in (running, waiting - running)]
    return Level(
        ADAPTERS_INFO, "Adapters in the engine under every name that clients use for them.",
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        {(str(known.engine.limits.slots), shown[0], shown[1]): time.time()},
    )  # fmt: skip


def _names_of(known: Served, revisions: Iterable[str]) -> dict[str, set[str]]:
    """The revisions' own names, and the aliases and mixes that mean them."""
    found = {name: {name} for name in revisions}
    meant = list(known.mixes.targets().items())
    for run in {split_model(name)[0] for name in found} & known.runs.keys():
        aliases = aliases_of(known, known.runs[run])
        meant += [(model_name(run, alias), revision) for alias, revision in aliases.items()]
    for alias, revision in meant:
        if revision.name in found:
            found[revision.name].add(alias)
    return found
