"""What came from what, as a tree: the base, its runs and their steps, and the mixes with what they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lorakit.errors import Refused
from lorakit.server.mixes.text import parse_mix
from lorakit.server.page.markup import NOTHING, after_at, ago, card, code, count, empty, joined, loss, pill, run_link
from lorakit.server.page.screens.screen import Screen

STEPS = 12  # of each run, the newest
RUNS = 100
OPEN = 8  # runs up to which each is unfolded


class Lineage(Screen):
    title = "lineage"
    place = "lineage"
    every = 0

    def build(self) -> None:
        self.add("head", self.head("Lineage"))
        self.add("tree")

    async def look(self) -> None:
        adapters = (await self.api.get("/v1/adapters", revisions=STEPS))["data"]
        mixes = (await self.api.get("/v1/mixes"))["data"]
        self.show("tree", lineage_card(adapters, mixes))


def lineage_card(adapters: Sequence[Mapping[str, Any]], mixes: Sequence[Mapping[str, Any]]) -> Markup:
    if not adapters and not mixes:
        nothing = empty("Nothing has come from anything yet", "Runs, their steps, and mixes of them will stand here.")
        return card("What came from what", nothing, plain=True)
    runs = joined(_run(one, unfolded=len(adapters) <= OPEN) for one in adapters[:RUNS])
    made = joined(_mix(one) for one in reversed(mixes[-RUNS:]))
    branches = [_branch("Runs", runs)] if adapters else []
    branches += [_branch("Mixes", made)] if mixes else []
    return card("What came from what", Markup('<ul class="tree">{}</ul>').format(joined(branches)))


def _branch(title: str, inner: Markup) -> Markup:
    return Markup("<li><strong>{}</strong><ul>{}</ul></li>").format(title, inner)


def _run(one: Mapping[str, Any], *, unfolded: bool) -> Markup:
    saved = [each for each in one["revisions"] if each["id"]]
    older = one.get("count", len(saved)) - len(saved)
    before = Markup('<span class="quiet">{} more before these</span>').format(count(older)) if older > 0 else NOTHING
    rest = Markup('<li class="leaf"><a href="/ui/runs/{0}">all of {0}</a>{1}</li>').format(one["name"], before)
    steps = joined(_step(each) for each in reversed(saved))
    told = Markup('<span class="leaf"><strong>{}</strong> {}<span class="quiet">{} revisions</span></span>').format(
        one["name"], pill(one["state"]), count(one.get("count", len(saved)))
    )
    opened = Markup(" open") if unfolded else NOTHING
    return Markup('<li><details data-key="run-{}"{}><summary>{}</summary><ul>{}{}</ul></details></li>').format(
        one["name"], opened, told, steps, rest
    )


def _step(one: Mapping[str, Any]) -> Markup:
    names = joined((pill(alias, "accent") for alias in one["aliases"]), " ")
    known = one["eval_loss"] is not None
    losses = Markup('<span class="quiet">eval {}</span>').format(loss(one["eval_loss"])) if known else NOTHING
    repaired = Markup('<span class="quiet">repaired: {}</span>').format(one["repaired"]) if one["repaired"] else NOTHING
    return Markup('<li><span class="leaf">{}{}{}{}<span class="quiet">{}</span></span></li>').format(
        code(after_at(one["id"])), names, losses, repaired, ago(one["created"])
    )


def _mix(one: Mapping[str, Any]) -> Markup:
    told = Markup('<span class="leaf">{} {}<span class="quiet">rank {}, loses {}</span></span>').format(
        Markup("<strong>{}</strong>").format(one["name"]) if one["name"] else code(one["revision"] or one["mix"]),
        pill(one["state"]), count(one["rank"]), loss(one["error"]),
    )  # fmt: skip
    return Markup('<li><details data-key="mix-{}" open><summary>{}</summary><ul>{}</ul></details></li>').format(
        one["name"] or one["revision"], told, _parts(one)
    )


def _parts(one: Mapping[str, Any]) -> Markup:
    """What a mix is made of, each with its weight."""
    made_of = one["made_of"] or one["mix"] or ""
    try:
        asked = parse_mix(made_of)
    except Refused:
        return Markup("<li>{}</li>").format(code(made_of))
    return joined(
        Markup('<li><span class="leaf"><span>{} ×</span>{}{}</span></li>').format(
            f"{weight:g}", run_link(name.partition("@")[0]), code(after_at(name)) if "@" in name else NOTHING
        )
        for name, weight in asked.adapters
    )
