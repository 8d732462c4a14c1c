"""Keys in the store: digests of them, what each may do, and what it used."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import NotFound, UsageError
from lorakit.store.keys import Allowance, KeyStore, Rate, checked_patterns, parse_rate

TODAY = time.strftime("%Y-%m-%d", time.gmtime())


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[KeyStore]:
    store = KeyStore(tmp_path / "home")
    yield store
    store.close()


def test_what_is_kept_of_a_key_is_its_digest_and_what_it_may_do(keys: KeyStore) -> None:
    allowance = Allowance(("sql*", "chat"), admin=True, base=False, rate=Rate(5, 60.0), tokens=7)
    text, made = keys.create(allowance, "mine")
    (kept,) = keys.all()
    assert kept == made
    assert kept.digest == hashlib.sha256(text.encode()).hexdigest()
    assert kept.allowance == allowance


def test_no_two_keys_are_alike(keys: KeyStore) -> None:
    made = [keys.create(Allowance()) for _ in range(20)]
    assert len({text for text, _ in made}) == len({key.id for _, key in made}) == 20


def test_a_key_is_revoked_once_and_stays_known(keys: KeyStore) -> None:
    _, key = keys.create(Allowance())
    assert keys.living(key.id).revoked is None
    assert keys.revoke(key.id).revoked is not None
    for again in (keys.revoke, keys.living):
        with pytest.raises(NotFound, match="key ls"):
            again(key.id)
    assert [one.id for one in keys.all()] == [key.id]


def test_another_process_sees_that_something_has_changed(keys: KeyStore, tmp_path: Path) -> None:
    other = KeyStore(tmp_path / "home")
    before = other.changes()
    assert other.changes() == before
    keys.create(Allowance())
    assert other.changes() != before
    other.close()


def test_what_several_servers_used_adds_up_by_day_and_old_days_go(keys: KeyStore, tmp_path: Path) -> None:
    _, key = keys.create(Allowance())
    other = KeyStore(tmp_path / "home")
    keys.note({key.id: 100.0}, {(key.id, TODAY): 5, (key.id, "2020-01-01"): 3, ("gone", TODAY): 9})
    other.note({key.id: 50.0}, {(key.id, TODAY): 6})
    assert keys.tokens_on(TODAY) == other.tokens_on(TODAY) == {key.id: 11}
    assert keys.tokens_on("2020-01-01") == {}
    assert keys.all()[0].used == 100.0
    other.close()


@pytest.mark.parametrize(
    ("given_", "fits", "fails"),
    [(["sql*"], ["sql", "sql-2"], ["SQL", "mysql", ""]), (["a,b", "c"], ["a", "b", "c"], ["ab", "d"]),
     (["run-[12]"], ["run-1"], ["run-3"]), (["*"], ["anything"], [])],
)  # fmt: skip
def test_patterns_are_of_whole_names(given_: list[str], fits: list[str], fails: list[str]) -> None:
    allowance = Allowance(checked_patterns(given_))
    assert all(allowance.names(name) for name in fits)
    assert not any(allowance.names(name) for name in fails)


@given(st.integers(1, 10**9 - 1), st.sampled_from(["s", "min", "h"]))
def test_a_rate_is_written_as_it_is_read(requests: int, unit: str) -> None:
    assert str(parse_rate(f"{requests}/{unit}")) == f"{requests}/{unit}"


@pytest.mark.parametrize("text", ["", "10", "/s", "10/", "10/day", "-1/s", "1.5/s", "0/s", "10 / s", "٣/s"])
def test_what_is_no_rate_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="10/s"):
        parse_rate(text)
