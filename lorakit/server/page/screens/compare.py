"""How adapters lie to one another, before they are mixed: a heat map of their cosines, and where they interfere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from nicegui import ui

from lorakit.server.page.charts import heat_map, signed
from lorakit.server.page.markup import DASH, NOTHING, banner, card, count, empty, joined, options, short, table
from lorakit.server.page.screens.screen import Said, Screen, texts

MOST = 8
OFFERED = 40  # names with a box to tick
SHOWN = 8  # modules
_HEADS = ("Pair", "Cosine", "Writes to the same", "Reads from the same", "Disturbs the first", "The second", "Modules")


class Compare(Screen):
    title = "compare"
    place = "compare"
    every = 0

    def build(self) -> None:
        self._names: list[str] = []
        self._told: dict[str, Any] = {}
        self._chosen: list[str] = []
        self.acts = {"compare": self._compare}
        self.add("head", self.head("Compare"))
        self.add("form")
        self.add("wrong")
        with ui.element("section").classes("card").props('aria-label="Cosines"') as self._map:
            self.add("map-head", Markup("<h2>Cosines</h2>"), tag="header")
            self._chart = (
                ui.echart({}).classes("chart square").props('role="img" aria-label="Cosine of each two adapters"')
            )
        self._map.set_visibility(False)
        self.add("pairs")

    async def look(self) -> None:
        adapters = (await self.api.get("/v1/adapters", revisions=1))["data"]
        names = [one["name"] for one in adapters if one["revision"]]
        if names != self._names or not names:
            self._names = names
            self._show_form()

    def turned(self) -> None:
        self._draw()

    def _show_form(self) -> None:
        if len(self._names) < 2:
            nothing = empty(
                "There is nothing to compare", "It takes two adapters that are ready.", "lorakit load chat runs/chat"
            )
            self.show("form", card("Adapters", nothing, plain=True))
        else:
            self.show("form", _form(self._names, self._chosen or self._names[:2]))

    async def _compare(self, said: Said) -> None:
        others = " ".join(texts(said, "others")).replace(",", " ").split()
        chosen = list(dict.fromkeys([*texts(said, "adapter"), *others]))
        if not 2 <= len(chosen) <= MOST:
            self.show("wrong", banner("Choose two to eight.", f"{len(chosen)} are chosen."))
            return
        self._told = await self.api.get("/v1/comparisons", adapter=chosen)
        self._chosen = chosen
        self.show("wrong", NOTHING)
        self._draw()

    def _draw(self) -> None:
        if not self._told:
            return
        names = [one["name"] for one in self._told["adapters"]]
        self._map.set_visibility(True)
        self._chart.options.clear()
        self._chart.options.update(heat_map(names, self._told["cosines"], self.theme))
        self._chart.update()
        self.show("pairs", pairs_card(self._told))


def _form(names: Sequence[str], chosen: Sequence[str]) -> Markup:
    boxes = joined(
        Markup('<label><input type="checkbox" name="adapter" value="{0}" data-key="box-{0}"{1}>{0}</label>').format(
            name, Markup(" checked") if name in chosen else NOTHING
        )
        for name in names[:OFFERED]
    )
    return card(
        "Adapters",
        Markup(
            '<form class="stack" data-act="compare"><fieldset class="choices"><legend class="unseen">'
            'Adapters</legend>{}</fieldset><div class="fields"><div><label for="others">Others, by any name that a '
            "request may use</label>"
            '<input id="others" name="others" data-key="others" autocomplete="off" list="known" '
            'placeholder="sql@step-500 chat@best"><datalist id="known">{}</datalist></div>'
            '<div><button class="main" data-key="compare">Compare</button></div></div></form>'
        ).format(boxes, options((name, name) for name in names)),
    )


def pairs_card(told: Mapping[str, Any]) -> Markup:
    """Each two in numbers, and the modules where they interfere most."""
    names = [one["name"] for one in told["adapters"]]
    rows = [
        _row(f"{names[pair['first']]} and {names[pair['second']]}", pair, _modules_of(pair)) for pair in told["pairs"]
    ]
    shown = table("Pairs", _HEADS, rows, numbers=(1, 2, 3, 4, 5, 6))
    meant = joined(
        Markup("<li>{} means {}</li>").format(one["name"], short(one["revision"])) for one in told["adapters"]
    )
    notes = joined(Markup("<li>{}</li>").format(note) for note in told.get("notes", []))
    worst = joined(
        Markup('<details data-key="worst-{}-{}"><summary>{}</summary>{}</details>').format(
            pair["first"],
            pair["second"],
            f"{names[pair['first']]} and {names[pair['second']]}: where they interfere most",
            _modules(pair),
        )
        for pair in told["pairs"] if pair["modules"]
    )  # fmt: skip
    about = Markup('<ul class="note">{}{}</ul>').format(meant, notes)
    return card("Pairs", shown, Markup('<div class="inner stack">{}{}</div>').format(worst, about), plain=True)


def _modules(pair: Mapping[str, Any]) -> Markup:
    rows = [_row(one["module"], one)[:6] for one in pair["modules"][:SHOWN]]
    return table("Modules", ("Module", *_HEADS[1:6]), rows, numbers=range(1, 6))


def _row(name: str, one: Mapping[str, Any], modules: str = "") -> list[str]:
    first, second = one["interference"]
    numbers = (one["column_overlap"], one["row_overlap"], first, second)
    return [name, signed(one["cosine"], 3), *(DASH if value is None else f"{value:.3f}" for value in numbers), modules]


def _modules_of(pair: Mapping[str, Any]) -> str:
    every = pair["shared"] + pair["only_first"] + pair["only_second"]
    return f"{count(pair['shared'])} of {count(every)}"
