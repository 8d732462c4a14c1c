"""Which checkpoints stay: kept by any is kept, and nothing goes that was not asked to."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.checkpoints.retention import (
    Checkpoint,
    KeepBest,
    KeepEvery,
    KeepFor,
    KeepLast,
    Policy,
    Retention,
    in_words,
    newest,
)
from lorakit.errors import UsageError

NOW = 1_000_000.0
DAY = 86_400.0


def at(step: int, *, size: int = 10, age: float | None = None, **metrics: float) -> Checkpoint:
    """By default written in the order of steps."""
    return Checkpoint(f"checkpoint-{step}", step, size, NOW - (DAY * 10 - step if age is None else age), metrics)


def steps_kept(checkpoints: Iterable[Checkpoint], *policies: Policy, **more: object) -> list[int]:
    found = list(checkpoints)
    decided = Retention(policies, **{"spare_newest": False, **more}).decide(found, now=NOW)  # type: ignore[arg-type]
    return [one.step for one in found if decided[one.name]]


def test_the_last_are_those_of_the_largest_steps() -> None:
    assert steps_kept([at(90), at(1000), at(200)], KeepLast(2)) == [1000, 200]
    assert steps_kept([at(90, age=1), at(1000, age=5), at(200, age=9)], KeepLast(1)) == [1000]


def test_the_best_have_the_lowest_metric_or_the_highest() -> None:
    run = [at(1, eval_loss=0.5, eval_accuracy=0.7), at(2, eval_loss=0.3, eval_accuracy=0.6), at(3, eval_loss=0.4)]
    assert steps_kept(run, KeepBest(2)) == [2, 3]
    assert steps_kept(run, KeepBest(1, "eval_accuracy", "max")) == [1]


def test_of_equals_the_earlier_is_better() -> None:
    assert steps_kept([at(3, eval_loss=0.5), at(1, eval_loss=0.5), at(2, eval_loss=0.5)], KeepBest(1)) == [1]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_best(value: float, mode: str) -> None:
    run = [at(1, eval_loss=value), at(2), at(3, eval_loss=9.0)]
    assert steps_kept(run, KeepBest(3, mode=mode)) == [3]  # type: ignore[arg-type]


def test_multiples_and_the_young_are_kept() -> None:
    assert steps_kept([at(step) for step in (250, 500, 750, 1000)], KeepEvery(500)) == [500, 1000]
    assert steps_kept([at(1, age=DAY + 1), at(2, age=DAY - 1), at(3, age=-5)], KeepFor(DAY)) == [2, 3]


def test_every_reason_is_given() -> None:
    run = [at(500, eval_loss=0.25), at(1000)]
    decided = Retention((KeepLast(2), KeepBest(1), KeepEvery(500), KeepFor(10 * DAY))).decide(run, now=NOW)
    assert decided["checkpoint-500"] == (
        "of the last 2", "of the best 1 by eval_loss (0.25)", "a multiple of 500 steps", "younger than 10 d",
    )  # fmt: skip
    assert decided["checkpoint-1000"][0] == "the newest"


def test_bytes_keep_the_newest_that_fit_beside_what_stays_anyway() -> None:
    run = [at(step) for step in (1, 2, 3, 4, 5)]
    assert steps_kept(run, max_bytes=30) == [3, 4, 5]
    assert steps_kept(run, max_bytes=29) == [4, 5]
    assert steps_kept(run, KeepEvery(2), max_bytes=30) == [2, 4, 5]
    assert steps_kept(run, KeepEvery(2), max_bytes=5) == [2, 4]


def test_below_one_that_does_not_fit_none_is_kept_for_its_size() -> None:
    assert steps_kept([at(1, size=1), at(2, size=100), at(3, size=5)], max_bytes=50) == [3]


def test_bytes_count_what_stays_and_is_not_judged() -> None:
    decided = Retention(max_bytes=30, spare_newest=False).decide([at(1), at(2)], now=NOW, beside=15)
    assert [name for name, reasons in decided.items() if reasons] == ["checkpoint-2"]


def test_what_training_would_go_on_from_is_spared_unless_told_otherwise() -> None:
    run = [at(500, age=1), at(1000, age=9), at(1500, age=8)]
    assert newest(run) == {"checkpoint-500": "written last", "checkpoint-1500": "the newest"}
    assert newest([at(1), at(2)]) == {"checkpoint-2": "the newest"}
    assert newest([]) == {}
    assert steps_kept(run, KeepEvery(1000), spare_newest=True) == [500, 1000, 1500]
    assert steps_kept(run, KeepEvery(1000)) == [1000]


@pytest.mark.parametrize(
    "asked",
    [lambda: KeepLast(0), lambda: KeepBest(-1), lambda: KeepEvery(0), lambda: KeepFor(0.0), lambda: KeepFor(math.nan),
     lambda: Retention(), lambda: Retention(spare_newest=False), lambda: Retention(max_bytes=0)],
)  # fmt: skip
def test_what_would_keep_nothing_is_refused(asked: object) -> None:
    with pytest.raises(UsageError):
        asked()  # type: ignore[operator]


def test_times_in_words() -> None:
    assert [in_words(value) for value in (7 * DAY, 5400, 90, 1, 0.5)] == ["7 d", "1.5 h", "1.5 m", "1 s", "0.5 s"]


# over all runs

numbers = st.one_of(st.floats(-5, 5), st.sampled_from([math.nan, math.inf, -math.inf]))
checkpoints = st.builds(
    lambda step, size, age, metrics: Checkpoint(f"checkpoint-{step}", step, size, NOW - age, metrics),
    st.integers(0, 60), st.integers(0, 50), st.floats(-10, 100),
    st.dictionaries(st.sampled_from(["eval_loss", "eval_f1"]), numbers),
)  # fmt: skip
runs = st.lists(checkpoints, unique_by=lambda one: one.name, max_size=12)
counts = st.integers(1, 6)
policies = st.one_of(
    st.builds(KeepLast, counts),
    st.builds(KeepBest, counts, st.sampled_from(["eval_loss", "eval_f1"]), st.sampled_from(["min", "max"])),
    st.builds(KeepEvery, counts),
    st.builds(KeepFor, st.floats(0.1, 100)),
)


def kept(retention: Retention, run: list[Checkpoint], **more: object) -> set[str]:
    return {name for name, reasons in retention.decide(run, now=NOW, **more).items() if reasons}  # type: ignore[arg-type]


@given(runs, st.lists(policies, min_size=1, max_size=4))
def test_kept_by_any_is_kept_and_nothing_else_is(run: list[Checkpoint], asked: list[Policy]) -> None:
    alone = [kept(Retention((policy,), spare_newest=False), run) for policy in asked]
    assert kept(Retention(tuple(asked), spare_newest=False), run) == set().union(*alone)
    assert kept(Retention(tuple(asked)), run) == set().union(*alone, newest(run))


@given(runs, st.lists(policies, min_size=1, max_size=3), policies)
def test_a_further_policy_removes_nothing_that_stayed(
    run: list[Checkpoint], asked: list[Policy], further: Policy
) -> None:
    assert kept(Retention(tuple(asked)), run) <= kept(Retention((*asked, further)), run)


@given(runs, counts, counts)
def test_a_larger_number_keeps_no_less(run: list[Checkpoint], one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    for policy in (KeepLast, KeepBest, KeepFor):
        assert kept(Retention((policy(fewer),)), run) <= kept(Retention((policy(more),)), run)
    assert kept(Retention(max_bytes=fewer * 20), run) <= kept(Retention(max_bytes=more * 20), run)


@given(runs, counts)
def test_as_many_stay_as_were_asked_for(run: list[Checkpoint], count: int) -> None:
    assert len(kept(Retention((KeepLast(count),), spare_newest=False), run)) == min(count, len(run))
    best = kept(Retention((KeepBest(count),), spare_newest=False), run)
    measured = {
        one.name: one.metrics["eval_loss"] for one in run if math.isfinite(one.metrics.get("eval_loss", math.nan))
    }
    assert len(best) == min(count, len(measured))
    assert best <= measured.keys()
    assert all(measured[one] <= measured[two] for one in best for two in measured.keys() - best)


@given(runs, st.lists(policies, max_size=2), st.integers(1, 200), st.integers(0, 60), st.data())
def test_bytes_never_take_what_something_else_keeps_and_hold_where_they_can(
    run: list[Checkpoint], asked: list[Policy], limit: int, beside: int, data: st.DataObject
) -> None:
    held = {name: ["held"] for name in data.draw(st.sets(st.sampled_from([one.name for one in run])))} if run else {}
    others = kept(Retention(tuple(asked), max_bytes=1), run, held=held, beside=2)
    stays = kept(Retention(tuple(asked), max_bytes=limit), run, held=held, beside=beside)
    assert others <= stays
    assert held.keys() <= stays
    size = {one.name: one.size for one in run}
    extra = stays - others
    assert not extra or beside + sum(size[name] for name in stays) <= limit
    step = {one.name: one.step for one in run}
    gone = size.keys() - stays
    assert all(step[one] > step[two] for one in extra for two in gone)
    if gone:  # one more would have been too much
        next_one = max(gone, key=lambda name: step[name])
        assert beside + sum(size[name] for name in stays) + size[next_one] > limit


@given(runs, st.lists(policies, min_size=1, max_size=3), st.randoms())
def test_the_order_in_which_folders_are_listed_changes_nothing(
    run: list[Checkpoint], asked: list[Policy], chance: object
) -> None:
    shuffled = list(run)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    decided = Retention(tuple(asked), max_bytes=60)
    assert decided.decide(run, now=NOW) == decided.decide(shuffled, now=NOW)
