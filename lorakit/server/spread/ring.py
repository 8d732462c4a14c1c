"""Consistent hashing: who comes first for a name, and who next, where members come and go."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator

POINTS = 64  # of each member: its part of the ring is right within an eighth or so
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / φ, whose multiples are spread evenly


class Ring:
    """Members, in an order of its own for every place. One that joins or leaves changes nothing in the order of the
    others."""

    def __init__(self) -> None:
        self._points: list[tuple[int, str]] = []
        self._members: set[str] = set()

    def __len__(self) -> int:
        return len(self._members)

    def join(self, member: str) -> None:
        if member not in self._members:
            self._members.add(member)
            for number in range(POINTS):
                insort(self._points, (place_of(f"{member}\0{number}"), member))

    def leave(self, member: str) -> None:
        if member in self._members:
            self._members.remove(member)
            self._points = [point for point in self._points if point[1] != member]

    def walk(self, place: int) -> Iterator[str]:
        """Every member once, in the order that belongs to this place."""
        points = self._points
        start = bisect_left(points, (place, ""))
        seen: set[str] = set()
        for number in range(len(points)):
            member = points[(start + number) % len(points)][1]
            if member not in seen:
                seen.add(member)
                yield member
                if len(seen) == len(self._members):
                    return


def place_of(name: str) -> int:
    """Where a name is on every ring: 64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())


def place_of_number(number: int) -> int:
    """A place for a number: of any so many in a row, they are spread evenly over the ring."""
    return number * _GOLDEN % (1 << 64)
