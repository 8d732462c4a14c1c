"""Put what is held into the store, one at a time and in order, and say what became of each."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lorakit.checkpoints.described import describe
from lorakit.errors import Incomplete, LorakitError, NotFound, OutOfSpace, Refused
from lorakit.store.kept import Kept, keep_checkpoint
from lorakit.training.capturing.captured import Captured
from lorakit.training.capturing.holding import Held, release
from lorakit.training.capturing.watch import Missed, Watch

RETRY = 10.0  # seconds after which a store that could not be written is tried again


@dataclass(frozen=True, slots=True)
class Took:
    """A checkpoint is in the store, `name` in the output folder."""

    name: str
    kept: Kept
    seconds: float


Event = Took | Missed


class Keeping:
    """From an output folder into the store: `look` whenever there may be something new, `end` when there is no more."""

    def __init__(self, captured: Captured, home: Path, say: Callable[[Event], None], held: Iterable[Held] = ()) -> None:
        self._waiting = deque(held)
        taken = captured.recorded() | {one.spot: one.source for one in self._waiting}
        self.watch = Watch(captured.output, captured.holds, taken)
        self._captured = captured
        self._home = home
        self._say = say
        self._copy: _Copy | None = None
        self._failed: list[Held] = []
        self._next_try = 0.0  # of those, on the monotonic clock
        self._refused: set[str] = set()
        self._said: set[Event] = set()

    def look(self, *, ended: bool = False) -> bool:
        """Hold what is finished, and go on copying; whether there was anything new. Raises nothing."""
        new = False
        try:
            held, missing = self.watch.scan(time.monotonic(), ended=ended)
            new = bool(held or missing)
            self._waiting.extend(held)
            for one in missing:
                self._say(one)
        except Exception as error:  # no reason to leave a program alone that runs
            self._say_once(Missed("failed", str(self._captured.output), f"nothing can be held there: {error}"))
        self._advance()
        return new

    def end(self, *, alive: bool) -> Path | None:
        """Put all that is finished into the store; the output folder if anything stays there that is not in it.

        Args:
            alive: the program, or what it started, is still running: what needs quiet time is left for later.
        """
        self._try_again()
        self._next_try = math.inf
        while self.look(ended=not alive) or self._copy is not None or self._waiting:
            if self._copy is not None and self._copy.is_alive():
                self._copy.join()
        self.watch.notices.close()
        failed = [Missed("failed", one.spot, f"it is held in '{one.folder}' until it can be") for one in self._failed]
        left = self.watch.left()
        if alive:
            left.append(Missed("left", str(self._captured.output), "what was started still runs, and may write to it"))
        for one in (*failed, *left):
            self._say(one)
        names = {held.spot for held in self._failed} | self._refused
        kept = [spot for spot in self.watch.held() if spot.name not in names]
        gone = not alive and self._captured.clear(kept, all_kept=not self._failed)
        if not (gone or alive or self._failed or self.watch.may_be_held()):
            self._captured.forget()
        return None if gone and not left and not self._refused else self._captured.output

    def _advance(self) -> None:
        """Never two at once, nor a later one first, unless that can't be copied: which is the latest goes by their
        order."""
        if self._copy is not None and not self._copy.is_alive():
            self._became(self._copy)
            self._copy = None
        if time.monotonic() >= self._next_try:
            self._try_again()
        if self._copy is None and self._waiting:
            self._copy = _Copy(self._waiting.popleft(), self._home, self._captured.run, self._captured.output)
            with suppress(RuntimeError):  # there can be no more threads now
                self._copy.start()

    def _try_again(self) -> None:
        self._waiting.extendleft(reversed(self._failed))
        self._failed = []

    def _became(self, copy: _Copy) -> None:
        held = copy.held
        match copy.outcome:
            case Kept() as kept:
                self._captured.record(held.spot, held.source)
                self._say(Took(held.spot, kept, copy.seconds))
            case Incomplete():
                self.watch.forget(held.spot, held.source)
                self._say(Missed("lost", held.spot, "it was written to again before it was copied"))
            case NotFound():
                self.watch.forget(held.spot, held.source)
                self._say(Missed("lost", held.spot, "what was held of it was removed before it was copied"))
            case (LorakitError() | OSError()) as error if not isinstance(error, Refused):
                self._failed.append(held)
                self._next_try = max(self._next_try, time.monotonic() + RETRY)
                self._say_once(Missed("failed", held.spot, self._in_words(error)))
                return
            case error:  # no reason to leave the program and its other checkpoints alone
                self._refused.add(held.spot)
                said = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
                self._say(Missed("failed", held.spot, said))
        release(held)

    def _in_words(self, error: Exception) -> str:
        if isinstance(error, OutOfSpace):
            return f"no space left in the store '{self._home}': free some, or let LORAKIT_HOME name another"
        return str(error)

    def _say_once(self, event: Event) -> None:
        if event not in self._said:
            self._said.add(event)
            self._say(event)


class _Copy(threading.Thread):
    """Copies one held checkpoint; does not keep the process from ending, as what is half copied is no harm."""

    def __init__(self, held: Held, home: Path, run: str, output: Path) -> None:
        super().__init__(name=f"copy of {held.spot}", daemon=True)
        self.held = held
        self.outcome: Kept | BaseException = LorakitError("it was not copied")
        self.seconds = 0.0
        self._home = home
        self._run = run
        self._origin = output / held.spot

    def run(self) -> None:
        began = time.monotonic()
        try:
            described = describe(self.held.path, self._run, final=self.held.is_root)
            self.outcome = keep_checkpoint(
                self._home, self.held.path, described, run=self._run, unchanged=lambda: self.held.is_unchanged,
                origin=self._origin,
            )  # fmt: skip
        except BaseException as error:
            self.outcome = error
        self.seconds = time.monotonic() - began
