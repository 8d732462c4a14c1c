"""The losses of a run over its steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.checkpoints.curves import Curve, losses_in, losses_of
from lorakit.checkpoints.metadata import Metadata, metadata_of
from lorakit.checkpoints.runs import checkpoints_of
from tests.checkpoints.written import evaluated, write_checkpoint


def same(one: Curve, steps: tuple[float, ...], values: tuple[float, ...]) -> bool:
    return one.steps == steps and [*map(repr, one.values)] == [*map(repr, values)]


def test_train_and_eval_losses_are_told_apart() -> None:
    losses = losses_in([{"step": 1, "loss": 3}, evaluated(1, 2.0), {"step": 2, "loss": 1.5, "grad_norm": 9.0}])
    assert same(losses.train, (1.0, 2.0), (3.0, 1.5))
    assert same(losses.eval, (1.0,), (2.0,))


def test_where_training_began_again_there_is_a_gap() -> None:
    log = [{"step": step, "loss": float(step)} for step in (1, 2, 3, 2, 3)]
    assert same(losses_in(log).train, (1.0, 2.0, 3.0, 2.0, 2.0, 3.0), (1.0, 2.0, 3.0, math.nan, 2.0, 3.0))


@pytest.mark.parametrize("value", [1e308, -1e308, 1e100])
def test_what_is_too_large_to_be_drawn_is_a_gap(value: float) -> None:
    log: list[dict[str, Any]] = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": value}, {"step": value, "loss": 2.0}]
    assert same(losses_in(log).train, (1, 2), (1.0, math.nan))


def test_what_is_not_finite_is_a_gap_and_alone_nothing() -> None:
    losses = losses_in([{"step": 1, "loss": math.inf}, {"step": 2, "loss": math.nan}])
    assert same(losses.train, (1.0, 2.0), (math.nan, math.nan))
    assert not losses
    assert losses_in([{"step": 1, "loss": 0.0}])


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.integers())


@given(st.lists(st.dictionaries(st.sampled_from(["step", "loss", "eval_loss", "x"]), ANYTHING), max_size=8))
def test_whatever_a_log_holds_between_two_gaps_the_steps_rise(log: list[dict[str, Any]]) -> None:
    for curve in (losses_in(log).train, losses_in(log).eval):
        assert len(curve.steps) == len(curve.values)
        before = -math.inf
        for step, value in zip(curve.steps, curve.values, strict=True):
            assert math.isnan(value) or step > before or math.isnan(before)
            before = math.nan if math.isnan(value) else step


def rows(run: Path) -> list[Metadata]:
    return [metadata_of(candidate) for candidate in checkpoints_of(run)]


def test_the_log_is_that_of_the_newest_finished_checkpoint(tmp_path: Path) -> None:
    log = [{"step": step, "loss": float(step)} for step in (5, 10)]
    write_checkpoint(tmp_path / "checkpoint-5", log[:1])
    write_checkpoint(tmp_path / "checkpoint-10", log)
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "trainer_state.json").write_text("{")
    assert losses_of(rows(tmp_path)).train.steps == (5.0, 10.0)


def test_without_a_log_it_is_what_is_known_of_each_checkpoint() -> None:
    known = [Metadata("a", "/a", "a", step, train_loss=loss, eval_step=step) for step, loss in ((1, 2.0), (2, None))]
    losses = losses_of(known)
    assert same(losses.train, (1.0,), (2.0,))
    assert losses.eval == Curve()
