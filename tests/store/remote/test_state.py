"""What all machines know of a run: changes of a value, without a bucket."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InvalidFile, LorakitError, Refused
from lorakit.store.catalog import Facts
from lorakit.store.remote.state import REMEMBERED, Move, Recorded, RunState, read_state, written

BASE = "llama-0123"


def recorded(step: int | None, digest: str = "", **more: Any) -> Recorded:
    kind = "plain" if step is None else "step"
    facts = more.pop("facts", Facts(step=step, eval_loss=0.5, metrics={"bleu": 1.0}))
    return Recorded(
        kind, (digest or f"{step or 0:x}").zfill(64), facts, 8, 100, "/runs/sql", 1.5, f"uid-{step}", **more
    )


def added(state: RunState, one: Recorded, **more: Any) -> RunState:
    said = {"finished": True, "late": False, "by": "a", "stamp": "s", "looked_before": True, **more}
    return state.with_added("sql", one, **said)


def moved(state: RunState, one: Recorded, alias: str = "", **more: Any) -> RunState:
    said = {"pinned": None, "passed_over": {}, "shares": {}, "shadows": (), "seed": 0, **more}
    return state.with_moved(alias, Move(one.key, "set", 2.5), **said)


def test_a_smaller_step_begins_an_attempt_and_one_that_was_there_before_none() -> None:
    state = RunState()
    for step in (100, 200, 50):
        state = added(state, recorded(step))
    assert [one.attempt for one in state.finishes] == [1, 1, 2]
    assert added(RunState(), recorded(9)).finishes[0].attempt == 1
    state = added(state, recorded(10), late=True)
    assert state.finishes[-1].attempt == 2


def test_what_another_machine_saw_finish_does_not_finish_again() -> None:
    state = added(RunState(), recorded(5))
    assert added(state, recorded(5), by="b", looked_before=False).finishes == state.finishes
    assert added(state, recorded(5), by="b").finishes == state.finishes
    assert added(state, recorded(5), finished=False).finishes == state.finishes
    assert len(added(state, recorded(5), by="b", stamp="written again").finishes) == 2
    assert len(added(state, recorded(5)).finishes) == 2


def test_what_is_known_of_a_revision_is_completed_and_its_first_time_stays() -> None:
    state = added(RunState(), recorded(5))
    state = added(state, replace(recorded(5, facts=Facts(step=5, epoch=2.0)), created=9.0, uid="other"), finished=False)
    one = state.revisions[recorded(5).key]
    assert (one.facts.eval_loss, one.facts.epoch, one.created, one.uid) == (0.5, 2.0, 1.5, "uid-5")


def test_two_contents_that_would_have_one_name_are_refused() -> None:
    state = added(RunState(), recorded(5, "a" * 64))
    with pytest.raises(Refused, match="begin alike"):
        added(state, recorded(5, "a" * 8 + "b" * 56))


def test_an_alias_remembers_where_it_was_for_a_while_and_takes_what_it_means_out_of_what_is_passed_over() -> None:
    a, b = recorded(1), recorded(2)
    state = added(added(RunState(), a), b)
    for number in range(40):
        state = moved(state, (a, b)[number % 2])
    assert state.aliases[""].target == b.key
    assert len(state.aliases[""].moves) == REMEMBERED + 1
    state = moved(state, a, passed_over={b.key: "it fails"})
    assert state.passed_over == {b.key: "it fails"}
    assert moved(state, a, "half", shares={a.key: 0.5, b.key: 0.5}).passed_over == {}


def test_what_an_alias_means_or_asks_is_not_removed() -> None:
    a, b, c, d = (recorded(step) for step in (1, 2, 3, 4))
    state = RunState()
    for one in (a, b, c, d):
        state = added(state, one)
    state = moved(moved(state, a), b, "half", shares={b.key: 1.0}, shadows=(c.key,))
    state = state.with_passed_over(d.key, "so").without([a.key, b.key, c.key, d.key, "nothing"])
    assert state.revisions.keys() == {a.key, b.key, c.key}
    assert state.passed_over == {}
    assert [one.key for one in state.finishes] == [a.key, b.key, c.key]


def test_what_a_move_needs_comes_back_with_it() -> None:
    a = recorded(1)
    state = moved(added(RunState(), a).without([a.key]), a, lost=[a])
    assert state.revisions == {a.key: a}


def test_a_forgotten_run_is_that_alone_until_something_is_added() -> None:
    state = replace(moved(added(RunState(), recorded(1)), recorded(1)), version=7).forgotten_now()
    assert state == RunState(7, forgotten=True)
    assert not added(state, recorded(2)).forgotten


STEPS = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.sampled_from("ab")), max_size=12)


@given(STEPS)
def test_what_is_written_is_read_again(steps: list[tuple[int, bool, str]]) -> None:
    state = RunState(3, "x")
    for step, moves, by in steps:
        state = added(state, recorded(step), by=by, stamp=str(step))
        if moves:
            state = moved(state, recorded(step), "ab"[step % 2] + "x", pinned=step % 3 == 0, seed=step)
    assert read_state(written(state, BASE), BASE, "x") == state


@pytest.mark.parametrize("spoil", [
    {"revisions": {"other": None}}, {"aliases": {"": {"moves": [], "shares": {}, "shadows": [], "seed": 0}}},
    {"aliases": {"step-5": None}}, {"passed_over": {"nothing": "so"}}, {"version": "many"}, {"base": "another"},
    {"finishes": [{"key": "nothing", "attempt": 1, "by": "", "stamp": ""}]}, {"format": "new"},
])  # fmt: skip
def test_what_is_no_state_is_refused_with_its_place(spoil: dict[str, Any]) -> None:
    whole = json.loads(written(moved(added(RunState(), recorded(1)), recorded(1)), BASE))
    with pytest.raises(InvalidFile, match="s3://there"):
        read_state(json.dumps({**whole, **spoil}).encode(), BASE, "s3://there")


@pytest.mark.parametrize("field", [
    {"kind": "mix"}, {"digest": "../../etc"}, {"digest": "A" * 64}, {"facts": {"step": -1}}, {"facts": {"odd": 1}},
])  # fmt: skip
def test_a_revision_that_can_be_none_is_refused(field: dict[str, Any]) -> None:
    whole = json.loads(written(added(RunState(), recorded(1)), BASE))
    key, one = next(iter(whole["revisions"].items()))
    whole["revisions"] = {key: {**one, **field}}
    with pytest.raises(InvalidFile):
        read_state(json.dumps(whole).encode(), BASE, "s3://there")


def test_what_a_newer_lorakit_wrote_is_said_to_be_that() -> None:
    with pytest.raises(LorakitError, match="upgrade"):
        read_state(b'{"format": 2}', BASE, "s3://there")


def test_a_move_passes_over_nothing_that_was_removed_meanwhile() -> None:
    a, b, gone = recorded(1), recorded(2), recorded(3)
    state = moved(added(added(RunState(), a), b), a, passed_over={b.key: "it fails", gone.key: "between"})
    assert state.passed_over == {b.key: "it fails"}
    assert read_state(written(state, BASE), BASE, "x") == state


@pytest.mark.parametrize("spoil", [b'"version":1e999', b'"version":' + b"[" * 100_000 + b"]" * 100_000])
def test_numbers_and_depths_that_nothing_holds_are_refused(spoil: bytes) -> None:
    raw = written(RunState(3), BASE).replace(b'"version":3', spoil)
    with pytest.raises(InvalidFile):
        read_state(raw, BASE, "s3://there")
