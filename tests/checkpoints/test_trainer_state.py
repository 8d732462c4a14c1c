"""What the Trainer says of a checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.checkpoints.trainer_state import facts_of, read_facts
from lorakit.store.catalog import Facts

LOG = [
    {"step": 400, "epoch": 0.8, "loss": 2.0, "learning_rate": 1e-4},
    {"step": 400, "epoch": 0.8, "eval_loss": 1.9, "eval_runtime": 3.0},
    {"step": 500, "epoch": 1.0, "loss": 1.5, "grad_norm": 0.7},
    {"step": 500, "epoch": 1.0, "eval_loss": 1.4, "eval_accuracy": 0.5},
]


def state(step: int = 500, log: Any = LOG, **more: Any) -> dict[str, Any]:
    return {"global_step": step, "epoch": 1.0, "log_history": log, **more}


def test_losses_come_from_the_entries_that_hold_them() -> None:
    facts = facts_of(state(), 500)
    assert (facts.step, facts.epoch, facts.train_loss, facts.eval_loss, facts.eval_step) == (500, 1.0, 1.5, 1.4, 500)
    assert facts.metrics == {"grad_norm": 0.7, "eval_accuracy": 0.5}


def test_a_step_that_only_saves_has_the_eval_loss_of_another_step_and_says_so() -> None:
    facts = facts_of(state(log=LOG[:3]), 500)
    assert (facts.train_loss, facts.eval_loss, facts.eval_step) == (1.5, 1.9, 400)


def test_what_was_logged_after_the_checkpoint_is_not_of_it() -> None:
    facts = facts_of(state(400), 400)
    assert (facts.train_loss, facts.eval_loss, facts.eval_step) == (2.0, 1.9, 400)


def test_best_of_the_trainer_itself_is_not_believed() -> None:
    assert facts_of(state(log=[], best_metric=0.1, best_model_checkpoint="x"), 500).eval_loss is None


def test_nan_is_a_measured_loss() -> None:
    facts = facts_of(json.loads('{"global_step": 5, "log_history": [{"step": 5, "eval_loss": NaN}]}'), 5)
    assert facts.eval_loss is not None
    assert math.isnan(facts.eval_loss)
    assert facts.eval_step == 5


def test_the_folders_name_says_the_step_where_the_state_is_of_another() -> None:
    facts = facts_of(state(500), 600)
    assert (facts.step, facts.eval_step) == (600, 500)


def test_a_folder_without_a_step_has_that_of_its_state() -> None:
    assert facts_of(state(500)).step == 500


def test_without_a_state_only_the_step_is_known(tmp_path: Path) -> None:
    assert read_facts(tmp_path, 7) == Facts(step=7)
    (tmp_path / "trainer_state.json").write_text("{ half")
    assert read_facts(tmp_path, 7) == Facts(step=7)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
entries = st.dictionaries(st.sampled_from(["step", "epoch", "loss", "eval_loss", "x"]), json_values)


@given(
    step=st.none() | st.integers(0, 10**9),
    state=st.fixed_dictionaries(
        {}, optional={"global_step": json_values, "epoch": json_values,
                      "log_history": json_values | st.lists(entries | json_values, max_size=4)},
    ),
)  # fmt: skip
def test_whatever_a_state_holds_it_is_read_without_an_error(step: int | None, state: dict[str, Any]) -> None:
    facts = facts_of(state, step)
    assert facts.step is None or isinstance(facts.step, int)
    assert facts.eval_step is None or isinstance(facts.eval_step, int)
    for value in (facts.epoch, facts.train_loss, facts.eval_loss, *facts.metrics.values()):
        assert value is None or isinstance(value, float)


@pytest.mark.parametrize("log", [None, 5, "text", {}, [None, 3, "x", []]])
def test_a_log_that_is_no_log_is_empty(log: Any) -> None:
    assert facts_of(state(log=log), 500) == Facts(step=500, epoch=1.0)
