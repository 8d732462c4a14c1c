"""What whoever asks may see and do: pure decisions over a request's method and path, and over names."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.types import Scope

from lorakit.errors import LorakitError
from lorakit.server.mixes.text import parse_mix
from lorakit.store.keys import EVERY, Allowance
from lorakit.store.names import split_model

RIGHTS = "lorakit.rights"  # where a request's scope has them
READS = ("GET", "HEAD", "OPTIONS")
OPEN_TO_ALL = frozenset({"/health", "/ready", "/ping", "/version", "/docs", "/redoc", "/openapi.json"})
OF_THE_SERVER = frozenset({"/metrics"})  # they name every adapter
NO_ADMIN = "this key may not do that: it takes one that was made with --admin, for every adapter"


class Forbidden(LorakitError):
    """A key may not do this, whatever there is."""


@dataclass(frozen=True, slots=True)
class Rights:
    """`key` is the id of the key that was given; empty where none is wanted, or none was given."""

    allowance: Allowance
    key: str = ""

    @property
    def sees_all(self) -> bool:
        return EVERY in self.allowance.adapters and self.allowance.base

    @property
    def is_whole(self) -> bool:
        """Whether it may do all that there is."""
        return self.sees_all and self.allowance.admin

    def names(self, adapter: str) -> bool:
        return self.allowance.names(adapter)

    def refuse_name(self, adapter: str) -> None:
        """Raises Forbidden where a new adapter of this name would not be one of its own."""
        if not self.names(adapter):
            patterns = ", ".join(f"'{pattern}'" for pattern in self.allowance.adapters)
            raise Forbidden(f"this key may use names that fit {patterns}, and '{adapter}' does not")

    def names_all_in(self, mix: str) -> bool:
        """Whether a mix, as it was written, is of its own adapters alone.

        Raises:
            Refused: it can't be read.
        """
        return all(self.names(split_model(name)[0]) for name, _ in parse_mix(mix).adapters)

    def may(self, method: str, path: str, *, own: bool, asks: bool) -> bool:
        """Whether it may come in at all; what it sees there is another matter.

        `own`: it is a route of lorakit's. `asks`: it asks a model, or for an answer of one. What the engine offers
        beside that is of the whole server.
        """
        if self.is_whole or asks:
            return True
        return own and path not in OF_THE_SERVER and (method in READS or self.allowance.admin)


ALL = Rights(Allowance(admin=True))
NONE = Rights(Allowance((), base=False))


def rights_of(scope: Scope) -> Rights:
    """Those that the gateway found; none where it did not look."""
    found: Rights = scope.get(RIGHTS, NONE)
    return found
