"""How much of this server one client, one adapter, and all of them together may take at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lorakit.errors import LorakitError


class TooMany(LorakitError):
    """As many requests as may be are being answered, or were sent; in `after` seconds it may be another matter."""

    def __init__(self, message: str, after: int = 1) -> None:
        super().__init__(message)
        self.after = after


class Bucket:
    """Of requests that come one after the other: so many in so many seconds, all at once if need be."""

    def __init__(self, requests: int, seconds: float) -> None:
        self._most = self._left = float(requests)
        self._per_second = requests / seconds
        self._at = 0.0

    def take(self, now: float) -> float:
        """Seconds, of whatever clock, until there is one to take; 0 where it was taken."""
        self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._per_second
        self._left -= 1
        return 0.0


class InFlight:
    """Requests in flight: all, by key's id, and by adapter. A limit of 0 is none."""

    def __init__(self, total: int, per_key: int, per_adapter: int) -> None:
        self._total, self._per_key, self._per_adapter = total, per_key, per_adapter
        self._counts: Counter[tuple[str, str]] = Counter()

    @contextmanager
    def from_client(self, key: str) -> Iterator[None]:
        """Raises TooMany where there are as many already as may be, of all or of this key."""
        with (
            self._counted(("all", ""), self._total, "this server answers {limit} requests at once (--max-requests)"),
            self._counted(
                ("key", key), self._per_key, "{limit} requests of one API key are answered at once "
                "(--max-requests-per-key)",
            ),
        ):  # fmt: skip
            yield

    @contextmanager
    def to_adapter(self, adapter: str) -> Iterator[None]:
        """Raises TooMany where there are as many already as may be of this adapter."""
        said = f"{{limit}} requests for '{adapter}' are answered at once (--max-requests-per-adapter)"
        with self._counted(("adapter", adapter), self._per_adapter, said):
            yield

    @contextmanager
    def _counted(self, whose: tuple[str, str], limit: int, said: str) -> Iterator[None]:
        if limit and self._counts[whose] >= limit:
            raise TooMany(f"{said.format(limit=limit)}, and as many are: try again")
        self._counts[whose] += 1
        try:
            yield
        finally:
            self._counts[whose] -= 1
            if not self._counts[whose]:
                del self._counts[whose]
