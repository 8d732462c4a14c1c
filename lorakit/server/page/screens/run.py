"""One run: its losses, where its name points, the canary, and each of its revisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from nicegui import ui

from lorakit.server.page.api import NotTold, part
from lorakit.server.page.canary import canary_card, comparison_card, shares_of
from lorakit.server.page.charts import loss_chart
from lorakit.server.page.markup import (
    DASH,
    FOUND_BY_ITSELF,
    NOTHING,
    after_at,
    ago,
    button,
    card,
    code,
    count,
    empty,
    joined,
    loss,
    options,
    pill,
    short,
    size,
    table,
    why,
)
from lorakit.server.page.screens.screen import Said, Screen, text, texts

PAGE = 25  # revisions in the table at once
_HEADS = ("Revision", "State", "Means", "Train", "Eval", "Where", "Requests", "Rank", "Size", "Age", "")


class RunScreen(Screen):
    title = "run"

    def build(self) -> None:
        self.name = str(self.request.path_params["name"])
        self.client.title = f"lorakit: {self.name}"
        self._skip = 0
        self._losses: dict[str, Any] = {}
        self._drawn_of: tuple[Any, ...] = ()  # what the chart was drawn of
        self._aliases: dict[str, str] = {}
        self.acts = {
            "promote": self._promote, "rollback": self._rollback, "point": self._point, "split": self._split,
            "page": self._page,
        }  # fmt: skip
        self.add("head", self.head(self.name))
        with ui.element("section").classes("card").props('aria-label="Losses"'):
            self.add("chart-head", Markup("<h2>Losses</h2>"), tag="header")
            self._chart = ui.echart({}).classes("chart").props('role="img" aria-label="Train and eval loss over steps"')
            self.add("chart-empty")
        with ui.element("div").classes("pair"):
            self.add("canary")
            self.add("aliases")
        self.add("compared")
        self.add("revisions")

    def concerns(self, event: Said) -> bool:
        return event.get("adapter") in (self.name, None)

    async def look(self) -> None:
        try:
            view = await self.api.get(f"/v1/adapters/{part(self.name)}", revisions=PAGE, skip=self._skip)
        except NotTold as error:
            if error.status != 404:
                raise
            self._gone()
            return
        compared = await self._comparison(view)
        await self._look_at_losses(view)
        self.show("head", self._headed(view))
        self.show("compared", compared)
        self.show("canary", canary_card(view, admin=self.admin))
        self.show("aliases", aliases_card(view, admin=self.admin))
        self.show("revisions", revisions_card(view, self._skip, admin=self.admin))

    def turned(self) -> None:
        self._draw_chart()

    async def _comparison(self, view: Mapping[str, Any]) -> Markup:
        """Numbers side by side; nothing where the server keeps none."""
        try:
            told = await self.api.get(f"/v1/adapters/{part(self.name)}/comparison")
        except NotTold as error:
            if error.status != 404:
                raise
            return NOTHING
        return comparison_card(told.get("revisions", []), admin=self.admin and bool(view.get("splits")))

    async def _look_at_losses(self, view: Mapping[str, Any]) -> None:
        """Again only where there is another checkpoint, or an alias that means another."""
        now = (view.get("count"), view["revisions"][-1]["id"] if view["revisions"] else None, str(view["aliases"]))
        if now == self._drawn_of:
            return
        self._losses = await self.api.get(f"/v1/adapters/{part(self.name)}/losses", points=400)
        self._drawn_of, self._aliases = now, view["aliases"]
        self._draw_chart()

    def _draw_chart(self) -> None:
        there = any(self._losses.get(name) for name in ("train", "eval"))
        self._chart.set_visibility(there)
        self.show("chart-empty", NOTHING if there else _NO_LOSSES)
        if there:
            self._chart.options.clear()
            self._chart.options.update(loss_chart(self._losses, _pointed(self._aliases), self.theme))
            self._chart.update()

    def _headed(self, view: Mapping[str, Any]) -> Markup:
        beside = pill(view["state"])
        if view["revision"]:
            beside += Markup('<span class="quiet">answers with {}, {}</span>').format(
                code(after_at(view["revision"])), _follows(view)
            )
        acts = [Markup('<a class="button" href="/ui/playground?ask={}">Ask</a>').format(self.name)]
        if self.admin and view["follow"] == "manual":
            acts.append(button("Follow latest", "promote", revision="latest", alias=self.name))
        if self.admin and view.get("previous") not in (None, view["revision"]):
            acts.append(button(f"Roll back to {short(view['previous'])}", "rollback"))
        return self.head(self.name, beside, joined(acts)) + (why(view["reason"]) if view["reason"] else NOTHING)

    def _gone(self) -> None:
        self.show("head", self.head(self.name))
        for place in ("canary", "aliases", "compared"):
            self.show(place, NOTHING)
        self._chart.set_visibility(False)
        self.show("chart-empty", _NO_LOSSES)
        nothing = empty(
            "There is no adapter of this name, or none that this key may see", "All that there are:", "/ui/"
        )
        self.show("revisions", card("Revisions", nothing, plain=True))

    # what somebody does

    async def _promote(self, said: Said) -> None:
        await self._put(text(said, "alias") or self.name, {"revision": text(said, "revision")})

    async def _point(self, said: Said) -> None:
        alias = text(said, "alias").strip()
        if not alias:
            self.say("An alias has to have a name.", "wrong")
            return
        await self._put(alias, {"revision": text(said, "revision")})

    async def _put(self, alias: str, body: dict[str, Any]) -> None:
        view = await self.api.change("PUT", f"/v1/adapters/{part(self.name)}/aliases/{part(alias)}", body)
        self.say(f"{alias} is now {after_at(view['aliases'].get(alias, '') or str(body.get('revision')))}.")
        await self.look()

    async def _rollback(self, said: Said) -> None:
        view = await self.api.change("POST", f"/v1/adapters/{part(self.name)}/rollback")
        self.say(f"{self.name} is back at {after_at(view['revision'] or '')}.")
        await self.look()

    async def _split(self, said: Said) -> None:
        alias = text(said, "alias") or self.name
        shares = shares_of(texts(said, "revision"), texts(said, "share"))
        shadow = [one for one in texts(said, "shadow") if one]
        if len(shares) < 2 and not shadow:
            self.say("A canary takes two revisions with a share each, or one and a shadow.", "wrong")
            return
        body: dict[str, Any] = {"shadow": shadow} if shadow else {}
        if len(shares) == 1:
            body["revision"] = shares[0]["revision"]
        else:
            body["shares"] = shares
        await self.api.change("PUT", f"/v1/adapters/{part(self.name)}/aliases/{part(alias)}", body)
        self.say(f"{alias} is split.")
        await self.look()

    async def _page(self, said: Said) -> None:
        self._skip = max(0, self._skip + (PAGE if text(said, "to") == "older" else -PAGE))
        await self.look()


_NO_LOSSES = empty(
    "No losses are known", "They come from the trainer's own log (trainer_state.json) beside its checkpoints."
)


def _pointed(aliases: Mapping[str, str]) -> dict[str, str]:
    """Aliases that have a name in the chart: the run's own, those that a person set, and the best."""
    shown = [alias for alias in aliases if alias not in FOUND_BY_ITSELF] + ["best"]
    return {alias: aliases[alias] for alias in shown if alias in aliases}


def _follows(view: Mapping[str, Any]) -> str:
    return "kept there by hand" if view["follow"] == "manual" else f"follows {view['follow']}"


def aliases_card(view: Mapping[str, Any], *, admin: bool) -> Markup:
    """What each alias means, and a form to move one."""
    rows = [
        (Markup("<strong>{}</strong>").format(alias) if alias == view["name"] else alias, code(after_at(revision)))
        for alias, revision in view["aliases"].items()
    ]
    shown = table("Aliases", ("Alias", "Revision"), rows) if rows else empty("No alias yet", "Nothing is ready.")
    if not admin or not view["aliases"]:
        return card("Aliases", shown, plain=True)
    form = Markup(
        '<form class="inner" data-act="point"><div class="fields">'
        '<div><label for="alias">Alias</label><input id="alias" name="alias" data-key="alias" maxlength="128" '
        'placeholder="prod" required autocomplete="off" list="aliases"><datalist id="aliases">{}</datalist></div>'
        '<div><label for="alias-revision">Revision</label><select id="alias-revision" name="revision" '
        'data-key="alias-revision">{}</select></div>'
        "<div><button>Set</button></div></div></form>"
    ).format(options((alias, alias) for alias in view["aliases"]), options(choices(view)))
    return card("Aliases", shown, form, plain=True)


def choices(view: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The revisions of a form, the newest first."""
    found = [one for one in reversed(view["revisions"]) if one["id"] and one["state"] != "refused"]
    return [(after_at(one["id"]), short(one["id"])) for one in found]


def revisions_card(view: Mapping[str, Any], skip: int, *, admin: bool) -> Markup:
    """The newest first, as many as fit; what waits or is refused before them."""
    waiting = [one for one in view["revisions"] if not one["id"]]
    found = [one for one in reversed(view["revisions"]) if one["id"]]
    if not view["revisions"]:
        return card("Revisions", empty("No checkpoint yet", "They appear as the trainer finishes them."), plain=True)
    rows = [_row(view, one, admin=admin) for one in ([] if skip else [*reversed(waiting)]) + found]
    total = view.get("count", len(found))
    shown = f"{skip + 1}–{skip + len(found)} of {count(total)}" if total > PAGE else count(total)
    end = Markup('<span class="quiet">{}</span>').format(shown)
    if skip:
        end += button("Newer", "page", "small", to="newer")
    if skip + len(found) < total:
        end += button("Older", "page", "small", to="older")
    return card(
        "Revisions",
        table("Revisions", _HEADS, rows, numbers=(3, 4, 6, 7, 8, 9), acts=admin),
        end=end,
        plain=True,
        key="revisions",
    )


def _row(view: Mapping[str, Any], one: Mapping[str, Any], *, admin: bool) -> Sequence[Markup | str]:
    is_default = one["id"] is not None and one["id"] == view["revision"]
    aliases = [pill(alias, "accent" if alias == view["name"] else "") for alias in one["aliases"]]
    where = one["residency"] or DASH
    in_flight = (
        Markup(' <span class="quiet">{} in flight</span>').format(one["in_flight"]) if one["in_flight"] else NOTHING
    )
    act = NOTHING
    if admin and one["id"] and not is_default and one["state"] in ("ready", "loading", "draining"):
        act = button("Promote", "promote", "small", revision=after_at(one["id"]), alias=view["name"])
    reason = one["reason"] if one["reason"] else (f"repaired: {one['repaired']}" if one["repaired"] else None)
    label = code(after_at(one["id"])) if one["id"] else code(one["revision"])
    return (
        label,
        pill(one["state"]) + why(reason),
        Markup('<span class="pills">{}</span>').format(joined(aliases)),
        loss(one["train_loss"]),
        loss(one["eval_loss"]),
        Markup("{}{}").format(where, in_flight),
        count(one["requests"]),
        count(one["rank"]),
        size(one["size"]),
        ago(one["created"]),
        act,
    )
