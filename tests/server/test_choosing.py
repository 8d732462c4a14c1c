"""Who meets which of the revisions that share a name."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.server.access.keyring import OF_ENVIRONMENT
from lorakit.server.sharing.choosing import asker_of, chosen

COMPLETIONS, MESSAGES = "/v1/completions", "/v1/messages"
SEEDS = st.integers(0, 2**53 - 1)
NAMES = [f"sql@step-{number}00-3fa9c1d{number}" for number in range(8)]


@st.composite
def shares(draw: st.DrawFn, least: int = 2) -> dict[str, float]:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=least, max_size=5, unique=True))
    parts = [draw(st.integers(1, 100)) for _ in names]
    return {name: part / sum(parts) for name, part in zip(names, parts, strict=True)}


def met(shares: dict[str, float], seed: int, askers: list[str] | range) -> Counter[str]:
    return Counter(chosen(shares, seed, asker) for asker in askers)


# requests from nobody


@settings(max_examples=20)
@given(shares(), SEEDS, st.integers(0, 10**9))
def test_of_any_ten_thousand_requests_in_a_row_each_has_its_share_within_a_tenth_of_a_percent(
    shares: dict[str, float], seed: int, first: int
) -> None:
    counts = met(shares, seed, range(first, first + 10_000))
    for name, share in shares.items():
        assert abs(counts[name] - 10_000 * share) <= 10


@given(shares(), SEEDS)
def test_they_are_spread_so_that_a_share_is_right_soon(shares: dict[str, float], seed: int) -> None:
    counts = met(shares, seed, range(100))
    for name, share in shares.items():
        assert abs(counts[name] - 100 * share) <= 4


def test_another_seed_begins_elsewhere() -> None:
    shares = {NAMES[0]: 0.5, NAMES[1]: 0.5}
    rows = {tuple(chosen(shares, seed, number) for number in range(20)) for seed in range(50)}
    assert len(rows) > 10


# users

USERS = [f"user {number}" for number in range(10_000)]


@pytest.mark.parametrize("parts", [(0.05, 0.95), (0.1, 0.2, 0.3, 0.4)])
@pytest.mark.parametrize("seed", [0, 1, 2**53 - 1])
def test_of_ten_thousand_users_each_has_its_share_within_one_percent(parts: tuple[float, ...], seed: int) -> None:
    shares = dict(zip(NAMES, parts, strict=False))
    counts = met(shares, seed, USERS)
    for name, share in shares.items():
        assert abs(counts[name] / len(USERS) - share) < 0.01


@given(shares(least=1), SEEDS, st.text(min_size=1))
def test_a_user_meets_the_same_one_each_time_in_whatever_order_they_are_given(
    shares: dict[str, float], seed: int, user: str
) -> None:
    turned = dict(reversed(shares.items()))
    assert chosen(shares, seed, user) == chosen(shares, seed, user) == chosen(turned, seed, user)


@given(shares(), shares(), SEEDS, st.text(min_size=1))
def test_a_user_moves_only_to_one_whose_share_grew_as_against_the_one_that_is_left(
    before: dict[str, float], after: dict[str, float], seed: int, user: str
) -> None:
    old, new = chosen(before, seed, user), chosen(after, seed, user)
    if old != new and old in after and new in before:
        assert after[new] / after[old] > before[new] / before[old] * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_share_keeps_its_users_and_takes_no_more_than_it_needs(seed: int) -> None:
    before, after = {NAMES[0]: 0.05, NAMES[1]: 0.95}, {NAMES[0]: 0.2, NAMES[1]: 0.8}
    moves = Counter((chosen(before, seed, user), chosen(after, seed, user)) for user in USERS)
    assert moves[NAMES[0], NAMES[1]] == 0
    assert moves[NAMES[1], NAMES[0]] / len(USERS) == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / len(USERS)))


def test_one_that_joins_takes_from_all_and_moves_nobody_between_them() -> None:
    before, after = {NAMES[0]: 0.4, NAMES[1]: 0.6}, {NAMES[0]: 0.36, NAMES[1]: 0.54, NAMES[2]: 0.1}
    moved = {(chosen(before, 3, user), chosen(after, 3, user)) for user in USERS}
    assert moved == {(NAMES[0],) * 2, (NAMES[1],) * 2, (NAMES[0], NAMES[2]), (NAMES[1], NAMES[2])}


def test_another_seed_has_other_users_meet_each() -> None:
    shares = {NAMES[0]: 0.5, NAMES[1]: 0.5}
    same = sum(chosen(shares, 1, user) == chosen(shares, 2, user) for user in USERS)
    assert abs(same / len(USERS) - 0.5) < 0.02


# whom a request is from


@pytest.mark.parametrize(("path", "said", "key", "asker"), [
    (COMPLETIONS, {"user": "ann"}, "", "user ann"),
    (COMPLETIONS, {"user": "ann"}, "k1", "user ann"),
    (COMPLETIONS, {}, "k1", "key k1"),
    (COMPLETIONS, {}, "", None),
    (COMPLETIONS, {}, OF_ENVIRONMENT, None),
    (COMPLETIONS, {"user": "ann"}, OF_ENVIRONMENT, "user ann"),
    (COMPLETIONS, {"user": ""}, "k1", "key k1"),
    (COMPLETIONS, {"user": 7}, "", None),
    (COMPLETIONS, {"metadata": {"user_id": "ann"}}, "", None),
    (MESSAGES, {"metadata": {"user_id": "ann"}}, "k1", "user ann"),
    (MESSAGES, {"metadata": {"user_id": None}}, "k1", "key k1"),
    (MESSAGES, {"metadata": "ann"}, "", None),
    (COMPLETIONS, {"user": "key k1"}, "", "user key k1"),
])  # fmt: skip
def test_it_is_from_its_user_or_else_from_its_key_or_else_from_nobody(
    path: str, said: dict[str, object], key: str, asker: str | None
) -> None:
    assert asker_of(path, said, key) == asker


def test_a_user_may_be_called_whatever_json_can_hold() -> None:
    assert chosen({NAMES[0]: 0.5, NAMES[1]: 0.5}, 0, "user \ud800\0") in NAMES
