"""Pictures: what is drawn, by matplotlib's own account of it."""

from __future__ import annotations

import math
from typing import Any

from lorakit.checkpoints.curves import losses_in
from lorakit.checkpoints.metadata import Metadata
from lorakit.cli.plots import losses_figure
from tests.checkpoints.written import evaluated


def drawn(figure: Any) -> tuple[dict[str, list[float]], list[str], list[float]]:
    """Curves by their label, what is written beside checkpoints, and where checkpoints are marked."""
    (axes,) = figure.axes
    curves = {
        line.get_label(): [float(value) for value in line.get_ydata()]
        for line in axes.lines
        if " loss" in str(line.get_label())
    }
    marks = [float(segment[0][0]) for each in axes.collections for segment in each.get_segments()]
    return curves, [text.get_text() for text in axes.texts], marks


def test_both_losses_are_drawn_with_the_checkpoints_marked_and_some_of_them_named() -> None:
    log = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, evaluated(2, 2.5), {"step": 2, "loss": 1.0}]
    rows = [Metadata(f"sql@step-{step}", f"/{step}", "sql", step) for step in (1, 2)]
    curves, names, marks = drawn(losses_figure(losses_in(log), rows, {"sql@step-2": "latest, best"}, "sql"))
    assert repr(curves["train loss"]) == repr([3.0, 2.0, math.nan, 1.0])
    assert curves["eval loss"] == [2.5]
    assert (names, marks) == (["latest, best"], [1.0, 2.0])


def test_a_name_is_drawn_as_it_is_and_one_loss_alone_as_one_curve() -> None:
    rows = [Metadata("a", "/a", "a", 1)]
    figure = losses_figure(losses_in([evaluated(1, 2.0)]), rows, {"a": "$x^2$"}, "$a_b$")
    curves, names, _ = drawn(figure)
    assert list(curves) == ["eval loss"]
    assert names == [r"\$x^2\$"]
    assert figure.axes[0].get_title() == r"\$a_b\$"
