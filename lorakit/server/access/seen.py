"""What is served as one key sees it: what it may not see is not there, for whatever asks."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

from lorakit.errors import Refused
from lorakit.server.access.rights import Rights
from lorakit.server.following.served import Served, Waiting
from lorakit.server.following.watcher import Place
from lorakit.server.mixes.kept import Follower, Mixes
from lorakit.server.sight.events import Event, Events
from lorakit.store.catalog import Revision, Run
from lorakit.store.mixes import RUN as MIXES

K = TypeVar("K")
V = TypeVar("V")

_SECRET = secrets.token_bytes(16)


def seen_by(known: Served, rights: Rights) -> Served:
    """The server itself for whoever may see all of it."""
    return known if rights.sees_all else Seen(known, rights)


class Seen(Served):
    """The same state, looked at through a key's rights. It is made for one request, and nothing is changed by it."""

    def __init__(self, known: Served, rights: Rights) -> None:
        vars(self).update(vars(known))
        self._rights = rights
        self.runs = cast(dict[str, Run], Allowed(known.runs, rights.names))
        self.waiting = cast(dict[Place, Waiting], Allowed(known.waiting, lambda place: rights.names(place[0])))
        self.mixes = cast(Mixes, SeenMixes(known.mixes, self, rights))
        self.events = cast(Events, SeenEvents(known.events, rights))

    def is_base(self, model: str) -> bool:
        return self._rights.allowance.base and super().is_base(model)


class Allowed(Mapping[K, V]):
    """The entries of a mapping whose key is allowed; the others are never looked up."""

    def __init__(self, entries: Mapping[K, V], allows: Callable[[K], bool]) -> None:
        self._entries = entries
        self._allows = allows

    def __getitem__(self, key: K) -> V:
        if not self._allows(key):
            raise KeyError(key)
        return self._entries[key]

    def __iter__(self) -> Iterator[K]:
        return (key for key in self._entries if self._allows(key))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class SeenMixes:
    """The mixes whose every adapter is the key's own, whatever they are called."""

    def __init__(self, mixes: Mixes, eyes: Served, rights: Rights) -> None:
        self._mixes = mixes
        self._eyes = eyes
        self._rights = rights

    @property
    def names(self) -> Mapping[str, Follower]:
        return Allowed(self._mixes.names, self._may_name)

    def _may_name(self, name: str) -> bool:
        follower = self._mixes.names.get(name)
        if follower is None or not _names_all_in(self._rights, follower.named.mix):
            return False
        target = self._mixes.targets().get(name)
        return target is None or self.is_seen(target)

    def is_seen(self, revision: Revision) -> bool:
        return _names_all_in(self._rights, revision.source)

    def find(self, model: str) -> Revision | None:
        return self._mixes.find(model, self._eyes)

    async def revision_for(self, model: str) -> Revision:
        return await self._mixes.revision_for(model, self._eyes)

    def revisions(self) -> list[Revision]:
        return [revision for revision in self._mixes.revisions() if self.is_seen(revision)]

    def unnamed(self) -> list[Revision]:
        return [revision for revision in self._mixes.unnamed() if self.is_seen(revision)]

    def targets(self) -> dict[str, Revision]:
        names = self.names
        return {name: revision for name, revision in self._mixes.targets().items() if name in names}

    def error_of(self, revision: Revision | None) -> float | None:
        return self._mixes.error_of(revision)


class SeenEvents:
    """Those of the key's own adapters. Their numbers say nothing of how many others there were between them."""

    def __init__(self, events: Events, rights: Rights) -> None:
        self._events = events
        self._rights = rights

    async def since(self, number: int) -> AsyncIterator[Event | None]:
        begin = next((event.number for event in self._events.kept if _other_number(event.number) == number), 0)
        async for event in self._events.since(begin, self._is_seen):
            yield event and replace(event, number=_other_number(event.number))

    def _is_seen(self, event: Event) -> bool:
        return is_about(event.data, self._rights)


def is_about(data: Mapping[str, Any], rights: Rights) -> bool:
    """Whether what happened is of a key's own adapters alone; what is of the server is of no adapter."""
    if "mix" in data:
        return _names_all_in(rights, data["mix"])
    return data.get("adapter", MIXES) != MIXES and rights.names(data["adapter"])


def _names_all_in(rights: Rights, mix: str) -> bool:
    """What can't be read, as a lorakit with other methods wrote it, is nobody's own."""
    try:
        return rights.names_all_in(mix)
    except Refused:
        return False


def _other_number(number: int) -> int:
    return int.from_bytes(hmac.digest(_SECRET, str(number).encode(), "sha256")[:6])
