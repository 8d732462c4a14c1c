"""What is known of a request when its answer has ended: for metrics, logs, and the guard of what is followed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorakit.server.sharing.texts import Agreement
from lorakit.store.catalog import Revision


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that asked for a model. Times are seconds since its head was read; tokens are None where the answer
    did not say them.

    `status` is 499 where the client left before the answer ended, and `revision` None for the base, and where the
    request reached no model. `pieces` counts the events of a stream: one for each token, or for some at once. `broke`:
    a stream ended in an error after its status was sent. `engine_ended`: its engine did, as it answered. `key` is the
    id of the key that was given, never the key.
    """

    model: str  # as it was asked for
    path: str
    status: int
    seconds: float
    revision: Revision | None = None
    request_id: str = ""
    first_byte: float | None = None
    waited: float = 0.0  # until its revision was in the engine
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    pieces: int = 0
    broke: bool = False
    engine_ended: bool = False
    key: str = ""


@dataclass(frozen=True, slots=True)
class Shadowed:
    """What came of a request that a revision was to answer for nobody: `answer` is None where there was no room for it,
    `agreement` with what its client was told is None where the two can't be compared."""

    model: str  # as the client asked for it
    revision: Revision
    answer: Answered | None = None
    agreement: Agreement | None = None


Observer = Callable[[Answered], None]
ShadowObserver = Callable[[Shadowed], None]
