"""The small parts that the page is made of, as HTML: pure functions, which escape whatever they are given."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

DASH = "–"
NOTHING = Markup("")
FOUND_BY_ITSELF = ("latest", "best", "final")  # aliases that nobody sets
_KINDS = {
    "ready": "good", "loading": "accent", "draining": "warn", "incomplete": "warn", "refused": "bad", "gone": "bad",
    "slot": "accent", "memory": "good",
}  # fmt: skip


def joined(parts: Iterable[Markup], between: str = "") -> Markup:
    return Markup(between).join(parts)


def pill(text: str, kind: str | None = None) -> Markup:
    """A word on a tinted ground; of a state, by its kind."""
    return Markup('<span class="pill {}">{}</span>').format(_KINDS.get(text, "") if kind is None else kind, text)


def code(text: str) -> Markup:
    return Markup("<code>{}</code>").format(text)


def button(text: str, act: str, kind: str = "", **data: Any) -> Markup:
    """`data` comes back with the click; its values are also what focus is found again by."""
    said = joined(Markup(' data-{}="{}"').format(name.replace("_", "-"), value) for name, value in data.items())
    key = f"{act}-{'-'.join(str(value) for value in data.values())}"
    return Markup('<button type="button" class="{}" data-act="{}" data-key="{}"{}>{}</button>').format(
        kind, act, key, said, text
    )


def card(title: str, *inner: Markup, end: Markup = NOTHING, plain: bool = False, key: str = "") -> Markup:
    """`plain` is for what brings its own edges, as a table does."""
    body = joined(inner) if plain else Markup('<div class="inner">{}</div>').format(joined(inner))
    told = Markup('<div class="end">{}</div>').format(end) if end else NOTHING
    return Markup('<section class="card" aria-label="{}"{}><header><h2>{}</h2>{}</header>{}</section>').format(
        title, Markup(' id="{}"').format(key) if key else NOTHING, title, told, body
    )


_ACTS = Markup('<span class="unseen">What can be done</span>')


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Markup | str]],
    numbers: Sequence[int] = (),
    *,
    acts: bool = False,
) -> Markup:
    """Columns whose places are among `numbers` are aligned as such; with `acts` the last one, of buttons, stays in
    sight."""

    def in_row(cells: Sequence[Markup | str], tag: str) -> Markup:
        made = []
        for place, text in enumerate(cells):
            kind = Markup(' class="number"') if place in numbers else NOTHING
            scope = Markup(' scope="col"') if tag == "th" else NOTHING
            made.append(Markup("<{0}{1}{2}>{3}</{0}>").format(tag, kind, scope, text if text or tag == "td" else _ACTS))
        return Markup("<tr>{}</tr>").format(joined(made))

    body = joined(in_row(row, "td") for row in rows)
    return Markup(
        '<div class="wide" tabindex="0" role="group" aria-label="{0}"><table{3}><caption class="unseen">{0}</caption>'
        "<thead>{1}</thead><tbody>{2}</tbody></table></div>"
    ).format(caption, in_row(heads, "th"), body, Markup(' class="acts"') if acts else NOTHING)


def why(text: str | None) -> Markup:
    """A reason, below what it is the reason of."""
    return Markup('<span class="why">{}</span>').format(text) if text else NOTHING


def empty(title: str, text: str, command: str = "") -> Markup:
    """There is nothing, and what to do that there is."""
    shown = Markup("<br>{}").format(code(command)) if command else NOTHING
    return Markup('<div class="empty"><strong>{}</strong>{}{}</div>').format(title, text, shown)


def banner(title: str, text: str) -> Markup:
    """Something is wrong."""
    return Markup('<div class="banner" role="alert"><strong>{}</strong> {}</div>').format(title, text)


def tiles(entries: Mapping[str, tuple[str, str]]) -> Markup:
    """Names to numbers and what stands small beside them."""
    told = joined(
        Markup('<div class="tile"><dt>{}</dt><dd>{} <small>{}</small></dd></div>').format(name, value, beside)
        for name, (value, beside) in entries.items()
    )
    return Markup('<dl class="tiles">{}</dl>').format(told)


def options(values: Iterable[tuple[str, str]], chosen: str = "") -> Markup:
    """Values and what is shown of each."""
    return joined(
        Markup('<option value="{}"{}>{}</option>').format(
            value, Markup(" selected") if value == chosen else NOTHING, text
        )
        for value, text in values
    )


def run_link(name: str) -> Markup:
    return Markup('<a href="/ui/runs/{}">{}</a>').format(name, name)


def spark(values: Sequence[float | None]) -> Markup:
    """A line without axes; nothing where there are not two points."""
    points = [(place, value) for place, value in enumerate(values) if value is not None]
    if len(points) < 2:
        return NOTHING
    low, high = min(value for _, value in points), max(value for _, value in points)
    wide, tall = len(values) - 1, (high - low) or 1.0
    path = " ".join(
        f"{'M' if number == 0 else 'L'}{place / wide * 100:.1f},{2 + (high - value) / tall * 20:.1f}"
        for number, (place, value) in enumerate(points)
    )
    return Markup(
        '<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" '
        'aria-label="from {} to {}"><path d="{}"/></svg>'
    ).format(loss(points[0][1]), loss(points[-1][1]), path)


# numbers


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}".replace(",", "\u202f")


def loss(value: float | None) -> str:
    return DASH if value is None else f"{value:.4g}"


def share(value: float | None) -> str:
    return DASH if value is None else f"{value * 100:.3g} %"


def seconds(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"


def size(value: float | None) -> str:
    if value is None:
        return DASH
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def ago(at: float | None) -> Markup:
    """How long since, and when exactly for who points at it."""
    if at is None:
        return escape(DASH)
    past = max(0.0, time.time() - at)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if past >= length:
            shown = f"{past // length:.0f} {unit}"
            break
    else:
        shown = f"{past:.0f} s"
    return Markup('<time title="{}">{}</time>').format(_exact(at), shown)


def clock(at: float) -> Markup:
    shown = time.strftime("%H:%M:%S", time.gmtime(at))
    return Markup('<time class="quiet" title="{}">{}</time>').format(_exact(at), shown)


def _exact(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def after_at(name: str) -> str:
    """`step-600-3fa9c1d2` of `sql@step-600-3fa9c1d2`."""
    return name.partition("@")[2] or name


def short(name: str) -> str:
    """`step-600` of `sql@step-600-3fa9c1d2`."""
    label = after_at(name)
    return label.rpartition("-")[0] or label
