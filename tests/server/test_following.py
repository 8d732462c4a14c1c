"""Where a default alias should point: decisions over what is known of a run, without a server."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lorakit.server.following.rules import Following, followed
from lorakit.store.catalog import Facts, Finish, Label, Revision, Run


def run_of(*checkpoints: dict[str, Any], pinned: bool = False, at: int | None = None) -> Run:
    """A run of these in the order in which they finished; `at` is the step that the default alias points at."""
    run = Run("sql", pinned=pinned)
    for id, said in enumerate(checkpoints, 1):
        step, loss, kind = said.get("step"), said.get("loss"), said.get("kind", "step")
        facts = Facts(step=step, eval_loss=loss, eval_step=step, metrics=said.get("metrics", {}))
        run.revisions[id] = revision(id, kind, facts)
        run.finishes.append(Finish(id, said.get("attempt", 1)))
        if at is not None and step == at:
            run.aliases[""] = id
    return run


def revision(id: int, kind: Label, facts: Facts) -> Revision:
    return Revision(id, "sql", kind, f"{id:064x}", Path("x"), facts, 8, 100, "", float(id))


def step_for(run: Run, following: Following, held: set[int] | None = None) -> int | None:
    found = followed(run, run.revisions, following, held or set())
    return None if found is None else found.facts.step


FOUR = (
    {"step": 100, "loss": 0.9},
    {"step": 200, "loss": 0.5},
    {"step": 300, "loss": 0.495},
    {"step": 400, "loss": 0.7},
)


@pytest.mark.parametrize(("follow", "step"), [("latest", 400), ("best", 300), ("manual", 400)])
def test_a_name_that_points_at_nothing_yet_goes_to_what_it_follows(follow: Any, step: int) -> None:
    assert step_for(run_of(*FOUR), Following(follow)) == step


@pytest.mark.parametrize(("delta", "step"), [(0.0, 300), (0.005, 300), (0.01, 200)])
def test_what_is_better_by_less_than_min_delta_is_not_followed(delta: float, step: int) -> None:
    assert step_for(run_of(*FOUR, at=200), Following("best", min_delta=delta)) == step


def test_many_small_gains_are_followed_once_they_come_to_min_delta() -> None:
    run = run_of(*({"step": step, "loss": 1 - step / 1000} for step in range(1, 31)), at=1)
    seen = set()
    for count in range(1, 31):
        run.finishes = [Finish(id, 1) for id in range(1, count + 1)]
        found = followed(run, run.revisions, Following("best", min_delta=0.0095))
        assert found is not None
        run.aliases[""] = found.id
        seen.add(found.facts.step)
    assert seen == {1, 11, 21}


@pytest.mark.parametrize(("follow", "least", "step"), [
    ("latest", 300, 400), ("latest", 401, None), ("best", 200, 300), ("best", 400, 400), ("best", 401, None),
])  # fmt: skip
def test_a_checkpoint_of_fewer_steps_than_min_steps_is_never_followed(
    follow: Any, least: int, step: int | None
) -> None:
    assert step_for(run_of(*FOUR), Following(follow, min_steps=least)) == step


def test_a_run_that_began_again_is_followed_from_min_steps_on_and_stays_where_it_was_until_then() -> None:
    before = ({"step": 500}, {"step": 1000})
    for again, step in ((50, 1000), (250, 250)):
        run = run_of(*before, {"step": again, "attempt": 2}, at=1000)
        assert step_for(run, Following("latest", min_steps=200)) == step


def test_an_adapter_without_a_step_has_enough_of_them() -> None:
    run = run_of({"step": 100}, {"kind": "final"})
    assert followed(run, run.revisions, Following(min_steps=200)) == run.revisions[2]


def test_another_metric_says_what_is_best_and_which_way() -> None:
    run = run_of(
        {"step": 100, "loss": 0.1, "metrics": {"accuracy": 0.5, "f1_loss": 3.0}},
        {"step": 200, "loss": 0.2, "metrics": {"accuracy": 0.9, "f1_loss": 2.0}},
        {"step": 300, "loss": 0.3},
    )
    assert step_for(run, Following("best", "accuracy", "max")) == 200
    assert step_for(run, Following("best", "accuracy", "min")) == 100
    assert step_for(run, Following("best", "f1_loss")) == 200
    assert step_for(run, Following("best", "nobody_measured_it")) == 300


def test_nan_is_worst_but_better_than_nothing_measured() -> None:
    nan = {"step": 200, "loss": math.nan}
    assert step_for(run_of({"step": 100, "loss": 9.0}, nan), Following("best")) == 100
    assert step_for(run_of({"step": 100}, nan), Following("best")) == 200
    assert step_for(run_of(nan, {"step": 300, "loss": 8.0}, at=200), Following("best", min_delta=0.01)) == 300


def test_a_measured_one_is_followed_from_one_that_is_not() -> None:
    assert step_for(run_of({"step": 100, "loss": 3.0}, {"step": 200}, at=200), Following("best", min_delta=1.0)) == 100


@pytest.mark.parametrize("follow", ["latest", "best"])
def test_what_is_held_is_passed_over_until_something_else_is_better(follow: Any) -> None:
    run = run_of({"step": 100, "loss": 0.9}, {"step": 200, "loss": 0.5}, at=100)
    assert step_for(run, Following(follow), held={2}) == 100
    assert step_for(run, Following(follow), held={1, 2}) is None


def test_where_a_person_put_it_a_name_stays_whatever_is_held_or_better() -> None:
    assert step_for(run_of(*FOUR, pinned=True, at=100), Following("best"), held={1}) == 100
    assert step_for(run_of(*FOUR, at=200), Following("manual", min_steps=1000)) == 200


def test_what_the_engine_refused_is_gone_back_from_whatever_min_delta_says() -> None:
    run = run_of(*FOUR, at=300)
    possible = {id: one for id, one in run.revisions.items() if one.facts.step != 300}
    found = followed(run, possible, Following("best", min_delta=5.0))
    assert found is not None
    assert found.facts.step == 200
