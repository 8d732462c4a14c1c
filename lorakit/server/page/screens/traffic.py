"""What is asked now, how it is answered, what is in the engine, and how long it took to get there."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from nicegui import ui

from lorakit.server.page.charts import rate_chart
from lorakit.server.page.exposition import Exposition, parse_exposition
from lorakit.server.page.markup import card, code, count, empty, pill, seconds, share, table, tiles
from lorakit.server.page.screens.screen import Said, Screen

LOOKS = 150  # that the chart remembers
LINES = 6  # names in it: those with the most requests
PREFIXES = ("lorakit_", "vllm:kv_cache_usage_perc")
PHASES = {
    "detect": "seen on disk", "copy": "into the store", "check": "judged", "engine": "in the engine, first token",
}  # fmt: skip
Look = tuple[float, Mapping[str, float], float]  # when, requests by alias, tokens


class Traffic(Screen):
    title = "traffic"
    place = "traffic"
    every = 2.0

    def build(self) -> None:
        self._looks: deque[Look] = deque(maxlen=LOOKS)
        self.add("head", self.head("Traffic"))
        self.add("tiles")
        with ui.element("section").classes("card").props('aria-label="Requests a second"') as self._rates:
            self.add("chart-head", Markup("<h2>Requests a second</h2>"), tag="header")
            self._chart = ui.echart({}).classes("chart low").props('role="img" aria-label="Requests a second by name"')
        self.add("names")
        self.add("engine")
        self.add("loads")

    def concerns(self, event: Said) -> bool:
        return False  # it looks often enough

    async def look(self) -> None:
        self._rates.set_visibility(self.whole)
        if not self.whole:
            await self._look_without_metrics()
            return
        told = parse_exposition(await self.api.text("/metrics"), PREFIXES)
        self._looks.append((time.time(), told.by("lorakit_requests_total", "alias"), _tokens(told)))
        self.show("tiles", tiles(_numbers(told, self._looks)))
        self._draw()
        self.show("names", names_card(told))
        self.show("engine", engine_card(told))
        self.show("loads", loads_card(told))

    def turned(self) -> None:
        self._draw()

    def _draw(self) -> None:
        if self.whole:
            self._chart.options.clear()
            self._chart.options.update(rate_chart(rates_of(self._looks), self.theme))
            self._chart.update()

    async def _look_without_metrics(self) -> None:
        """Numbers of the whole server are not for a key that sees a part of it."""
        adapters = (await self.api.get("/v1/adapters", revisions=25))["data"]
        self.show("names", _requests_card(adapters))


def rates_of(looks: Sequence[Look]) -> dict[str, list[tuple[float, float]]]:
    """Requests a second between each two looks, of the names with the most; a count that fell began anew."""
    if not looks:
        return {}
    busiest = sorted(looks[-1][1], key=lambda alias: -looks[-1][1][alias])[:LINES]
    return {
        alias: [
            (at, max(0.0, now.get(alias, 0.0) - before.get(alias, 0.0)) / max(at - then, 1e-3))
            for (then, before, _), (at, now, _) in zip(looks, list(looks)[1:], strict=False)
        ]
        for alias in busiest
    }


def _tokens(told: Exposition) -> float:
    return told.value("lorakit_generation_tokens_total") or 0.0


def _numbers(told: Exposition, looks: Sequence[Look]) -> dict[str, tuple[str, str]]:
    requests = tokens = None
    if len(looks) > 1:
        (then, before, tokens_then), (at, now, tokens_now) = looks[-2], looks[-1]
        past = max(at - then, 1e-3)
        requests = max(0.0, sum(now.values()) - sum(before.values())) / past
        tokens = max(0.0, tokens_now - tokens_then) / past
    tiers = told.by("lorakit_resident_revisions", "tier")
    cache = told.value("vllm:kv_cache_usage_perc")
    numbers = {
        "Requests": (_rate(requests), "a second"),
        "Tokens": (_rate(tokens), "a second"),
        "In flight": (count(told.value("lorakit_requests_in_flight") or 0), "requests"),
        "Waiting": (count(told.value("lorakit_requests_waiting")), "for an adapter"),
        "Slots": (count(tiers.get("slot")), f"of {count(told.value('lorakit_engine_slots'))} answer"),
        "In memory": (count(tiers.get("memory")), f"{count(tiers.get('store'))} stored"),
    }
    return numbers | ({"KV cache": (share(cache), "in use")} if cache is not None else {})


def _rate(value: float | None) -> str:
    return f"{value:.1f}" if value is not None and value < 100 else count(value)


def names_card(told: Exposition) -> Markup:
    """How each name was answered since the engine started."""
    requests = told.by("lorakit_requests_total", "alias")
    if not requests:
        nothing = empty("Nobody has asked yet", "Ask something in the playground, or:", "curl …/v1/completions")
        return card("Since the engine started", nothing, plain=True)
    rows = []
    for alias in sorted(requests, key=lambda name: -requests[name]):
        failed = sum(
            one.value for one in told.of("lorakit_requests_total")
            if one.labels.get("alias") == alias and one.labels.get("code", "").startswith("5")
        )  # fmt: skip
        rows.append((
            code(alias), count(requests[alias]), f"{count(failed)}, {share(failed / requests[alias])}",
            *(seconds(told.quantile("lorakit_request_seconds", part, alias=alias)) for part in (0.5, 0.95)),
            seconds(told.quantile("lorakit_first_byte_seconds", 0.5, alias=alias)),
            count(told.value("lorakit_prompt_tokens_total", alias=alias)),
            count(told.value("lorakit_generation_tokens_total", alias=alias)),
        ))  # fmt: skip
    heads = ("Asked as", "Requests", "Errors", "p50", "p95", "First byte", "Tokens in", "Tokens out")
    return card("Since the engine started", table("Names", heads, rows, numbers=range(1, 8)), plain=True)


def engine_card(told: Exposition) -> Markup:
    """What is in the engine, the busiest first."""
    in_flight = told.by("lorakit_requests_in_flight", "revision")
    loaded = sorted(
        told.of("lorakit_adapter_loaded"), key=lambda one: -in_flight.get(one.labels.get("revision", ""), 0)
    )
    rows = [
        (code(one.labels.get("revision", "")), pill(one.labels.get("tier", "")),
         count(in_flight.get(one.labels.get("revision", ""), 0)))
        for one in loaded
    ]  # fmt: skip
    if not rows:
        return card(
            "In the engine", empty("No adapter is in the engine", "One comes in when it is asked for."), plain=True
        )
    loads, removals = (told.value(f"lorakit_engine_{what}_total") for what in ("loads", "removals"))
    end = Markup('<span class="quiet">{} loaded, {} taken out</span>').format(count(loads), count(removals))
    return card(
        "In the engine", table("Residency", ("Revision", "Where", "In flight"), rows, numbers=(2,)), end=end, plain=True
    )


def loads_card(told: Exposition) -> Markup:
    """How long new revisions took on their way."""
    rows: list[tuple[Markup | str, ...]] = [
        (Markup('{} <span class="quiet">{}</span>').format(phase, what),
         count(told.value("lorakit_load_seconds_count", phase=phase)),
         seconds(told.mean("lorakit_load_seconds", phase=phase)),
         seconds(told.quantile("lorakit_load_seconds", 0.95, phase=phase)))
        for phase, what in PHASES.items() if told.value("lorakit_load_seconds_count", phase=phase)
    ]  # fmt: skip
    waited = told.value("lorakit_load_wait_seconds_count")
    if waited:
        rows.append((
            "requests that waited for it", count(waited), seconds(told.mean("lorakit_load_wait_seconds")),
            seconds(told.quantile("lorakit_load_wait_seconds", 0.95)),
        ))  # fmt: skip
    if not rows:
        return card("Load times", empty("No revision has come in since the engine started", ""), plain=True)
    return card(
        "Load times", table("Load times", ("Phase", "Times", "Mean", "p95"), rows, numbers=(1, 2, 3)), plain=True
    )


def _requests_card(adapters: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        (code(one["id"]), pill(one["residency"]), count(one["in_flight"]), count(one["requests"]))
        for adapter in adapters for one in adapter["revisions"] if one["in_engine"] or one["requests"]
    ]  # fmt: skip
    note = Markup('<p class="inner note">Numbers of the whole server are for keys that may see and do all.</p>')
    if not rows:
        return card(
            "Your adapters", empty("None is in the engine", "One comes in when it is asked for."), note, plain=True
        )
    heads = ("Revision", "Where", "In flight", "Requests")
    return card("Your adapters", table("Your adapters", heads, rows, numbers=(2, 3)), note, plain=True)
