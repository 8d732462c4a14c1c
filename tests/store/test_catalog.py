"""What names mean, against a plain reading of the design's words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.store.catalog import Facts, Finish, Label, Revision, Run, attempt_of, best, latest

NAN = float("nan")


def revision(
    id: int, step: int | None, *, kind: Label = "step", loss: float | None = None, eval_step: int | None = None,
    digest: str | None = None,
) -> Revision:  # fmt: skip
    facts = Facts(step=step, eval_loss=loss, eval_step=step if eval_step is None else eval_step)
    return Revision(id, "sql", kind, digest or f"{id:064x}", Path(), facts, 8, 1, "", 0.0)


def run_of(*finished: Revision) -> Run:
    """A run in which these finished one after the other under a running server."""
    run = Run("sql")
    for one in finished:
        run.revisions.setdefault(one.id, one)
        last = run.finishes[-1].attempt if run.finishes else None
        known = [run.revisions[finish.revision] for finish in run.finishes if finish.attempt == last]
        largest = max((earlier.facts.step or 0 for earlier in known if earlier.kind == "step"), default=None)
        attempt = attempt_of(one.kind, one.facts.step, last, largest)
        run.finishes.append(Finish(one.id, attempt))
    return run


# The reference: the design's words, read one at a time.


def reference_latest(finished: list[Revision]) -> Revision | None:
    attempt: list[Revision] = []
    for one in finished:
        steps = [earlier.facts.step for earlier in attempt if earlier.kind == "step"]
        if one.kind == "step" and any(one.facts.step <= step for step in steps):  # type: ignore[operator]
            attempt = []  # "a new attempt begins"
        attempt.append(one)
    roots = [one for one in attempt if one.kind != "step"]
    if roots:
        return roots[-1]  # "newer than every checkpoint"
    return max(attempt, key=lambda one: one.facts.step or 0, default=None)


def reference_best(finished: list[Revision]) -> float | None:
    losses = [one.facts.eval_loss for one in finished if one.facts.eval_step == one.facts.step]
    known = [loss for loss in losses if loss is not None]
    numbers = [loss for loss in known if not math.isnan(loss)]
    if numbers:
        return min(numbers)
    return NAN if known else None


losses = st.one_of(st.none(), st.just(NAN), st.floats(-5, 5), st.just(math.inf))
things = st.lists(
    st.tuples(st.sampled_from([100, 200, 300, 400]), losses, st.booleans(), st.sampled_from(["step"] * 6 + ["final"])),
    max_size=12,
)


def made(drawn: list[tuple[int, float | None, bool, Label]]) -> list[Revision]:
    return [
        revision(id, step, kind=kind, loss=loss, eval_step=None if own else step - 50)
        for id, (step, loss, own, kind) in enumerate(drawn, 1)
    ]


@given(things)
def test_latest_is_what_the_design_says(drawn: list[tuple[int, float | None, bool, Label]]) -> None:
    finished = made(drawn)
    assert run_of(*finished).select("latest") == reference_latest(finished)


@given(things)
def test_best_is_what_the_design_says(drawn: list[tuple[int, float | None, bool, Label]]) -> None:
    finished = made(drawn)
    found, loss = run_of(*finished).select("best"), reference_best(finished)
    if loss is None:
        assert found is None
    else:
        assert found is not None
        assert found.facts.eval_loss == loss or (found.facts.eval_loss is not None and math.isnan(loss))


@given(things, st.sampled_from([100, 200, 300, 400]))
def test_a_step_is_its_newest_revision(drawn: list[tuple[int, float | None, bool, Label]], step: int) -> None:
    finished = made(drawn)
    of_step = [one for one in finished if one.facts.step == step and one.kind == "step"]
    assert run_of(*finished).select(f"step-{step}") == (of_step[-1] if of_step else None)


@given(things, st.text())
def test_any_selector_names_one_revision_or_none(drawn: list[tuple[int, float | None, bool, Label]], text: str) -> None:
    run = run_of(*made(drawn))
    assert run.select(text) in [None, *run.revisions.values()]


@given(things)
def test_every_revision_is_found_by_its_full_name_and_by_its_digest(
    drawn: list[tuple[int, float | None, bool, Label]],
) -> None:
    finished = [
        revision(one.id, one.facts.step, kind=one.kind, digest=f"{one.id:08x}" + "f" * 56) for one in made(drawn)
    ]
    run = run_of(*finished)
    for one in finished:
        assert run.select(one.name.partition("@")[2]) == one
        assert run.select(one.digest) == run.select(one.digest[:8]) == one


def test_checkpoints_in_rising_order_are_one_attempt() -> None:
    run = run_of(*(revision(id, id * 100) for id in (1, 2, 3)))
    assert {finish.attempt for finish in run.finishes} == {1}
    assert run.select("latest") == run.revisions[3]


@pytest.mark.parametrize("step", [100, 300, 500])
def test_a_step_not_above_an_earlier_one_begins_an_attempt_of_its_own(step: int) -> None:
    run = run_of(revision(1, 300), revision(2, 500), revision(3, step))
    assert run.select("latest") == run.revisions[3]
    assert run.finishes[-1].attempt == 2


def test_the_same_revision_may_finish_again() -> None:
    first, second = revision(1, 100), revision(2, 200)
    run = run_of(first, second, first)
    assert run.select("latest") == first
    assert run.select("step-200") == second


def test_the_root_is_newer_than_every_checkpoint_of_its_attempt() -> None:
    root = revision(2, 1000, kind="final")
    assert run_of(revision(1, 1000), root).select("latest") == root
    assert run_of(revision(1, 1000), root).select("final") == root
    assert run_of(revision(1, 1000), root).select("step-1000") is not root


def test_a_new_attempt_is_newer_than_the_root_of_the_last() -> None:
    run = run_of(revision(1, 1000), revision(2, 1000, kind="final"), revision(3, 100))
    assert run.select("latest") == run.revisions[3]
    assert run.select("final") == run.revisions[2]


def test_of_equal_losses_the_first_stays_best() -> None:
    run = run_of(revision(1, 100, loss=0.5), revision(2, 200, loss=0.5))
    assert run.select("best") == run.revisions[1]


def test_nan_is_worse_than_infinity_and_better_than_nothing() -> None:
    nan, infinite, none = revision(1, 100, loss=NAN), revision(2, 200, loss=math.inf), revision(3, 300)
    assert run_of(nan, none).select("best") == nan
    assert run_of(nan, infinite, none).select("best") == infinite
    assert run_of(none).select("best") is None


def test_a_loss_of_a_revision_without_a_step_is_of_no_step() -> None:
    facts = Facts(step=None, eval_loss=0.1, eval_step=None)
    plain = Revision(1, "chat", "plain", "0" * 64, Path(), facts, 8, 1, "", 0.0)
    assert run_of(plain).select("best") is None
    assert run_of(plain).select("latest") == plain


def test_only_what_is_usable_counts() -> None:
    run = run_of(revision(1, 100, loss=0.1), revision(2, 200, loss=0.2), revision(3, 50, loss=0.0))
    run.aliases = {"": 3, "prod": 2}
    assert run.select("latest", [3]) == run.revisions[2], "the attempt before, when nothing of the last is usable"
    assert run.select("best", [3]) == run.revisions[1]
    assert run.select(None, [3]) is None
    assert run.select("prod", [2, 3]) is None
    assert run.select("step-50", [3]) is None
    assert run.select("latest", [1, 2, 3]) is None


def test_an_alias_is_what_it_was_set_to_and_nothing_is_no_alias() -> None:
    run = run_of(revision(1, 100), revision(2, 200))
    run.aliases = {"": 1, "prod": 2}
    assert run.select(None) == run.revisions[1]
    assert run.select("prod") == run.revisions[2]
    assert run.select("") is None
    assert run.select("canary") is None


def test_a_digest_prefix_that_several_share_is_the_newest_of_them() -> None:
    run = run_of(revision(1, 100, digest="ab" * 32), revision(2, 200, digest="abab" + "0" * 60))
    assert run.select("abab") == run.revisions[2]
    assert run.select("step-100-abab") == run.revisions[1]
    assert run.select("step-100-abab0") is None


def test_nothing_finished_is_nothing() -> None:
    assert latest([], {}) is None
    assert best([], {}) is None
