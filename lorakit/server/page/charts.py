"""What ECharts is told to draw: pure functions of what the API says. A canvas knows no style sheet, so each theme's
colours stand here once more."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

Theme = Literal["light", "dark"]
Line = Sequence[tuple[float, float]]  # steps and values, without gaps


@dataclass(frozen=True, slots=True)
class Colours:
    """As in page.css. `lines` are for several things that are told apart, the accent first."""

    card: str
    ink: str
    quiet: str
    line: str
    accent: str
    sunk: str
    bad: str
    lines: tuple[str, ...]


COLOURS: Mapping[Theme, Colours] = {
    "light": Colours("#ffffff", "#1a1f26", "#57606b", "#dfe3e7", "#3152c8", "#f0f2f4", "#b3261e",
                     ("#3152c8", "#0f7a6c", "#a04a00", "#8a3ab0", "#57606b", "#b3261e")),
    "dark": Colours("#161a20", "#e4e8ed", "#9aa5b1", "#2a313a", "#93a9ff", "#1d2229", "#ff938a",
                    ("#93a9ff", "#5cc9b6", "#f0a35e", "#d59af0", "#9aa5b1", "#ff938a")),
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
NEAR = 25  # checkpoints up to which each has a mark


_LEGEND = [{"name": "train loss", "icon": "roundRect"}, {"name": "eval loss", "icon": "roundRect"}, "checkpoints"]


def loss_chart(told: Mapping[str, Any], aliases: Mapping[str, str], theme: Theme) -> dict[str, Any]:
    """`/v1/adapters/{name}/losses` as lines, with the checkpoints on them; those that aliases mean have names.

    `aliases` is as `/v1/adapters/{name}` says it.
    """
    colours = COLOURS[theme]
    train, evals = told.get("train", []), told.get("eval", [])
    lines = [[(at, value) for at, value in line if value is not None] for line in (evals, train)]
    marks = [
        {"value": [one["step"], height], "name": one["revision"]}
        for one in told.get("checkpoints", [])
        if (height := _height(one, lines)) is not None
    ]
    named = _named(marks, aliases, colours)
    big = len(marks) > NEAR
    series = [
        _line("train loss", train, colours.lines[4], width=1.25),
        _line("eval loss", evals, colours.accent),
        {"name": "checkpoints", "type": "scatter", "data": marks, "symbolSize": 4 if big else 8, "large": False,
         "itemStyle": {"color": colours.card, "borderColor": colours.accent, "borderWidth": 1 if big else 1.75}},
        {"name": "aliases", "type": "scatter", "data": named, "symbolSize": 11, "z": 5,
         "itemStyle": {"color": colours.accent, "borderColor": colours.card, "borderWidth": 2},
         "labelLayout": {"hideOverlap": True},
         "tooltip": {"show": False}},
    ]  # fmt: skip
    return {
        **_common(colours),
        "legend": {"data": _LEGEND, "top": 0, "right": 8, "itemWidth": 14,
                   "itemHeight": 6, "textStyle": {"color": colours.quiet, "fontFamily": FONT}},
        "grid": {"left": 8, "right": 32, "top": 36, "bottom": 8, "containLabel": True},
        "tooltip": {"trigger": "item", **_tooltip(colours)},
        "xAxis": {**_axis(colours), "type": "value", "name": "", "min": "dataMin", "max": "dataMax",
                  "splitLine": {"show": False}},
        "yAxis": {**_axis(colours), "type": "value", "scale": True},
        "dataZoom": [{"type": "inside", "filterMode": "none", "zoomOnMouseWheel": "ctrl"}],
        "series": series,
    }  # fmt: skip


def _named(marks: list[dict[str, Any]], aliases: Mapping[str, str], colours: Colours) -> list[dict[str, Any]]:
    """The checkpoints that aliases mean."""
    by_revision: dict[str, list[str]] = {}
    for alias, revision in aliases.items():
        by_revision.setdefault(revision, []).append(alias)
    found = []
    for mark in marks:
        if names := by_revision.get(mark["name"]):
            label = {
                "show": True, "formatter": ", ".join(names).replace("{", "("), "position": "top", "distance": 8,
                "color": colours.ink, "fontFamily": FONT, "fontWeight": 600, "fontSize": 12,
                "textBorderColor": colours.card, "textBorderWidth": 3, "width": 140, "overflow": "truncate",
            }  # fmt: skip
            found.append({**mark, "label": label})
    return found


def _height(one: Mapping[str, Any], lines: Sequence[Line]) -> float | None:
    """Where a checkpoint stands: at its own eval loss where it was evaluated itself, else on the first line that there
    is."""
    if one.get("eval_loss") is not None:
        return float(one["eval_loss"])
    line = next(filter(None, lines), None)
    return _on_line(line, one["step"]) if line is not None else one.get("train_loss")


def _on_line(line: Line, step: float) -> float:
    """The height of a line at a step; of its nearest end where it does not reach there."""
    place = bisect_left(line, step, key=lambda point: float(point[0]))
    if place in (0, len(line)):
        return float(line[min(place, len(line) - 1)][1])
    (begin, low), (end, high) = line[place - 1], line[place]
    return float(low + (high - low) * (step - begin) / (end - begin)) if end > begin else float(high)


def rate_chart(rates: Mapping[str, Sequence[tuple[float, float]]], theme: Theme) -> dict[str, Any]:
    """Requests a second by alias, each as (seconds since 1970, rate)."""
    colours = COLOURS[theme]
    series = [
        {**_line(alias, [[at * 1000, round(rate, 3)] for at, rate in points], colour),
         "areaStyle": {"opacity": 0.08}}
        for colour, (alias, points) in zip(cycle(colours.lines), rates.items(), strict=False)
    ]  # fmt: skip
    return {
        **_common(colours),
        "legend": {"top": 0, "right": 8, "itemWidth": 12, "itemHeight": 12, "type": "scroll", "icon": "roundRect",
                   "textStyle": {"color": colours.quiet, "fontFamily": FONT}},
        "grid": {"left": 8, "right": 20, "top": 36, "bottom": 8, "containLabel": True},
        "tooltip": {"trigger": "axis", **_tooltip(colours)},
        "xAxis": {**_axis(colours), "type": "time", "splitLine": {"show": False}},
        "yAxis": {**_axis(colours), "type": "value", "min": 0, "minInterval": 0.5},
        "series": series,
    }  # fmt: skip


def heat_map(names: Sequence[str], cosines: Sequence[Sequence[float | None]], theme: Theme) -> dict[str, Any]:
    """Each adapter with each: the accent where two point the same way, red where they undo each other."""
    colours = COLOURS[theme]
    data = [
        [column, row, None if value is None else round(value, 3)]
        for row, values in enumerate(cosines)
        for column, value in enumerate(values)
    ]
    cells = [
        {"value": [x, y, value if value is not None else "-"], "label": _cell_label(value, colours)}
        for x, y, value in data
    ]
    labels = {"color": colours.ink, "fontFamily": FONT, "width": 110, "overflow": "truncate"}
    return {
        **_common(colours),
        "grid": {"left": 8, "right": 8, "top": 8, "bottom": 8, "containLabel": True},
        "tooltip": {"trigger": "item", **_tooltip(colours)},
        "xAxis": {"type": "category", "data": list(names), "axisLine": {"show": False}, "axisTick": {"show": False},
                  "axisLabel": {**labels, "interval": 0, "rotate": 30 if len(names) > 3 else 0}},
        "yAxis": {"type": "category", "data": list(names), "inverse": True, "axisLine": {"show": False},
                  "axisTick": {"show": False}, "axisLabel": labels},
        "visualMap": {"show": False, "min": -1, "max": 1, "dimension": 2,
                      "inRange": {"color": [colours.bad, colours.sunk, colours.accent]}},
        "series": [{"name": "cosine", "type": "heatmap", "data": cells,
                    "itemStyle": {"borderColor": colours.card, "borderWidth": 3, "borderRadius": 4}}],
    }  # fmt: skip


def _cell_label(value: float | None, colours: Colours) -> dict[str, Any]:
    return {
        "show": True,
        "formatter": signed(value),
        "color": readable_on(ground_of(value, colours)),
        "fontFamily": FONT,
    }


def signed(value: float | None, digits: int = 2) -> str:
    """`+0.25`, `−0.25`; what rounds to nothing has no sign."""
    shown = "–" if value is None else f"{value:+.{digits}f}".replace("-", "−")
    return shown if value is None or shown.strip("+−0.") else shown[1:]


def ground_of(value: float | None, colours: Colours) -> str:
    """A cell's colour, mixed as ECharts does."""
    share = abs(value or 0.0)
    end = colours.accent if (value or 0.0) > 0 else colours.bad
    pairs = zip(_parts(colours.sunk), _parts(end), strict=True)
    return "#" + "".join(f"{round(low * (1 - share) + high * share):02x}" for low, high in pairs)


def readable_on(ground: str) -> str:
    """Black or white, whichever has more contrast: 4.5 at least, with any colour."""
    return "#000000" if luminance(ground) > 0.179 else "#ffffff"


def luminance(colour: str) -> float:
    """Relative, of #rrggbb (WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
              for part in (value / 255 for value in _parts(colour))]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _parts(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def _line(name: str, points: Sequence[Any], colour: str, width: float = 1.75) -> dict[str, Any]:
    return {
        "name": name, "type": "line", "data": list(points), "showSymbol": False, "connectNulls": False,
        "lineStyle": {"width": width, "color": colour}, "itemStyle": {"color": colour},
        "emphasis": {"disabled": True},
    }  # fmt: skip


def _common(colours: Colours) -> dict[str, Any]:
    return {
        "animation": False,
        "backgroundColor": "transparent",
        "textStyle": {"fontFamily": FONT, "color": colours.ink},
    }


def _axis(colours: Colours) -> dict[str, Any]:
    return {
        "axisLabel": {"color": colours.quiet, "fontFamily": FONT, "hideOverlap": True},
        "axisLine": {"lineStyle": {"color": colours.line}},
        "axisTick": {"show": False},
        "splitLine": {"lineStyle": {"color": colours.line}},
    }


def _tooltip(colours: Colours) -> dict[str, Any]:
    return {
        "backgroundColor": colours.card, "borderColor": colours.line, "confine": True,
        "textStyle": {"color": colours.ink, "fontFamily": FONT, "fontSize": 12},
    }  # fmt: skip
