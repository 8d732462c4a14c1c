"""Sliders as shares, and a split as a card."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.server.page.canary import canary_card, comparison_card, shares_of


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 100)), max_size=4))
def test_what_sliders_say_are_shares_of_one(rows: list[tuple[str, int]]) -> None:
    found = shares_of([name for name, _ in rows], [str(percent) for _, percent in rows])
    names = [one["revision"] for one in found]
    assert len(names) == len(set(names))
    assert set(names) == {name for name, percent in rows if percent}
    if found:
        assert sum(one["share"] for one in found) == pytest.approx(1.0, abs=1e-4)


def test_what_is_no_number_is_no_share() -> None:
    assert shares_of(["a", "b", "c"], ["x", "nan", "-3"]) == []
    assert shares_of(["a", "b"], ["30"]) == [{"revision": "a", "share": 1.0}]


def view(**more: Any) -> dict[str, Any]:
    revisions = [{"id": f"sql@step-{step}-aabbccdd", "state": "ready"} for step in (100, 200)]
    aliases = {"sql": "sql@step-100-aabbccdd", "latest": "sql@step-200-aabbccdd"}
    known = {"name": "sql", "revision": "sql@step-100-aabbccdd", "revisions": revisions, "aliases": aliases}
    return known | more


def test_a_new_canary_begins_with_what_is_newest_against_what_answers_now() -> None:
    shown = canary_card(view(), admin=True)
    assert shown.index('value="step-200-aabbccdd" selected') < shown.index('value="step-100-aabbccdd" selected')
    assert 'value="10"' in shown
    assert 'value="90"' in shown


def test_a_split_is_shown_with_its_shares_and_its_shadow_to_whoever_may_only_look() -> None:
    shares = [
        {"revision": "sql@step-200-aabbccdd", "share": 0.05},
        {"revision": "sql@step-100-aabbccdd", "share": 0.95},
    ]
    splits = {"sql": {"shares": shares, "shadow": ["sql@step-300-aabbccdd"], "seed": 1}}
    shown = canary_card(view(splits=splits), admin=False)
    for word in ("95 %", "5 %", "shadow", "step-300", "width:95%"):
        assert word in shown
    assert "<form" not in shown
    assert "<button" not in shown


def test_what_answers_now_is_in_the_form_though_it_is_on_another_page_of_the_table() -> None:
    old = "sql@step-1-00000000"
    shown = canary_card(view(revision=old, aliases={"sql": old}), admin=True)
    assert 'value="step-1-00000000" selected' in shown


def test_what_a_server_without_splits_says_is_no_error() -> None:
    assert "No name here is split" in canary_card({**view(), "revisions": []}, admin=False)
    assert "takes two revisions" in canary_card({**view(aliases={}), "revisions": []}, admin=True)
    assert comparison_card([], admin=True) == ""


def test_revisions_stand_side_by_side_with_what_is_known_of_them() -> None:
    rows = [
        {"revision": "sql@step-200-aabbccdd", "aliases": ["sql"], "share": 0.05, "shadow": False, "requests": 12,
         "errors": 3, "error_rate": 0.25, "seconds": {"p50": 0.12, "p95": 2.5}, "first_byte": None,
         "generated": {"mean": 40.0}, "agreement": None},
        {"revision": "sql@step-300-aabbccdd", "aliases": [], "share": None, "shadow": True, "requests": 0, "errors": 0,
         "error_rate": None, "seconds": None, "agreement": {"compared": 4, "equal": 0.75, "prefix": 0.9}},
    ]  # fmt: skip
    shown = comparison_card(rows, admin=True)
    for word in ("3, 25 %", "120 ms", "2.5 s", "75 %", ">shadow<"):
        assert word in shown
    assert shown.count("<button") == 1, "a shadow is no candidate"
