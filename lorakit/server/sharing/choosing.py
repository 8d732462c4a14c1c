"""Whom a request is from, and which of the revisions that share a name answers it: pure functions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from lorakit.server.access.keyring import OF_ENVIRONMENT

MESSAGES = "/v1/messages"
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / φ, whose multiples leave no gap among the fractions that is large for long
_WHOLE = 1 << 64


def asker_of(path: str, said: Mapping[str, Any], key: str) -> str | None:
    """Whom a request is from: the `user` that its body names, or whose key it came with; None where that is anybody.

    Anthropic's clients name one in `metadata`. The server's own key, which all may have, is nobody's.
    """
    metadata = said.get("metadata")
    user = metadata.get("user_id") if path == MESSAGES and isinstance(metadata, dict) else said.get("user")
    if isinstance(user, str) and user:
        return f"user {user}"
    return f"key {key}" if key not in ("", OF_ENVIRONMENT) else None


def chosen(shares: Mapping[str, float], seed: int, asker: str | int) -> str:
    """The one of the names in `shares` that answers whoever asks: the same for the same asker, as long as the shares
    are the same. A number is that of a request from nobody: of any so many in a row, each name has its share.
    """
    return _of_asker(shares, seed, asker) if isinstance(asker, str) else _of_number(shares, seed, asker)


def _of_asker(shares: Mapping[str, float], seed: int, asker: str) -> str:
    """Weighted rendezvous hashing (Schindelhauer and Schomaker, SPAA 2005, the logarithmic method): when shares change,
    an asker moves only to a name whose share grew, as against the one that is left."""
    return max(shares, key=lambda name: math.log(_fraction(f"{seed}\0{name}\0{asker}")) / shares[name])


def _of_number(shares: Mapping[str, float], seed: int, number: int) -> str:
    """By the fractions of the golden ratio's multiples, which are spread as evenly as can be."""
    place = (_hash(f"{seed}") + number * _GOLDEN) % _WHOLE / _WHOLE * sum(shares.values())
    ends = zip(shares, accumulate(shares.values()), strict=True)
    return next((name for name, end in ends if place < end), next(reversed(list(shares))))


def _fraction(text: str) -> float:
    """Between 0 and 1, and neither: 52 bits and a half are a float exactly."""
    return ((_hash(text) >> 12) + 0.5) / (1 << 52)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())
