"""All that is served: runs, adapters and mixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from lorakit.server.page.markup import (
    DASH,
    FOUND_BY_ITSELF,
    NOTHING,
    ago,
    card,
    code,
    count,
    empty,
    joined,
    loss,
    pill,
    run_link,
    short,
    spark,
    table,
    why,
)
from lorakit.server.page.screens.screen import Said, Screen, text

LINES = 12  # revisions whose losses are a line
MOST_WITH_LINES = 60  # names up to which each has one
MOST = 100  # rows
_HEADS = ("Name", "State", "Answers with", "Follows", "Step", "Eval loss", "Trend", "Requests", "Aliases")


class Runs(Screen):
    title = "runs"
    place = ""

    def build(self) -> None:
        self._filter = ""
        self.acts = {"filter": self._filtered}
        self.add("head", self.head("Runs"))
        self.add("runs")
        self.add("mixes")
        self._names = 0

    async def look(self) -> None:
        lines = LINES if 0 < self._names <= MOST_WITH_LINES else 1
        self._adapters = (await self.api.get("/v1/adapters", revisions=lines))["data"]
        if lines == 1 and 0 < len(self._adapters) <= MOST_WITH_LINES:
            self._adapters = (await self.api.get("/v1/adapters", revisions=LINES))["data"]
        self._names = len(self._adapters)
        self._mixes = (await self.api.get("/v1/mixes"))["data"]
        self._draw_all()

    async def _filtered(self, said: Said) -> None:
        self._filter = text(said, "text").strip().lower()
        self._draw_all()

    def _draw_all(self) -> None:
        found = [one for one in self._adapters if self._filter in one["name"].lower()]
        field = filter_field("Names", len(self._adapters)) if len(self._adapters) > 8 else NOTHING
        self.show(
            "head", self.head("Runs", Markup('<span class="quiet">{}</span>').format(_sum(self._adapters)), field)
        )
        self.show("runs", runs_card(found, filtered=self._filter))
        self.show("mixes", mixes_card(self._mixes) if self._mixes else NOTHING)


def filter_field(label: str, among: int) -> Markup:
    return Markup(
        '<input type="search" data-filters="filter" data-key="filter" aria-label="{}" placeholder="Filter {}" '
        'size="16">'
    ).format(f"Filter {label.lower()}", among)


def _sum(adapters: Sequence[Mapping[str, Any]]) -> str:
    ready = sum(one["state"] == "ready" for one in adapters)
    return f"{ready} of {len(adapters)} ready" if adapters else ""


def runs_card(adapters: Sequence[Mapping[str, Any]], filtered: str = "") -> Markup:
    if not adapters and filtered:
        return card(
            "Runs and adapters", empty("No name has that in it", f"There is none with '{filtered}'."), plain=True
        )
    if not adapters:
        return card(
            "Runs and adapters",
            empty(
                "Nothing is served yet, or nothing that this key may see",
                "What a trainer writes into a watched folder appears here by itself. To serve one by hand:",
                "lorakit load sql runs/sql/checkpoint-500",
            ),
            plain=True,
        )
    rows = [_row(one) for one in adapters[:MOST]]
    more = len(adapters) - MOST
    rest = Markup('<p class="inner note">{} more: filter for them</p>').format(more) if more > 0 else NOTHING
    return card("Runs and adapters", table("Runs and adapters", _HEADS, rows, numbers=(4, 5, 7)), rest, plain=True)


def _row(one: Mapping[str, Any]) -> Sequence[Markup | str]:
    named = [alias for alias in one["aliases"] if alias not in (one["name"], *FOUND_BY_ITSELF)]
    splits = one.get("splits") or {}
    shown = [pill(alias, "") for alias in named] + [pill(f"canary: {alias}", "accent") for alias in splits]
    ready = [each for each in one["revisions"] if each["id"]]
    losses = [each["eval_loss"] if each["eval_loss"] is not None else each["train_loss"] for each in ready]
    return (
        run_link(one["name"]),
        pill(one["state"]) + why(one["reason"]),
        code(short(one["revision"])) if one["revision"] else DASH,
        one["follow"],
        count(one["step"]),
        loss(one["eval_loss"]),
        spark(losses),
        count(one["requests"]),
        Markup('<span class="pills">{}</span>').format(joined(shown)),
    )


def mixes_card(mixes: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        (
            mix["name"] or Markup('<span class="quiet">{}</span>').format("without a name"),
            pill(mix["state"]) + why(mix["reason"]),
            code(mix["mix"] or ""),
            count(mix["rank"]),
            loss(mix["error"]),
            count(mix["requests"]),
            ago(mix["created"]),
        )
        for mix in reversed(mixes[-MOST:])
    ]
    heads = ("Name", "State", "Mix", "Rank", "Loses", "Requests", "Made")
    return card("Mixes", table("Mixes", heads, rows, numbers=(3, 4, 5, 6)), plain=True)
