"""Work in processes of its own, in turns: seconds and private memory (RssAnon)."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from merge import measured, private_memory

LONG = 20.0  # seconds: above it one run is enough
SHORT = 0.5  # seconds: below it looking at the memory costs time that shows


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds, and private memory in MB: the most of the whole process, and what the work added to it."""

    seconds: float
    peak: float
    added: float = 0.0

    def best(self, other: Figures) -> Figures:
        """The shorter time and the larger memory."""
        return Figures(min(self.seconds, other.seconds), max(self.peak, other.peak), max(self.added, other.added))


def timed(work: Callable[[], Any]) -> tuple[Any, Figures]:
    """What it gives and takes; private memory is RssAnon, looked at every ms."""
    pid, done = os.getpid(), threading.Event()
    before = peak = private_memory(pid)

    def look() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, private_memory(pid))

    watch = threading.Thread(target=look, daemon=True)
    watch.start()
    begun = time.perf_counter()
    given = work()
    seconds = time.perf_counter() - begun
    done.set()
    watch.join()
    peak = max(peak, private_memory(pid))
    return given, Figures(seconds, peak / 1024, (peak - before) / 1024)


def seconds_of(work: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def alone(work: Callable[..., Figures], *arguments: Any) -> Figures:
    """In a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def command(out: Path, *words: Any) -> Figures:
    """A whole command, whose last word is the folder that it writes."""
    shutil.rmtree(out, ignore_errors=True)
    seconds, peak, _ = measured([str(word) for word in (*words, out)])
    return Figures(seconds, peak)


def in_turns(todo: Mapping[str, Callable[[], Figures]], repeat: int) -> dict[str, Figures]:
    """The best of each; in turns, so that a busy moment meets all of them."""
    best: dict[str, Figures] = {}
    for _ in range(repeat):
        for name, work in todo.items():
            if name in best and best[name].seconds > LONG:
                continue
            os.sync()
            figures = work()
            best[name] = best[name].best(figures) if name in best else figures
    return best
