"""A conversion over the nodes of a Ray cluster: a task a file, each written where files are shared."""

from __future__ import annotations

from pathlib import Path

from lorakit.cluster.joining import Where
from lorakit.cluster.packing import packed, unpacked
from lorakit.cluster.parts import new_part
from lorakit.cluster.sight import Sight
from lorakit.cluster.spread import spread
from lorakit.convert.planning import ConvertPlan
from lorakit.convert.readers import is_exported
from lorakit.convert.source import Source
from lorakit.convert.writer import write_files
from lorakit.errors import UsageError
from lorakit.merge.execute import MOST_WORKERS, Meter, Progress


def write_spread(
    ray: Where, plan: ConvertPlan, source: Source, folder: Path, *, workers: int | None, progress: Progress | None
) -> None:
    """As `write_shards`, by the cluster's nodes.

    Raises:
        UsageError, LorakitError, NotFound: see `cluster.spread`.
        Conflict: a source was written again meanwhile.
        InvalidFile, Refused: see `write_shards`.
    """
    meter = Meter(plan.nbytes, progress)
    sizes = {shard.name: shard.target.size for shard in plan.shards}
    with spread(ray, folder, list(source.states), threads=workers, most=MOST_WORKERS) as (tasks, sight):
        for shard in plan.shards:
            tasks.begin(shard.name, write_one, sight, packed((shard, plan.quantiser)), tasks.threads)
        for name, part in tasks.finished():
            part.rename(folder / name)
            meter.add(sizes[name])


def write_one(sight: Sight, planned: bytes, threads: int) -> Path:
    """On a node: write one file of the result; where it is till all of it is there."""
    sight.ensure_here()
    shard, quantiser = unpacked(planned)
    part = new_part(sight.folder, shard.name)
    write_files([(shard, part.name)], quantiser, part.parent, Meter(shard.target.size, None), workers=threads)
    sight.ensure_unchanged()
    return part


def ensure_spreadable(checkpoint: Path) -> None:
    """Raises UsageError where the weights would be read from what stands on this machine alone."""
    if is_exported(checkpoint):
        raise UsageError(
            f"'{checkpoint}' is exported into a folder of this machine before it is read, which no other node of a "
            f"cluster sees: leave out --ray"
        )
