"""What the gateway and the replicas say to each other: plain values that are pickled on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorakit.server.engines.vllm import Offered

REPLICA_HEADER = b"x-lorakit-replica"  # in every answer: which replica it is of


@dataclass(frozen=True, slots=True)
class Adapter:
    """A revision as the gateway means it. `placeholder` stands in the body of a request where the engine's own name
    for the adapter has to stand, which only the replica knows: nobody can have guessed it."""

    name: str
    folder: Path
    placeholder: str

    @property
    def id(self) -> str:
        """By which Ray knows where it is: of its content, so that it is the same after the gateway was started anew."""
        return self.folder.name


@dataclass(frozen=True, slots=True)
class Question:
    """One request, without what is of its connection alone."""

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


Kind = Literal["there", "gone", "refused", "no slot", "unreached"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an order: an adapter is `there`, after so many seconds, or `gone`; or why it is not, in words.
    `refused` is the engine's judgement; `no slot` and `unreached` say nothing of the adapter."""

    kind: Kind
    words: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Described:
    """What an engine is: the same for all replicas of one server."""

    offered: Offered
    places: int  # adapters that one holds at all


@dataclass(frozen=True, slots=True)
class Told:
    """What a replica says of itself, again and again. `actor` is Ray's id of its process; `adapters` are the revisions
    in its engine; `loads` and `removes` count from its start; `settled` is what came of orders, by their number."""

    replica: str
    actor: str
    described: Described
    adapters: frozenset[str] = frozenset()
    has_room: bool = True
    waiting: int = 0
    in_flight: int = 0
    loads: int = 0
    removes: int = 0
    settled: tuple[tuple[int, Outcome], ...] = ()
    metrics: bytes | None = None  # where they were asked for
    ends: bool = False  # it says nothing more


@dataclass(frozen=True, slots=True)
class Bring:
    """Have an adapter in the engine within `wait` seconds; `urgent` as `Residency.ensure` has it. `if_room`: only where
    nothing else has to go for it."""

    number: int
    adapter: Adapter
    wait: float
    urgent: bool = False
    if_room: bool = False


@dataclass(frozen=True, slots=True)
class Leave:
    """Let go of a revision after its last request there."""

    number: int
    name: str


@dataclass(frozen=True, slots=True)
class Orders:
    """What a replica is to do. `kept` and `pinned` are those of its revisions that should stay, and that never go."""

    bring: tuple[Bring, ...] = ()
    leave: tuple[Leave, ...] = ()
    metrics: bool = False
    kept: frozenset[str] = field(default_factory=frozenset)
    pinned: frozenset[str] = field(default_factory=frozenset)
