"""Counting requests in and out."""

from __future__ import annotations

import pytest

from lorakit.server.requests.limits import InFlight, TooMany


def test_each_limit_counts_its_own_and_forgets_what_ended() -> None:
    counts = InFlight(3, 2, 1)
    with counts.from_client(b"a"), counts.from_client(b"a"):
        with pytest.raises(TooMany, match="--max-requests-per-key"), counts.from_client(b"a"):
            pass
        with counts.from_client(b"b"), counts.to_adapter("sql"):
            with pytest.raises(TooMany, match=r"--max-requests\)"), counts.from_client(b"c"):
                pass
            with pytest.raises(TooMany, match=r"'sql'.*--max-requests-per-adapter"), counts.to_adapter("sql"):
                pass
            with counts.to_adapter("chat"):
                pass
    assert not counts._counts


def test_what_is_refused_counts_nowhere() -> None:
    counts = InFlight(0, 1, 0)
    with counts.from_client(b"a"):
        for _ in range(3):
            with pytest.raises(TooMany), counts.from_client(b"a"):
                pass
    assert not counts._counts


def test_no_limit_is_no_limit() -> None:
    counts = InFlight(0, 0, 0)
    with counts.from_client(b""), counts.from_client(b""), counts.to_adapter("x"), counts.to_adapter("x"):
        pass
