"""A merge over the nodes of a Ray cluster: a task a shard, each written where the files are shared.

A task writes its shard beside its place, under a name of its own, and syncs it; the process that merges enters it into
the journal and renames it, as it does with what its own threads wrote. So a task can be done again at any time, and
what a killed merge leaves can be gone on with, here or there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorakit.cluster.joining import Where
from lorakit.cluster.packing import packed, unpacked
from lorakit.cluster.parts import new_part
from lorakit.cluster.sight import Sight, ensure_seen
from lorakit.cluster.spread import spread
from lorakit.cluster.tasks import Tasks
from lorakit.merge.execute import MOST_WORKERS, Entered, How, Meter, ShardFile, write_shards
from lorakit.merge.journal import SurvivalSums
from lorakit.merge.plan import MergePlan, PlannedShard

ARRIVAL = 0.2  # seconds between looks at what has come from the hub


@dataclass(frozen=True, slots=True)
class Written:
    """What a task gives back: the file that holds the shard, what survived, and whose arithmetic it was."""

    part: Path
    survivals: Mapping[str, SurvivalSums]
    arithmetic: str | None


@contextmanager
def crew_on(
    ray: Where, folder: Path, files: Collection[Path], *, device: str, workers: int | None
) -> Iterator[RayCrew]:
    """The nodes of a cluster, which see `folder` and the files. Raises what `spread` does."""
    with spread(ray, folder, files, threads=workers, most=MOST_WORKERS, device=device) as (tasks, sight):
        yield RayCrew(tasks, sight)


class RayCrew:
    """The nodes of a cluster, as those who write shards."""

    def __init__(self, tasks: Tasks, sight: Sight) -> None:
        self._tasks = tasks
        self._sight = sight

    def write(
        self, plan: MergePlan, shards: Sequence[PlannedShard], how: How, entered: Entered
    ) -> tuple[str, str | None]:
        """See `Crew.write`."""
        by_name = {shard.name: shard for shard in shards}
        arithmetics: dict[str, None] = {}

        def enter(timeout: float | None) -> None:
            for name, written in self._tasks.finished(timeout):
                if written.arithmetic is not None:
                    arithmetics[written.arithmetic] = None
                entered(by_name[name], written.part, written.survivals)

        how = replace(how, device=self._tasks.device, workers=self._tasks.threads)
        threads = _torch_threads() if any(shard.computed or shard.whole for shard in shards) else None
        remote = plan.base.remote
        if remote is not None:
            remote.begin(file for shard in shards for file in remote.files_of(shard))
        try:
            for shard in shards:
                arrivals = [] if remote is None else remote.arrivals(shard)
                while not all(arrival.done() for arrival in arrivals):
                    enter(ARRIVAL)
                for arrival in arrivals:
                    arrival.result()
                fetched = () if remote is None else tuple(file.absolute() for file in remote.files_of(shard))
                self._tasks.begin(shard.name, write_one, self._sight, packed(shard), how, threads, fetched)
            enter(None)
        finally:
            if remote is not None:
                remote.stop()
        return self._tasks.device, "; ".join(arithmetics) or None


def write_one(sight: Sight, shard: bytes, how: How, threads: int | None, fetched: Collection[Path] = ()) -> Written:
    """On a node: write one shard. `threads` are torch's where the merge was begun: the bits of some products depend on
    their number. `fetched` came from the hub meanwhile.
    """
    sight.ensure_here()
    ensure_seen(fetched)
    plan: PlannedShard = unpacked(shard)
    part = new_part(sight.folder, plan.name)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    survivals: dict[str, SurvivalSums] = {}

    def entered(file: ShardFile) -> None:
        for name, one in file.survivals.items():
            survivals[name] = SurvivalSums(one.kept, one.norm, one.weight)

    device = write_shards([plan], part.parent, how, Meter(plan.target.size, None), entered, part=part.name)
    sight.ensure_unchanged()
    return Written(part, survivals, _arithmetic(device) if plan.computed or plan.whole else None)


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _arithmetic(device: str) -> str:
    from lorakit.merge.blocks import arithmetic

    return arithmetic(device)
