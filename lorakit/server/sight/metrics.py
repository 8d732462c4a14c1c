"""What `/metrics` says beside the engine's own: which revision is where, what came in, and how each alias answers.

Labels are few: an alias counts as it was asked for, a revision that was asked for by step or digest as `sql@*`, a mix
as `mix`, and what goes beyond `MOST_ALIASES`, or names nothing, as `other`.
"""

from __future__ import annotations

import asyncio

from lorakit.server.engines.vllm import ADAPTERS_INFO
from lorakit.server.following.guard import failed
from lorakit.server.following.served import Served
from lorakit.server.requests.answered import Answered, Shadowed
from lorakit.server.sight.events import Event
from lorakit.server.sight.levels import MOST_ALIASES, levels
from lorakit.server.sight.tallies import Count, Times, exposition
from lorakit.store.catalog import Revision
from lorakit.store.names import parse_selector, split_model

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OTHER = "other"
ANSWERS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
LOADS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts what a server tells of; read at any time, from nothing when the engine was started again."""

    def __init__(self, known: Served) -> None:
        self._known = known
        self._aliases: set[str] = set()
        self.requests = Count("lorakit_requests", "Answers that ended, by alias and status.", ("alias", "code"))
        self.prompt_tokens = Count("lorakit_prompt_tokens", "Tokens of prompts, where an answer says them.", ("alias",))
        self.generated = Count(
            "lorakit_generation_tokens",
            "Tokens generated, as an answer says; of a stream that does not, its events, mostly of one token each.",
            ("alias",),
        )
        self.seconds = Times(
            "lorakit_request_seconds", "From a request's head to its answer's end.", ANSWERS, ("alias",)
        )
        self.first_byte = Times(
            "lorakit_first_byte_seconds", "From a request's head to its answer's first byte.", ANSWERS, ("alias",)
        )
        self.waited = Times(
            "lorakit_load_wait_seconds", "For how long requests waited until their revision was in the engine.", LOADS
        )
        self.loading = Times(
            "lorakit_load_seconds",
            "The way of a new revision: from its last byte on disk until it was seen (detect), into the store (copy), "
            "judged (check), into the engine with a first token (engine).", LOADS, ("phase",),
        )  # fmt: skip
        self.switches = Count("lorakit_alias_switches", "Moves of an alias to a revision, and why.", ("alias", "why"))
        self.rollbacks = Count("lorakit_rollbacks", "Moves back to what an alias pointed at before.", ("alias",))
        self.shadows = Count(
            "lorakit_shadow_answers",
            "Requests for shadows: answered, failed, or dropped for want of room.",
            ("alias", "result"),
        )
        self.refused = Count("lorakit_refused_revisions", "What is not served, by the kind of reason.", ("reason",))
        self.events = Count("lorakit_events", "What /v1/events told, by its type.", ("type",))
        known.observers.append(self.answered)
        known.shadow_observers.append(self.shadowed)
        known.events.listeners.append(self.told)

    # what happens

    def answered(self, answer: Answered) -> None:
        alias = self._alias(answer.model, answer.revision)
        self.requests.add(alias, str(answer.status))
        self.seconds.add(alias, seconds=answer.seconds)
        if answer.first_byte is not None:
            self.first_byte.add(alias, seconds=answer.first_byte)
        if answer.revision is not None:
            self.waited.add(seconds=answer.waited)
        if answer.prompt_tokens is not None:
            self.prompt_tokens.add(alias, amount=answer.prompt_tokens)
        generated = answer.pieces if answer.completion_tokens is None else answer.completion_tokens
        if generated:
            self.generated.add(alias, amount=generated)

    def shadowed(self, shadowed: Shadowed) -> None:
        bad = failed(shadowed.answer) if shadowed.answer is not None else False
        result = "dropped" if shadowed.answer is None else "failed" if bad else "answered"
        self.shadows.add(self._alias(shadowed.model, shadowed.revision), result)

    def told(self, event: Event) -> None:
        self.events.add(event.kind)
        if event.kind in ("alias", "split"):
            alias = self._bounded(event.data["alias"])
            why = event.data["why"].partition(":")[0].replace(" ", "_")
            self.switches.add(alias, why)
            if why.endswith("rollback"):
                self.rollbacks.add(alias)
        elif event.kind == "refused":
            self.refused.add(event.data.get("cause") or OTHER)
        elif event.kind == "loaded":
            for phase, seconds in event.data.get("seconds", {}).items():
                self.loading.add(phase, seconds=seconds)
        elif event.kind == "gone":
            self._forget(event.data["adapter"])

    # labels

    def _alias(self, model: str, revision: Revision | None) -> str:
        if revision is None:
            return model if model == self._known.engine.limits.base else OTHER
        if model.startswith("mix("):
            return "mix"
        name, selector = split_model(model)
        is_alias = selector is None or parse_selector(selector).alias is not None
        return self._bounded(model if is_alias else f"{name}@*")

    def _bounded(self, alias: str) -> str:
        if alias not in self._aliases:
            if len(self._aliases) >= MOST_ALIASES:
                return OTHER
            self._aliases.add(alias)
        return alias

    def _forget(self, adapter: str) -> None:
        """A name that is gone makes place for others."""
        for alias in [alias for alias in self._aliases if split_model(alias)[0] == adapter]:
            self._aliases.discard(alias)
            for tally in self._by_alias:
                tally.forget(alias)

    @property
    def _by_alias(self) -> tuple[Count | Times, ...]:
        return (
            self.requests, self.prompt_tokens, self.generated, self.seconds, self.first_byte, self.switches,
            self.rollbacks, self.shadows,
        )  # fmt: skip

    # what is told

    async def exposition(self) -> bytes:
        """The engine's own, then lorakit's, in Prometheus' text format."""
        kept = [
            tally.copied() for tally in (*self._by_alias, self.waited, self.loading, self.refused, self.events)
        ]  # here, where nothing else changes them meanwhile
        now = levels(self._known)
        theirs, ours = await asyncio.gather(self._known.engine.metrics(), asyncio.to_thread(exposition, [*kept, *now]))
        return without_families(theirs, (ADAPTERS_INFO, "lorakit_")) + ours


def without_families(text: bytes, prefixes: tuple[str, ...]) -> bytes:
    """Text of Prometheus' format without the families whose names begin so."""
    names = tuple(prefix.encode() for prefix in prefixes)
    comments = tuple(b"# %b %b" % (word, name) for word in (b"HELP", b"TYPE") for name in names)
    return b"".join(line for line in text.splitlines(keepends=True) if not line.startswith((*names, *comments)))
