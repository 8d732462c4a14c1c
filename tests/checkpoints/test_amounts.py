"""Times and sizes as people write them."""

from __future__ import annotations

import pytest

from lorakit.checkpoints.amounts import bytes_of, seconds
from lorakit.errors import UsageError


@pytest.mark.parametrize(
    ("said", "value"), [("90s", 90), ("1.5h", 5400), ("7d", 604_800), ("2w", 1_209_600), (" 5 m ", 300)]
)
def test_times_may_be_written_short(said: str, value: float) -> None:
    assert seconds(said) == value


@pytest.mark.parametrize(
    ("said", "value"), [("20GB", 20 * 10**9), ("1.5 MiB", 3 << 19), ("12", 12), ("3kb", 3000), ("1TB", 10**12)]
)
def test_sizes_may_be_written_short(said: str, value: int) -> None:
    assert bytes_of(said) == value


@pytest.mark.parametrize("said", ["", "d", "7", "-7d", "1.2.3d", "0d", "7 days", "nand", "٣d"])
def test_what_is_no_time_is_refused(said: str) -> None:
    with pytest.raises(UsageError, match="is no time"):
        seconds(said)


@pytest.mark.parametrize("said", ["", "GB", "0GB", "0.1B", "-1GB", "1.2.3GB", "1XB", "infGB"])
def test_what_is_no_size_is_refused(said: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        bytes_of(said)
