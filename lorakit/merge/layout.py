"""Where every tensor of the result stands: the base's own shards, or new ones of a wanted size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import UsageError
from lorakit.files.safetensors import DTYPE_BITS, Header, StoredTensor, planned_header
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import SINGLE
from lorakit.merge.placing import Placer
from lorakit.merge.plan import DTYPES, ComputeTensor, CopyTensor, PlannedShard
from lorakit.merge.steps import Step, Take


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor of the result that has no place yet."""

    name: str
    dtype: str
    source: StoredTensor
    steps: tuple[Step, ...]
    columns: int | None

    @property
    def nbytes(self) -> int:
        return self.source.nbytes * DTYPE_BITS[self.dtype] // DTYPE_BITS[self.source.dtype]


def planned_shards(placer: Placer, dtype: str, max_shard_size: int | None = None) -> tuple[PlannedShard, ...]:
    """The files of the result, with the names, the order and the metadata of the base's where the layout is kept."""
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"a shard of {max_shard_size} bytes holds nothing")
    by_shard: dict[Path, list[_Weight]] = {shard.file: [] for shard in placer.model.base.shards}
    for name, stored in placer.model.tensors.items():
        home = placer.homes.get(name, stored.file)
        by_shard[home].append(_weight(placer, name, stored, DTYPES.get(dtype)))
    kept = {shard.file: shard for shard in placer.model.base.shards}
    if max_shard_size is None:
        return tuple(
            _shard(file.name, weights, kept[file].metadata, kept[file]) for file, weights in by_shard.items() if weights
        )
    groups = _groups([weight for weights in by_shard.values() for weight in weights], max_shard_size)
    metadata = placer.model.base.shards[0].metadata
    names = [SINGLE] if len(groups) == 1 else [
        f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)
    ]  # fmt: skip
    return tuple(_shard(name, weights, metadata, None) for name, weights in zip(names, groups, strict=True))


def _weight(placer: Placer, name: str, stored: StoredTensor, wanted: str | None) -> _Weight:
    source, steps = stored, tuple(placer.steps.get(name, ()))
    dtype = wanted if wanted and stored.dtype in FLOATS else placer.dtypes.get(name, stored.dtype)
    if len(steps) == 1 and isinstance(steps[0], Take) and steps[0].weight == 1 and steps[0].tensor.dtype == dtype:
        source, steps = steps[0].tensor, ()
    return _Weight(name, dtype, source, steps, placer.columns.get(name))


def _groups(weights: Sequence[_Weight], most: int) -> list[list[_Weight]]:
    """In their order, each group as large as it may be; a tensor that is larger stands alone."""
    groups: list[list[_Weight]] = [[]]
    size = 0
    for weight in weights:
        if groups[-1] and size + weight.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += weight.nbytes
    return groups


def _shard(name: str, weights: Sequence[_Weight], metadata: dict[str, str], source: Header | None) -> PlannedShard:
    plan = [(weight.name, weight.dtype, weight.source.shape) for weight in weights]
    if source is not None and plan == [(one.name, one.dtype, one.shape) for one in source.tensors.values()]:
        head, target = _head(source), source
    else:
        head, target = planned_header(Path(name), plan, metadata)
    copied: list[CopyTensor] = []
    computed: list[ComputeTensor] = []
    for weight in weights:
        placed = target.tensors[weight.name]
        if weight.steps or weight.source.dtype != placed.dtype:
            computed.append(ComputeTensor(weight.source, placed, weight.steps, weight.columns))
        else:
            copied.append(CopyTensor(weight.source, placed))
    return PlannedShard(target, head, tuple(copied), tuple(computed))


def _head(header: Header) -> bytes:
    with header.file.open("rb") as stream:
        return stream.read(header.data_start)
