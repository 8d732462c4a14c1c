"""Where every tensor of the result stands: the base's own shards, or new ones of a wanted size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from lorakit.errors import UsageError
from lorakit.files.safetensors import Header, StoredTensor, planned_header
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import SINGLE
from lorakit.merge.placing import Placer
from lorakit.merge.plan import DTYPES, ComputeTensor, CopyTensor, PlannedShard, WholeTensor
from lorakit.merge.steps import Step, Take

if TYPE_CHECKING:
    from lorakit.merge.quantised import QuantisedWeight, Quantiser

Planned = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_T = TypeVar("_T", bound=_Sized)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A tensor of the result that has no place yet; `written` are the tensors that it becomes, mostly itself."""

    name: str
    dtype: str
    source: StoredTensor
    steps: tuple[Step, ...]
    columns: int | None
    written: tuple[Planned, ...]
    quantised: QuantisedWeight | None = None
    quantiser: Quantiser | None = None
    keeps_format: bool = False

    @property
    def nbytes(self) -> int:
        header = planned_header(Path(self.name), self.written, {})[1]
        return header.size - header.data_start


def planned_shards(
    placer: Placer, dtype: str, max_shard_size: int | None = None, quantise: str | None = None
) -> tuple[tuple[PlannedShard, ...], Quantiser | None]:
    """The files of the result, with the names, the order and the metadata of the base's where the layout is kept."""
    if max_shard_size is not None and max_shard_size < 1:
        raise UsageError(f"a shard of {max_shard_size} bytes holds nothing")
    model = placer.model
    by_shard: dict[Path, list[_Weight]] = {shard.file: [] for shard in model.base.shards}
    for name, stored in model.tensors.items():
        home = placer.homes.get(name, stored.file)
        by_shard[home] += _weights(placer, name, stored, DTYPES.get(dtype))
    quantiser = None
    if quantise is not None:
        from lorakit.merge.quantised import Quantiser

        everything = [weight for weights in by_shard.values() for weight in weights]
        quantiser = Quantiser.of(
            quantise, model.base.config, [planned for one in everything for planned in one.written]
        )
        by_shard = {file: [_quantised(weight, quantiser) for weight in weights] for file, weights in by_shard.items()}
    kept = {shard.file: shard for shard in model.base.shards}
    if max_shard_size is None:
        return tuple(
            _shard(file.name, weights, kept[file].metadata, kept[file]) for file, weights in by_shard.items() if weights
        ), quantiser
    metadata = model.base.shards[0].metadata
    cut = in_files([weight for weights in by_shard.values() for weight in weights], max_shard_size)
    shards = tuple(_shard(name, weights, metadata, None) for name, weights in cut.items())
    return shards, quantiser


def _weights(placer: Placer, name: str, stored: StoredTensor, wanted: str | None) -> list[_Weight]:
    source, steps = stored, tuple(placer.steps.get(name, ()))
    weight = placer.model.quantised.get(name)
    if weight is not None and placer.model.onto != "dequantised":
        return _same_format(weight, stored, steps)
    dtype = wanted if wanted and stored.dtype in FLOATS else placer.dtypes.get(name, stored.dtype)
    if len(steps) == 1 and isinstance(steps[0], Take) and steps[0].weight == 1 and steps[0].tensor.dtype == dtype:
        source, steps, weight = steps[0].tensor, (), None
    return [_Weight(name, dtype, source, steps, placer.columns.get(name), ((name, dtype, stored.shape),), weight)]


def _same_format(weight: QuantisedWeight, stored: StoredTensor, steps: tuple[Step, ...]) -> list[_Weight]:
    """The parts of a quantised weight: those that hold its numbers are written anew where it changes."""
    rewritten = weight.rewritten if steps else ()
    parts = [
        _Weight(part.name, part.dtype, part, (), None, (_planned(part),))
        for part in weight.parts.values()
        if part not in rewritten
    ]
    if rewritten:
        written = tuple(_planned(part) for part in rewritten)
        parts.append(_Weight(weight.name, stored.dtype, stored, steps, None, written, weight, keeps_format=True))
    return parts


def _planned(stored: StoredTensor) -> Planned:
    return stored.name, stored.dtype, stored.shape


def _quantised(weight: _Weight, quantiser: Quantiser) -> _Weight:
    written = quantiser.planned(weight.name, weight.dtype, weight.source.shape)
    return weight if written is None else replace(weight, written=tuple(written), quantiser=quantiser)


def in_files(tensors: Sequence[_T], most: int) -> dict[str, list[_T]]:
    """By the file's name, in their order, each file as large as it may be; a tensor that is larger stands alone."""
    groups: list[list[_T]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    count = len(groups)
    names = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return dict(zip(names, groups, strict=True))


def _shard(name: str, weights: Sequence[_Weight], metadata: dict[str, str], source: Header | None) -> PlannedShard:
    plan = [planned for weight in weights for planned in weight.written]
    if source is not None and sorted(plan) == sorted(_planned(stored) for stored in source.tensors.values()):
        head, target = _head(source), source
    else:
        head, target = planned_header(Path(name), plan, metadata)
    copied: list[CopyTensor] = []
    computed: list[ComputeTensor] = []
    whole: list[WholeTensor] = []
    for weight in weights:
        targets = tuple(target.tensors[one] for one, _, _ in weight.written)
        one = ComputeTensor(weight.source, replace(targets[0], dtype=weight.dtype), weight.steps, weight.columns)
        if weight.quantised is not None or weight.quantiser is not None:
            whole.append(
                WholeTensor(weight.name, one, targets, weight.quantised, weight.quantiser, weight.keeps_format)
            )
        elif weight.steps or weight.source.dtype != targets[0].dtype:
            computed.append(one)
        else:
            copied.append(CopyTensor(weight.source, targets[0]))
    return PlannedShard(target, head, tuple(copied), tuple(computed), tuple(whole))


def _head(header: Header) -> bytes:
    if header.head is not None:
        return header.head
    with header.file.open("rb") as stream:
        return stream.read(header.data_start)
