"""Who comes first for a name, while members come and go."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lorakit.server.spread.ring import Ring, place_of, place_of_number

MEMBERS = [f"http://engine-{number}:8000" for number in range(8)]
NAMES = [f"run-{number}" for number in range(300)]

members = st.lists(st.sampled_from(MEMBERS), min_size=1, unique=True)


def ring_of(members: list[str]) -> Ring:
    ring = Ring()
    for member in members:
        ring.join(member)
    return ring


def order(ring: Ring, name: str) -> list[str]:
    return list(ring.walk(place_of(name)))


@given(members, st.text())
def test_every_member_comes_once_in_whatever_order_they_joined(members: list[str], name: str) -> None:
    found = order(ring_of(members), name)
    assert sorted(found) == sorted(members)
    assert order(ring_of(sorted(members)), name) == found


@given(members, st.sampled_from(MEMBERS), st.text())
def test_one_that_leaves_or_joins_changes_nothing_in_the_order_of_the_others(
    members: list[str], other: str, name: str
) -> None:
    ring = ring_of([member for member in members if member != other])
    before = order(ring, name)
    ring.join(other)
    assert [member for member in order(ring, name) if member != other] == before
    ring.leave(other)
    assert order(ring, name) == before


def test_each_is_the_first_for_about_as_many_names() -> None:
    ring = ring_of(MEMBERS)
    firsts = Counter(next(ring.walk(place_of(name))) for name in NAMES)
    assert set(firsts) == set(MEMBERS)
    assert max(firsts.values()) < 2 * len(NAMES) / len(MEMBERS)


def test_numbers_in_a_row_are_spread_over_all() -> None:
    ring = ring_of(MEMBERS)
    firsts = Counter(next(ring.walk(place_of_number(number))) for number in range(1000))
    assert min(firsts.values()) > 0.5 * 1000 / len(MEMBERS)


def test_who_joins_twice_is_there_once_and_who_is_not_there_leaves_in_peace() -> None:
    ring = ring_of([MEMBERS[0], MEMBERS[0]])
    ring.leave(MEMBERS[1])
    assert order(ring, "sql") == [MEMBERS[0]]
    ring.leave(MEMBERS[0])
    assert order(ring, "sql") == []
    assert len(ring) == 0
