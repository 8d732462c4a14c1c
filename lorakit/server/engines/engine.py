"""The seam between lorakit and a server of models: what the gateway needs of it, and nothing of how it does it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from lorakit.errors import LorakitError


class LoadFailed(LorakitError):
    """The engine refused an adapter; nothing of it is left in the engine."""


class Unreached(LorakitError):
    """Nothing of a request came to the engine: another may be asked the same."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine was started with. `slots`: adapters that clients can use at once. `memory`: those that it holds at
    all, and answers with after no more than a copy; as many as slots where it is 0."""

    base: str
    base_path: str
    slots: int
    max_rank: int
    engine: str  # name and version
    honours_patterns: bool  # rank_pattern and alpha_pattern are applied, module by module
    memory: int = 0


class Answering(Protocol):
    """One engine, or several as one."""

    @property
    def limits(self) -> Limits: ...

    async def try_out(self, name: str) -> str | None:
        """Let a model answer one token: None when its logprobs are finite, else what was wrong."""

    async def call(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        """Ask one of its own routes, with a body of JSON: status and body."""

    async def alive(self, *, now: bool = False) -> bool:
        """Whether the engine would answer; as it was when somebody looked last, or is found to be `now`."""

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on.

        Raises:
            Unreached: it is not there, and nothing was sent.
        """

    def model_card(self) -> dict[str, Any]:
        """The base as `/v1/models` shows it."""

    def serves(self, path: str) -> bool:
        """Whether it has this route: a model that writes text has none for embeddings."""

    def goes_around(self, path: str) -> bool:
        """Whether a route of its own loads adapters, or reaches models, past the gateway."""

    def templated(self, path: str, said: Mapping[str, Any], template: str) -> dict[str, Any]:
        """The members to put into a request of this route so that it is read by this chat template.

        Raises:
            Refused: the engine would go on to read it by its base's.
        """

    async def metrics(self) -> bytes:
        """What it counts itself, in Prometheus' text format; empty when it has none."""

    async def describe(self) -> dict[str, Any]:
        """The engine's own OpenAPI description; empty when it has none."""


class Engine(Answering, Protocol):
    """Names given to `load` are never used twice; calls of `load` and `remove` never overlap."""

    async def load(self, name: str, folder: Path) -> None:
        """Put an adapter into the engine.

        Raises:
            LoadFailed: the engine's own words.
        """

    def no_place_for(self, name: str) -> str | None:
        """Why it could not hold one more adapter, of this name, and answer right, ever again; None where it could."""

    async def remove(self, name: str) -> None:
        """Take an adapter out for good: its memory and its slot are free afterwards, or make place by themselves."""
