"""An extraction over the nodes of a Ray cluster: a task some weights, its factors in a file of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorakit.cluster.joining import Where
from lorakit.cluster.packing import packed, unpacked
from lorakit.cluster.parts import new_part
from lorakit.cluster.sight import Sight
from lorakit.cluster.spread import spread
from lorakit.cluster.tasks import Tasks
from lorakit.mix.extraction.change import Change, Factors, Goal, change_of, uncarried_change
from lorakit.mix.extraction.plan import ExtractPlan, Pair, Uncarried
from lorakit.mix.extraction.report import UncarriedChange
from lorakit.mix.extraction.tuned import Tuned

ROUNDS = 4  # tasks that a place on a node gets, one after the other: so the last ones end at about one time

Found = Change | UncarriedChange | None


@contextmanager
def crew_on(
    ray: Where, plan: ExtractPlan, tuned: Tuned, folder: Path | None, *, device: str, threads: int
) -> Iterator[Crew]:
    """The nodes of a cluster, which see the models and `folder`, where factors go if they are kept. `threads` are
    torch's for one weight: what one machine would use, as the bits of a product depend on it.

    Raises what `spread` does.
    """
    files = [*tuned.files(), *(shard.file for shard in plan.base.shards)]
    with spread(ray, folder, files, threads=None, most=threads, device=device) as (tasks, sight):
        yield Crew(tasks, sight, plan, tuned, threads)


class Crew:
    """The nodes of a cluster, as those who measure and factor changes. The factors last as long as it does."""

    def __init__(self, tasks: Tasks, sight: Sight, plan: ExtractPlan, tuned: Tuned, threads: int) -> None:
        self.device = tasks.device
        self._tasks = tasks
        self._sight = sight
        self._plan = plan
        self._tuned = tuned
        self._threads = threads

    def found(self, goal: Goal, seed: int, savable: set[str]) -> Generator[Found]:
        """What changed, of every pair and every uncarried tensor of the plan, in their order."""
        tuned = self._tasks.put(packed(self._tuned))
        numbers = []
        for number, group in enumerate(_groups(self._plan.parts, ROUNDS * self._tasks.slots)):
            numbers.append(number)
            self._tasks.begin(
                number, measured, self._sight, tuned, packed(group), goal, seed, savable, self.device, self._threads
            )
        waiting: dict[int, list[Found]] = {}
        finished = self._tasks.finished()
        for number in numbers:
            while number not in waiting:
                done, found = next(finished)
                waiting[done] = found
            yield from waiting.pop(number)


def measured(
    sight: Sight, tuned: bytes, group: bytes, goal: Goal, seed: int, savable: set[str], device: str, threads: int
) -> list[Found]:
    """On a node: what changed in some weights."""
    import torch

    from lorakit.merge.blocks import exact_arithmetic

    sight.ensure_here()
    parts: list[Pair | Uncarried] = unpacked(group)
    model = _opened(tuned)
    found: list[Found] = []
    with exact_arithmetic(device), _factors(sight, parts) as factors:
        torch.set_num_threads(threads)
        for part in parts:
            if isinstance(part, Pair):
                found.append(change_of(part, goal, model, device=device, seed=seed, factors=factors))
            else:
                found.append(uncarried_change(part, model, saved=part.tuned.name in savable))
    sight.ensure_unchanged()
    return found


def _factors(sight: Sight, parts: Sequence[Pair | Uncarried]) -> Any:
    if sight.folder is None or not any(isinstance(part, Pair) for part in parts):
        return nullcontext()
    return _written(new_part(sight.folder, f".factors of {parts[0].tuned.name}"))


@contextmanager
def _written(file: Path) -> Iterator[Factors]:
    factors = Factors(file)
    try:
        yield factors
    finally:
        factors.close()


@lru_cache(maxsize=1)
def _opened(tuned: bytes) -> Tuned:
    model: Tuned = unpacked(tuned)
    return model


def _groups(parts: Sequence[Pair | Uncarried], count: int) -> Iterator[list[Pair | Uncarried]]:
    """Neighbours, of about as many bytes each."""
    most = sum(part.tuned.nbytes for part in parts) / max(1, count)
    group: list[Pair | Uncarried] = []
    size = 0
    for part in parts:
        group.append(part)
        size += part.tuned.nbytes
        if size >= most:
            yield group
            group, size = [], 0
    if group:
        yield group
