"""The seam between lorakit and a server of models: what the gateway needs of it, and nothing of how it does it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send

from lorakit.errors import LorakitError


class LoadFailed(LorakitError):
    """The engine refused an adapter; nothing of it is left in the engine."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine was started with. `slots`: adapters that clients can use at once."""

    base: str
    base_path: str
    slots: int
    max_rank: int
    engine: str  # name and version
    honours_patterns: bool  # rank_pattern and alpha_pattern are applied, module by module


class Engine(Protocol):
    """Names given to `load` are never used twice; calls of `load` and `remove` never overlap."""

    @property
    def limits(self) -> Limits: ...

    async def load(self, name: str, folder: Path) -> None:
        """Put an adapter into the engine.

        Raises:
            LoadFailed: the engine's own words.
        """

    async def remove(self, name: str) -> None:
        """Take an adapter out for good: its memory and its slot are free afterwards."""

    async def try_out(self, name: str) -> str | None:
        """Let a model answer one token: None when its logprobs are finite, else what was wrong."""

    async def alive(self) -> bool:
        """Whether the engine would answer."""

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on."""

    def model_card(self) -> dict[str, Any]:
        """The base as `/v1/models` shows it."""

    def serves(self, path: str) -> bool:
        """Whether it has this route: a model that writes text has none for embeddings."""

    def goes_around(self, path: str) -> bool:
        """Whether a route of its own loads adapters, or reaches models, past the gateway."""

    async def describe(self) -> dict[str, Any]:
        """The engine's own OpenAPI description; empty when it has none."""
