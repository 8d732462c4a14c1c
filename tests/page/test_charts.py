"""What is drawn: in colours that can be read, and with nothing that stands out left out."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lorakit.server.page.charts import COLOURS, Theme, heat_map, loss_chart, rate_chart
from lorakit.server.page.door import STATIC

TEXT, SHAPE = 4.5, 3.0  # WCAG 2.2, AA: 1.4.3 and 1.4.11
CSS = (STATIC / "page.css").read_text()


def contrast(one: str, other: str) -> float:
    """As WCAG defines it, of two colours as #rrggbb."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def variables(theme: Theme) -> dict[str, str]:
    """The style sheet's colours."""
    light, dark = (
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block)) for block in re.findall(r":root[^{]*\{([^}]*)", CSS)
    )
    return light if theme == "light" else light | dark


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("ink", "papers", "least"),
    [
        ("ink", ("paper", "card", "sunk", "tint", "bad-tint"), TEXT),
        ("quiet", ("paper", "card", "sunk"), TEXT),
        ("accent", ("paper", "card", "tint", "sunk"), TEXT),
        ("on-accent", ("accent",), TEXT),
        ("good", ("good-tint", "card"), TEXT),
        ("warn", ("warn-tint", "card"), TEXT),
        ("bad", ("bad-tint", "card"), TEXT),
        ("card", ("ink", "bad"), TEXT),
        ("field", ("card", "paper"), SHAPE),
    ],
)
def test_every_ink_can_be_read_on_its_papers(theme: Theme, ink: str, papers: tuple[str, ...], least: float) -> None:
    known = variables(theme)
    for paper in papers:
        assert contrast(known[ink], known[paper]) >= least, (ink, paper)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_charts_have_the_colours_of_the_page_and_lines_that_can_be_seen(theme: Theme) -> None:
    known, colours = variables(theme), COLOURS[theme]
    for name in ("card", "ink", "quiet", "line", "accent", "sunk", "bad"):
        assert getattr(colours, name) == known[name]
    assert all(contrast(line, colours.card) >= SHAPE for line in colours.lines)


LOSSES: dict[str, Any] = {
    "train": [[10, 2.0], [20, 1.5], [30, None], [40, 1.0]],
    "eval": [[20, 1.7], [40, 1.2]],
    "checkpoints": [
        {"revision": "sql@step-20-aa", "step": 20, "train_loss": 1.5, "eval_loss": 1.7},
        {"revision": "sql@step-30-bb", "step": 30, "train_loss": None, "eval_loss": None},
    ],
}


def test_checkpoints_stand_on_the_line_and_those_of_aliases_have_names() -> None:
    drawn = loss_chart(
        LOSSES, {"sql": "sql@step-20-aa", "prod{c}": "sql@step-20-aa", "other": "sql@step-99-cc"}, "light"
    )
    train, evals, marks, named = drawn["series"]
    assert (train["data"], evals["data"]) == (LOSSES["train"], LOSSES["eval"])
    assert [mark["value"] for mark in marks["data"]] == [[20, 1.7], [30, 1.45]], (
        "without a loss of its own, on the line"
    )
    assert [mark["label"]["formatter"] for mark in named["data"]] == ["sql, prod(c}"], "a brace would be a template"


def test_a_run_without_eval_losses_has_its_checkpoints_on_the_train_line() -> None:
    drawn = loss_chart({**LOSSES, "eval": [], "checkpoints": [{**LOSSES["checkpoints"][1]}]}, {}, "dark")
    assert drawn["series"][2]["data"][0]["value"] == [30, 1.25]


def test_a_heat_map_has_a_number_in_each_cell() -> None:
    cells = heat_map(["a", "b"], [[1.0, -0.25], [-0.25, None]], "light")["series"][0]["data"]
    assert [cell["value"] for cell in cells] == [[0, 0, 1.0], [1, 0, -0.25], [0, 1, -0.25], [1, 1, "-"]]
    assert [cell["label"]["formatter"] for cell in cells] == ["+1.00", "−0.25", "−0.25", "–"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_in_cells_can_be_read_whatever_the_cosine(theme: Theme) -> None:
    """Between sunk and the end of the scale, as ECharts mixes: in sRGB."""
    colours = COLOURS[theme]
    for hundredths in range(-100, 101):
        value = hundredths / 100
        end = colours.accent if value > 0 else colours.bad
        parts = [(int(colours.sunk[at : at + 2], 16), int(end[at : at + 2], 16)) for at in (1, 3, 5)]
        ground = "#" + "".join(f"{round(low + (high - low) * abs(value)):02x}" for low, high in parts)
        (cell,) = heat_map(["a"], [[value]], theme)["series"][0]["data"]
        assert contrast(cell["label"]["color"], ground) >= TEXT, value


def test_rates_are_lines_of_milliseconds() -> None:
    (line,) = rate_chart({"sql": [(1.0, 2.0), (2.0, 2.5)]}, "light")["series"]
    assert line["data"] == [[1000.0, 2.0], [2000.0, 2.5]]
