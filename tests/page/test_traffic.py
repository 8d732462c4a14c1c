"""Requests a second, out of what was counted."""

from __future__ import annotations

from lorakit.server.page.screens.traffic import rates_of


def test_rates_are_what_came_between_two_looks_and_never_less_than_nothing() -> None:
    looks = [(0.0, {"sql": 5.0}, 0.0), (2.0, {"sql": 9.0, "chat": 2.0}, 0.0), (4.0, {"sql": 1.0, "chat": 2.0}, 0.0)]
    assert rates_of(looks) == {"chat": [(2.0, 1.0), (4.0, 0.0)], "sql": [(2.0, 2.0), (4.0, 0.0)]}
    assert rates_of([]) == {}
