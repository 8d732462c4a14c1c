"""Counting requests in and out."""

from __future__ import annotations

import pytest

from lorakit.server.requests.limits import Bucket, InFlight, TooMany


def test_each_limit_counts_its_own_and_forgets_what_ended() -> None:
    counts = InFlight(3, 2, 1)
    with counts.from_client("a"), counts.from_client("a"):
        with pytest.raises(TooMany, match="--max-requests-per-key"), counts.from_client("a"):
            pass
        with counts.from_client("b"), counts.to_adapter("sql"):
            with pytest.raises(TooMany, match=r"--max-requests\)"), counts.from_client("c"):
                pass
            with pytest.raises(TooMany, match=r"'sql'.*--max-requests-per-adapter"), counts.to_adapter("sql"):
                pass
            with counts.to_adapter("chat"):
                pass
    assert not counts._counts


def test_what_is_refused_counts_nowhere() -> None:
    counts = InFlight(0, 1, 0)
    with counts.from_client("a"):
        for _ in range(3):
            with pytest.raises(TooMany), counts.from_client("a"):
                pass
    assert not counts._counts


def test_no_limit_is_no_limit() -> None:
    counts = InFlight(0, 0, 0)
    with counts.from_client(""), counts.from_client(""), counts.to_adapter("x"), counts.to_adapter("x"):
        pass


def test_a_bucket_gives_all_at_once_and_then_as_fast_as_it_fills() -> None:
    bucket = Bucket(3, 60.0)
    assert [bucket.take(100.0) for _ in range(3)] == [0.0] * 3
    assert bucket.take(100.0) == pytest.approx(20.0)
    assert bucket.take(110.0) == pytest.approx(10.0)
    assert bucket.take(120.0) == 0.0
    assert bucket.take(120.0) == pytest.approx(20.0)
    assert [bucket.take(1e6) for _ in range(4)] == [0.0, 0.0, 0.0, pytest.approx(20.0)]
