"""API keys in the store: what each may do, and how much it was used; never the key itself.

A key is 256 random bits, and what is kept of it is its sha256. Slow, salted hashes are for words that people think of:
nobody can try 2**256 keys, however fast a try is, and no table of them can be made beforehand.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lorakit.errors import NotFound, UsageError
from lorakit.store.database import Database

PREFIX = "lk-"  # by which those who look for secrets in files know one
EVERY = "*"
DAYS_KEPT = 31  # of what each key used

_PATTERN = re.compile(r"[A-Za-z0-9._*?\[\]!-]{1,200}")
_RATE = re.compile(r"([0-9]{1,9})/(s|min|h)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Rate:
    """So many requests in so many seconds."""

    requests: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.requests}/{next(unit for unit, seconds in _SECONDS.items() if seconds == self.seconds)}"


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a key may do: call adapters whose names fit a pattern; the base; with `admin`, change what is served.

    `tokens` a day, 0 for any number.
    """

    adapters: tuple[str, ...] = (EVERY,)
    admin: bool = False
    base: bool = True
    rate: Rate | None = None
    tokens: int = 0

    def names(self, adapter: str) -> bool:
        """Whether an adapter of this name is one of its own, if there is one."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


@dataclass(frozen=True, slots=True)
class Key:
    """One key as it is kept. Times are seconds since 1970."""

    id: str
    digest: str
    name: str
    allowance: Allowance
    created: float
    used: float | None = None
    revoked: float | None = None


def digest_of(text: bytes) -> str:
    """What is kept of a key."""
    return hashlib.sha256(text).hexdigest()


def checked_patterns(given: Sequence[str]) -> tuple[str, ...]:
    """`sql*,chat` and each further one, taken apart.

    Raises:
        UsageError: one fits no name that an adapter can have.
    """
    patterns = tuple(dict.fromkeys(part.strip() for text in given for part in text.split(",") if part.strip()))
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise UsageError(
                f"--adapters '{pattern}': write names of adapters, in which * stands for anything, as in 'sql*'; all "
                "revisions and aliases of an adapter are its own"
            )
    return patterns


def parse_rate(text: str) -> Rate:
    """`10/s`, `600/min`, `5000/h`.

    Raises:
        UsageError: it is none of these.
    """
    match = _RATE.fullmatch(text)
    if match is None or not int(match[1]):
        raise UsageError(f"--rate '{text}': write so many requests in a time, as in 10/s, 600/min or 5000/h")
    return Rate(int(match[1]), _SECONDS[match[2]])


class KeyStore:
    """The keys of a store, for all its bases. Its methods block: call them off the event loop."""

    def __init__(self, home: Path) -> None:
        self._database = Database(home, or_read=True)

    def close(self) -> None:
        self._database.close()

    def create(self, allowance: Allowance, name: str = "") -> tuple[str, Key]:
        """A new key: its text, which is never to be had again, and what is kept."""
        text = PREFIX + secrets.token_urlsafe(32)
        key = Key(secrets.token_hex(4), digest_of(text.encode()), name, allowance, time.time())
        with self._database.change() as db:
            db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)",
                (key.id, key.digest, name, json.dumps(allowance.adapters), allowance.admin, allowance.base,
                 str(allowance.rate or ""), allowance.tokens, key.created),
            )  # fmt: skip
        return text, key

    def all(self) -> list[Key]:
        """Every key that ever was, the oldest first."""
        columns = "id, digest, name, adapters, admin, base, rate, tokens, created, used, revoked"
        return [_key(row) for row in self._database.rows(f"SELECT {columns} FROM keys ORDER BY created, id")]

    def revoke(self, id: str) -> Key:
        """Let a key count no more, for good.

        Raises:
            NotFound: there is none of this id, or it was revoked before.
        """
        with self._database.change() as db:
            db.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (time.time(), id))
            (changed,) = db.execute("SELECT changes()").fetchone()
        if not changed:
            raise _no_key(id)
        return next(key for key in self.all() if key.id == id)

    def living(self, id: str) -> Key:
        """Raises NotFound when there is none of this id, or it was revoked."""
        for key in self.all():
            if key.id == id and key.revoked is None:
                return key
        raise _no_key(id)

    def changes(self) -> int:
        """Another number whenever another process has changed the store."""
        number: int = self._database.rows("PRAGMA data_version")[0][0]
        return number

    def tokens_on(self, day: str) -> dict[str, int]:
        """What each key used on a day (`2030-01-31`, UTC), by id; those that used none are left out."""
        return dict(self._database.rows("SELECT key, tokens FROM key_tokens WHERE day = ?", (day,)))

    def note(self, used: Mapping[str, float], tokens: Mapping[tuple[str, str], int]) -> None:
        """Remember when keys were used last, and add the tokens, by id and day, that they used since the last time."""
        with self._database.change() as db:
            for id, at in used.items():
                db.execute("UPDATE keys SET used = max(ifnull(used, 0), ?) WHERE id = ?", (at, id))
            for (id, day), count in tokens.items():
                db.execute(
                    "INSERT INTO key_tokens SELECT id, ?, ? FROM keys WHERE id = ?"
                    " ON CONFLICT (key, day) DO UPDATE SET tokens = tokens + excluded.tokens",
                    (day, count, id),
                )
            oldest = time.strftime("%Y-%m-%d", time.gmtime(time.time() - DAYS_KEPT * 86_400))
            db.execute("DELETE FROM key_tokens WHERE day < ?", (oldest,))


def _no_key(id: str) -> NotFound:
    return NotFound(f"there is no key '{id}', or it is revoked already: lorakit key ls lists them")


def _key(row: tuple[Any, ...]) -> Key:
    id, digest, name, adapters, admin, base, rate, tokens, *times = row
    allowance = Allowance(
        tuple(json.loads(adapters)), bool(admin), bool(base), parse_rate(rate) if rate else None, tokens
    )
    return Key(id, digest, name, allowance, *times)
