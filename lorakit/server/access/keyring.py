"""The keys that count now: whose a request is, and how much each has used.

The store says which keys there are; it is looked at twice a second, so a key that is made or revoked elsewhere counts
here within one. What was used goes into the store every few seconds, never with a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from math import ceil
from pathlib import Path

from starlette.types import Scope

from lorakit.errors import LorakitError
from lorakit.server.access.rights import ALL, Rights
from lorakit.server.file_work import file_work
from lorakit.server.requests.answered import Answered
from lorakit.server.requests.exchange import header
from lorakit.server.requests.limits import Bucket, TooMany
from lorakit.server.sight.logs import log
from lorakit.store.keys import Key, KeyStore, digest_of

LOOK = 0.5  # seconds between two looks at the keys
NOTE = 10  # looks between two notes of what was used
OF_ENVIRONMENT = "environment"  # the id of the key in LORAKIT_API_KEY
DAY = 86_400


class Keyring:
    """All methods but `opened` run on the event loop; the disk is touched in threads."""

    def __init__(self, store: KeyStore, own: str) -> None:
        """`own`: a key of the server's, that may do all; empty for none."""
        self._store = store
        digest = digest_of(own.encode("utf-8", "surrogateescape"))
        self._own = {digest: Rights(ALL.allowance, OF_ENVIRONMENT)} if own else {}
        self._rights = dict(self._own)
        self._buckets: dict[str, Bucket] = {}
        self._seen = -1
        self._wanted = bool(own)
        self._day = _today()
        self._spent: Counter[str] = Counter()  # tokens today, as the store has them
        self._used: dict[str, float] = {}  # and what it does not have yet
        self._unnoted: Counter[tuple[str, str]] = Counter()

    @classmethod
    async def opened(cls, home: Path, own: str) -> Keyring:
        """Raises LorakitError when the store can't be used."""
        keyring = cls(await file_work(KeyStore, home), own)
        await keyring.look()
        return keyring

    async def run(self) -> None:
        """Look for ever; what is known stays in force while the store can't be read."""
        looks, trouble = 0, ""
        while True:
            await asyncio.sleep(LOOK)
            looks += 1
            try:
                await self.look()
                if looks % NOTE == 0:
                    await self.note()
                trouble = ""
            except Exception as error:  # one bad moment must not end it: a key that is revoked then has to go later
                named = str(error) if isinstance(error, LorakitError) else f"{type(error).__name__}: {error}"
                if named != trouble:
                    log.warning("the keys can't be looked at, or what they used not be written: %s", named)
                trouble = named

    async def close(self) -> None:
        with contextlib.suppress(LorakitError):
            await self.note()
        await file_work(self._store.close)

    # what the store has

    async def look(self) -> None:
        """Know what the store knows."""
        changes = await file_work(self._store.changes)
        if changes != self._seen or self._day != _today():
            day = _today()
            keys, spent = await file_work(lambda: (self._store.all(), self._store.tokens_on(day)))
            self._take(keys)
            self._spent, self._day = Counter(spent), day
            self._seen = changes

    def _take(self, keys: list[Key]) -> None:
        self._wanted = bool(self._own or keys)  # and once there was one, whoever has none stays out
        living = [key for key in keys if key.revoked is None]
        self._rights = {key.digest: Rights(key.allowance, key.id) for key in living} | self._own
        rates = {key.id: key.allowance.rate for key in living if key.allowance.rate is not None}
        self._buckets = {id: self._buckets.get(id) or Bucket(rate.requests, rate.seconds) for id, rate in rates.items()}

    async def note(self) -> None:
        """Let the store know what was used."""
        if not (self._used or self._unnoted):
            return
        used, tokens = self._used, self._unnoted
        self._used, self._unnoted = {}, Counter()
        try:
            await file_work(self._store.note, used, tokens)
        except LorakitError:
            self._used = used | self._used
            self._unnoted.update(tokens)
            raise
        day = self._day
        self._spent.update({id: count for (id, of_day), count in tokens.items() if of_day == day})

    # what requests ask

    def rights_for(self, scope: Scope) -> Rights | None:
        """Whose a request is; None where it has to bring a key, and does not, or a wrong one.

        What is compared is a digest: how long that takes says something of digests, and whoever could aim at one would
        have broken sha256.
        """
        if not self._wanted:
            return ALL
        found = self._rights.get(digest_of(key_in(scope)))
        if found is not None and found.key != OF_ENVIRONMENT:
            self._used[found.key] = time.time()
        return found

    def counts(self, rights: Rights) -> bool:
        """Whether they still do."""
        return not self._wanted if not rights.key else any(rights.key == one.key for one in self._rights.values())

    def admit(self, rights: Rights, *, spends: bool) -> None:
        """Count a request of a key.

        Raises:
            TooMany: it has had as many as it may for the moment; or, where the request `spends` tokens, as many of
                these as it may today.
        """
        now = time.time()
        bucket = self._buckets.get(rights.key)
        if bucket is not None and (wait := bucket.take(time.monotonic())):
            said = f"this key may send {rights.allowance.rate} requests (lorakit key create --rate)"
            raise TooMany(f"{said}: try again in {ceil(wait)} s", after=ceil(wait))
        most = rights.allowance.tokens
        if spends and most and self._tokens_of(rights.key) >= most:
            raise TooMany(
                f"this key has used its {most} tokens of today: they are counted anew at midnight, UTC",
                after=ceil(DAY - now % DAY),
            )

    def _tokens_of(self, key: str) -> int:
        """Today's."""
        day = _today()
        noted = self._spent[key] if day == self._day else 0
        return noted + self._unnoted[key, day]

    def answered(self, answer: Answered) -> None:
        """Count the tokens of an answer; a stream that broke off before it said them is counted by its events, of which
        most are one token each."""
        generated = answer.pieces if answer.completion_tokens is None else answer.completion_tokens
        self.spend(answer.key, (answer.prompt_tokens or 0) + generated)

    def spend(self, key: str, tokens: int) -> None:
        if key and key != OF_ENVIRONMENT and tokens:
            self._unnoted[key, _today()] += tokens


def key_in(scope: Scope) -> bytes:
    """What was given as a bearer, or, as Anthropic's clients do, as `x-api-key`; nowhere else is looked, as addresses
    end up in logs."""
    scheme, _, given = header(scope, b"authorization").partition(b" ")
    return given.strip() if scheme.lower() == b"bearer" else header(scope, b"x-api-key")


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
