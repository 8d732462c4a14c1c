"""Times and sizes as people write them."""

from __future__ import annotations

import math
import re

from lorakit.errors import UsageError

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 7 * 86_400}
_BYTES = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def seconds(said: str) -> float:
    """`7d` as 604,800; s, m, h, d and w are seconds, minutes, hours, days and weeks.

    Raises:
        UsageError: it is no time of that form, or none above 0.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([smhdw])", said.strip())
    value = _number(match[1]) * _SECONDS[match[2]] if match else math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"'{said}' is no time: write, for instance, 90m, 36h or 7d")
    return value


def bytes_of(said: str) -> int:
    """`20GB` as 20,000,000,000; `GiB` and its like count by 1024.

    Raises:
        UsageError: it is no size of that form, or below one byte.
    """
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", said.strip())
    value = _number(match[1]) * _BYTES.get(match[2].upper(), math.nan) if match else math.nan
    if not 1 <= value < math.inf:
        raise UsageError(f"'{said}' is no size: write, for instance, 500MB, 20GB or 20GiB")
    return int(value)


def _number(digits: str) -> float:
    try:
        return float(digits)
    except ValueError:
        return math.nan
