"""The log of what happened, the newest first, as it happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from lorakit.server.page.markup import NOTHING, button, card, clock, count, joined, options, pill
from lorakit.server.page.screens.screen import Said, Screen, text

KEPT = 1000
SHOWN = 100
KINDS = {
    "loaded": "good", "ready": "good", "alias": "accent", "split": "accent", "mixed": "accent", "refused": "bad",
    "failed": "bad", "stalled": "warn", "held": "warn", "rollback": "warn", "engine": "warn", "found": "",
    "gone": "", "removed": "", "reached": "good",
}  # fmt: skip


class Happened(Screen):
    title = "events"
    place = "events"
    every = 0
    replays = True

    def build(self) -> None:
        self._known: deque[Said] = deque(maxlen=KEPT)
        self._words, self._kind, self._most = "", "", SHOWN
        self.acts = {"filter": self._filter, "more": self._more}
        self.add("head", self.head("Events", end=_FIELDS))
        self.add("log", _card(NOTHING, "…"))

    def concerns(self, event: Said) -> bool:
        self._known.appendleft(event)
        return True

    async def look(self) -> None:
        """What is known came by itself."""
        await self.api.get("/v1/key")  # whether anybody answers
        self._show()

    async def _filter(self, said: Said) -> None:
        if isinstance(said.get("text"), str):
            self._words = text(said, "text").strip().lower()
        if isinstance(said.get("values"), dict):
            self._kind = text(said, "kind")
        self._most = SHOWN
        self._show()

    async def _more(self, said: Said) -> None:
        self._most += SHOWN
        self._show()

    def _show(self) -> None:
        found = [event for event in self._known if self._is_wanted(event)]
        lines = joined(_line(event) for event in found[: self._most])
        if not found:
            lines = _NO_SUCH if self._known else _NOTHING
        elif len(found) > self._most:
            lines += _BESIDE.format(button("Older", "more", "small"))
        self.show("log", _card(lines, f"{count(len(found))} of the last {count(len(self._known))}"))

    def _is_wanted(self, event: Said) -> bool:
        kind = not self._kind or event.get("type") == self._kind
        return kind and self._words in f"{event.get('message', '')} {event.get('type', '')}".lower()


def _card(lines: Markup, told: str) -> Markup:
    end = Markup('<span class="quiet">{}</span>').format(told)
    return card("What happened", Markup('<ol class="log">{}</ol>').format(lines), end=end, plain=True)


def _line(event: Mapping[str, Any]) -> Markup:
    kind = str(event.get("type", ""))
    return Markup('<li>{}<span>{}</span><span class="what">{}</span></li>').format(
        clock(float(event.get("created", 0))), pill(kind, KINDS.get(kind, "")), event.get("message", "")
    )


_BESIDE = Markup("<li><span></span><span></span>{}</li>")  # where the messages are
_NOTHING = _BESIDE.format(Markup('<span class="quiet">Nothing has happened yet that this key may see.</span>'))
_NO_SUCH = _BESIDE.format(Markup('<span class="quiet">No event is like that: empty the filter.</span>'))
_FIELDS = Markup(
    '<form class="row" data-act="none" data-changes="filter"><select name="kind" aria-label="Kind" data-key="kind">'
    '<option value="">every kind</option>{}</select></form>'
    '<input type="search" data-filters="filter" data-key="filter" aria-label="Filter events" placeholder="Filter" '
    'size="18">'
).format(options((kind, kind) for kind in KINDS))
