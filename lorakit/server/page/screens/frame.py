"""What stands around every screen."""

from __future__ import annotations

from markupsafe import Markup

from lorakit.server.page.door import PLACE, address_of
from lorakit.server.page.markup import NOTHING, joined

PLACES = {
    "": "Runs", "traffic": "Traffic", "playground": "Playground", "compare": "Compare", "lineage": "Lineage",
    "events": "Events",
}  # fmt: skip

_KEYS = {
    "g r": "Runs", "g t": "Traffic", "g p": "Playground", "g c": "Compare", "g l": "Lineage", "g e": "Events",
    "/": "Go to the filter, or to the question", "Ctrl Enter": "Send the form that you are in", "d": "Dark or light",
    "?": "This list",
}  # fmt: skip


def rail(place: str, *, signed_in: bool) -> Markup:
    """The way to the other screens; `place` is where one is."""
    links = joined(
        Markup('<li><a href="{}/{}"{}>{}</a></li>').format(
            PLACE, path, Markup(' aria-current="page"') if path == place else NOTHING, name
        )
        for path, name in PLACES.items()
    )
    leave = (
        Markup('<form method="post" action="{}/leave"><button class="bare">Sign out</button></form>').format(PLACE)
        if signed_in
        else NOTHING
    )
    return Markup(
        '<div><a class="skip" href="#content">To the content</a>'
        '<a class="brand" href="{}/"><img src="{}" alt="">lorakit</a>'
        '<nav aria-label="Screens"><ul>{}</ul></nav>'
        '<div class="foot">'
        '<button type="button" class="bare" data-theme-turn title="Dark or light">Theme</button>'
        '<button type="button" class="bare" data-keys>Keys</button>{}</div></div>'
    ).format(PLACE, address_of("icon.svg"), links, leave)


def room_head(title: str, beside: Markup = NOTHING, end: Markup = NOTHING) -> Markup:
    told = Markup('<div class="end">{}</div>').format(end) if end else NOTHING
    return Markup('<div class="head"><h1>{}</h1>{}{}</div>').format(title, beside, told)


def _shown_keys() -> Markup:
    return joined(
        Markup("<dt>{}</dt><dd>{}</dd>").format(
            joined((Markup("<kbd>{}</kbd>").format(key) for key in keys.split()), " "), what
        )
        for keys, what in _KEYS.items()
    )


BESIDE = Markup(
    '<div id="said" role="status" aria-live="polite"></div>'
    '<dialog id="keys" aria-label="Keys"><h2>Keys</h2><dl>{}</dl>'
    '<form method="dialog"><button class="main">Close</button></form></dialog>'
).format(_shown_keys())
