"""What becomes of every tensor of a checkpoint: its name, its dtype, its file. Reads no tensor but tied ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.convert.expected import Expected
from lorakit.convert.placing import Placing
from lorakit.convert.source import Source, SourceTensor
from lorakit.files.safetensors import DTYPE_BITS, Header, planned_header
from lorakit.files.tensors import FLOATS, TORCH_NAMES
from lorakit.merge.companions import with_dtype
from lorakit.merge.layout import in_files
from lorakit.merge.plan import DTYPES

if TYPE_CHECKING:
    from lorakit.merge.quantised import Quantiser

MAX_SHARD = 5_000_000_000  # bytes, as transformers cuts by default
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the result, of `dtype`; `written` are those that it becomes, mostly itself."""

    name: str
    dtype: str
    source: SourceTensor
    written: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def is_quantised(self) -> bool:
        return self.written != ((self.name, self.dtype, self.source.shape),)

    @property
    def is_rounded(self) -> bool:
        return self.is_quantised or self.dtype != self.source.dtype

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * DTYPE_BITS[dtype] // 8 for _, dtype, shape in self.written)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file to write: its head, and where each of its tensors stands."""

    head: bytes
    target: Header
    tensors: tuple[PlannedTensor, ...]

    @property
    def name(self) -> str:
        return self.target.file.name


@dataclass(frozen=True, slots=True)
class ConvertPlan:
    """The whole conversion as a value. `renamed`: the name in the result by that in the source."""

    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    renamed: Mapping[str, str]
    left_out: Mapping[str, tuple[str, ...]]
    quantiser: Quantiser | None = None
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(shard.target.size for shard in self.shards)


def plan_convert(
    source: Source,
    expected: Expected,
    config: Mapping[str, Any],
    *,
    tokens: int | None = None,
    trained: bool = True,
    dtype: str = "keep",
    quantise: str | None = None,
    max_shard_size: int = MAX_SHARD,
    strict: bool = True,
) -> ConvertPlan:
    """Say what becomes of every tensor. `tokens`: how many the tokenizer has, and with `trained` it is that which the
    model was trained with.

    Raises:
        UnplacedTensors: the model has no place for a tensor; names them, and the nearest names there are.
        Refused: the model has tensors that the checkpoint lacks; or tokens without a row.
        WrongBase: the model's tensors are of other shapes.
    """
    placing = Placing(source, expected, dict(config))
    placing.place(strict=strict)
    placing.ensure_not_quantised()
    wanted = DTYPES.get(dtype)
    placing.settle_tied(wanted)
    placing.ensure_all_there()
    placing.settle_vocabulary(tokens, trained=trained)
    planned = [
        PlannedTensor(name, kept, tensor, ((name, kept, tensor.shape),))
        for name, tensor in placing.cut_as_stored().items()
        for kept in (wanted if wanted and tensor.dtype in FLOATS else tensor.dtype,)
    ]
    changed, notes = _with_dtype_of(planned, placing.config)
    notes = () if wanted else notes  # it was asked for
    quantiser = None
    if quantise is not None:
        from lorakit.merge.quantised import Quantiser

        quantiser = Quantiser.of(quantise, changed, [one.written[0] for one in planned])
        planned = [_quantised(one, quantiser) for one in planned]
        changed["quantization_config"] = quantiser.config_section()
    shards = in_shards(planned, max_shard_size)
    notes = (*source.notes, *placing.notes, *notes)
    return ConvertPlan(shards, changed, placing.renamed, placing.left_out, quantiser, notes)


def _with_dtype_of(planned: Sequence[PlannedTensor], config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config with the dtype that most of the weights have, and what there is to say of that."""
    sizes: Counter[str] = Counter()
    for one in planned:
        if one.dtype in FLOATS:
            sizes[one.dtype] += math.prod(one.source.shape)
    if not sizes:
        return dict(config), ()
    name = TORCH_NAMES[sizes.most_common(1)[0][0]]
    said = config.get("dtype", config.get("torch_dtype"))
    changed = with_dtype(config, name)
    if said is None:
        changed["torch_dtype"] = name
    is_news = said not in (None, name)
    return changed, (f"config.json says {name} for its dtype, as the weights are; it said {said}",) if is_news else ()


def _quantised(tensor: PlannedTensor, quantiser: Quantiser) -> PlannedTensor:
    written = quantiser.planned(tensor.name, tensor.dtype, tensor.source.shape)
    return tensor if written is None else replace(tensor, written=tuple(written))


def in_shards(planned: Sequence[PlannedTensor], most: int) -> tuple[Shard, ...]:
    """Files of at most `most` bytes, in the order of the tensors; one that is larger stands alone."""
    return tuple(_shard(name, tensors) for name, tensors in in_files(planned, most).items())


def _shard(name: str, tensors: Sequence[PlannedTensor]) -> Shard:
    head, target = planned_header(Path(name), [one for tensor in tensors for one in tensor.written], METADATA)
    return Shard(head, target, tuple(tensors))
