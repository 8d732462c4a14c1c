"""Filters, order and the best of some checkpoints."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.checkpoints.listing import Filter, admitted, best_of, in_order, parse_filter
from lorakit.checkpoints.metadata import Metadata
from lorakit.errors import NotFound, UsageError

NAN = math.nan


def row(step: int, **more: Any) -> Metadata:
    return Metadata(f"sql@step-{step}", f"/runs/sql/checkpoint-{step}", "sql", step, **{"state": "finished", **more})


def measured(step: int, loss: float | None, at: int | None = None, **more: Any) -> Metadata:
    return row(step, eval_loss=loss, eval_step=step if at is None and loss is not None else at, **more)


def steps(rows: list[Metadata]) -> list[int | None]:
    return [row.step for row in rows]


LOSSES = [measured(1, 1.5), measured(2, NAN), measured(3, 1.2), measured(4, None), measured(5, 0.9)]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("eval_loss<1.2", Filter("eval_loss", "<", 1.2)),
        (" eval_loss >= -1e-3 ", Filter("eval_loss", ">=", -0.001)),
        ("eval_loss=.5", Filter("eval_loss", "=", 0.5)),
        ("size>1GB", Filter("size", ">", 1e9)),
        ("size<=2.5 kB", Filter("size", "<=", 2500)),
        ("size>10", Filter("size", ">", 10)),
        ("state!=finished", Filter("state", "!=", "finished")),
        ("base==org/a<b", Filter("base", "==", "org/a<b")),
        ("run=a=b", Filter("run", "=", "a=b")),
        ("rewards/margins>0", Filter("rewards/margins", ">", 0)),
    ],
)
def test_a_filter_is_a_field_an_operator_and_a_value(text: str, meant: Filter) -> None:
    assert parse_filter(text) == meant


@pytest.mark.parametrize(
    "text",
    ["", "eval_loss", "eval_loss<", "<1", "eval_loss<x", "eval_loss<1GB", "size>1XB", "state<finished", "step~5",
     "eval_loss<1 or 1", "__import__('os')<1", "eval_loss<1)", "step=1_0", "eval_loss<nan"],
)  # fmt: skip
def test_what_is_no_filter_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"filter|number|compare"):
        parse_filter(text)


@given(st.text(max_size=30))
def test_any_text_is_a_filter_or_a_usage_error(text: str) -> None:
    try:
        found = parse_filter(text)
    except UsageError:
        return
    assert found.field in text
    assert found.compare in text


@given(
    values=st.lists(st.none() | st.floats(allow_nan=True, width=16), max_size=8),
    bound=st.floats(allow_nan=False, allow_infinity=False, width=16),
)
def test_below_a_bound_is_what_is_known_to_be(values: list[float | None], bound: float) -> None:
    rows = [measured(step, value) for step, value in enumerate(values)]
    found = admitted(rows, [parse_filter(f"eval_loss<{bound!r}")])
    assert steps(found) == [step for step, value in enumerate(values) if value is not None and value < bound]


def test_every_filter_has_to_be_met() -> None:
    assert steps(admitted(LOSSES, [parse_filter("eval_loss<1.4"), parse_filter("step<5")])) == [3]
    assert steps(admitted(LOSSES, [])) == [1, 2, 3, 4, 5]


def test_words_aliases_and_logged_metrics_filter_too() -> None:
    rows = [
        row(1, aliases=("sql", "prod"), metrics={"eval_accuracy": 0.5}),
        row(2, state="incomplete", metrics={"eval_accuracy": 0.7}),
        row(3, metrics=None),
    ]
    assert steps(admitted(rows, [parse_filter("aliases=prod")])) == [1]
    assert steps(admitted(rows, [parse_filter("aliases!=prod")])) == [2, 3]
    assert steps(admitted(rows, [parse_filter("state=finished")])) == [1, 3]
    assert steps(admitted(rows, [parse_filter("eval_accuracy>0.6")])) == [2]
    assert steps(admitted(rows, [parse_filter("base!=x")])) == []


def test_a_field_that_is_none_is_not_passed_over() -> None:
    with pytest.raises(UsageError, match="did you mean 'eval_loss'"):
        admitted(LOSSES, [parse_filter("eval_los<1")])
    with pytest.raises(UsageError, match="there are id, path"):
        in_order(LOSSES, "zzz")
    assert admitted([], [parse_filter("eval_accuracy>1")]) == []


def test_a_mistyped_word_is_answered_with_the_nearest_field() -> None:
    with pytest.raises(UsageError, match="did you mean 'state'"):
        parse_filter("stat=finished")


def test_stalled_ones_are_found_by_their_state() -> None:
    rows = [row(1), row(2, state="stalled"), row(3, state="incomplete")]
    assert steps(admitted(rows, [parse_filter("state=stalled")])) == [2]


def test_unknown_values_come_last_in_both_directions_and_nan_before_them() -> None:
    assert steps(in_order(LOSSES, "eval_loss")) == [5, 3, 1, 2, 4]
    assert steps(in_order(LOSSES, "eval_loss:asc")) == [5, 3, 1, 2, 4]
    assert steps(in_order(LOSSES, "eval_loss:desc")) == [1, 3, 5, 2, 4]
    with pytest.raises(UsageError, match="FIELD:desc"):
        in_order(LOSSES, "eval_loss:down")


@given(st.lists(st.none() | st.floats(), max_size=8), st.sampled_from(["", ":desc"]))
def test_sorting_loses_none_and_keeps_equals_in_order(values: list[float | None], direction: str) -> None:
    rows = [measured(step, value) for step, value in enumerate(values)]
    found = in_order(rows, f"eval_loss{direction}")
    assert sorted(steps(found), key=str) == sorted(steps(rows), key=str)
    known = [row for row in found if row.eval_loss is not None and not math.isnan(row.eval_loss)]
    assert found[: len(known)] == known
    for one, other in pairwise(known):
        assert one.eval_loss is not None
        assert other.eval_loss is not None
        assert one.eval_loss >= other.eval_loss if direction else one.eval_loss <= other.eval_loss
        assert one.eval_loss != other.eval_loss or (one.step or 0) < (other.step or 0)


def test_best_is_the_lowest_loss_of_its_own_step() -> None:
    assert best_of(LOSSES).step == 5
    assert best_of([*LOSSES, measured(6, 0.1, at=5)]).step == 5
    assert best_of([*LOSSES, measured(6, 0.1, state="incomplete")]).step == 5
    assert best_of([measured(1, 1.0), measured(2, 1.0)]).step == 1


def test_best_by_another_metric_needs_to_know_which_way() -> None:
    rows = [row(step, metrics={"eval_accuracy": value}) for step, value in ((1, 0.2), (2, NAN), (3, 0.7), (4, 0.5))]
    assert best_of(rows, "eval_accuracy", "max").step == 3
    assert best_of(rows, "eval_accuracy", "min").step == 1
    with pytest.raises(UsageError, match="--mode min or --mode max"):
        best_of(rows, "eval_accuracy")
    assert best_of([row(1, train_loss=2.0), row(2, train_loss=1.0)], "train_loss").step == 2


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_is_worst_but_measured(mode: Any) -> None:
    assert best_of([measured(1, NAN), measured(2, 5.0)], mode=mode).step == 2
    assert best_of([measured(1, NAN), measured(2, None)], mode=mode).step == 1


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "no checkpoint is finished"),
        (
            [row(1, state="incomplete", reason="it grows")],
            "the last, '/runs/sql/checkpoint-1', is incomplete: it grows",
        ),
        ([measured(2, 1.0, at=1)], "the evaluations are of other steps: evaluate where you save"),
        ([row(1, metrics={"grad_norm": 1.0})], "eval_loss of its own step; there are grad_norm"),
        ([row(1)], "there is no other metric either"),
    ],
)
def test_when_none_is_best_the_reason_is_said(rows: list[Metadata], reason: str) -> None:
    with pytest.raises(NotFound, match=reason.replace("(", r"\(")):
        best_of(rows)
