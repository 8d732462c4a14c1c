"""What becomes of every tensor of the base, and of every tensor of the adapters. Reads headers, writes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.errors import InvalidFile, UnplacedTensors
from lorakit.files.safetensors import Header, StoredTensor
from lorakit.merge.base import BaseModel
from lorakit.merge.steps import Step

if TYPE_CHECKING:
    from lorakit.merge.quantised import QuantisedWeight, Quantiser

DTYPES: Mapping[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

SHOWN = 8  # how many tensors an error names
WITHOUT_THEM = "go on without them with --no-strict"


@dataclass(frozen=True, slots=True)
class CopyTensor:
    """The bytes stay as they are."""

    source: StoredTensor
    target: StoredTensor


@dataclass(frozen=True, slots=True)
class ComputeTensor:
    """target = round(the source after its steps); without a step, a change of dtype.

    `columns` is how many the weight has when it is seen as a matrix: by default its last axis.
    """

    source: StoredTensor
    target: StoredTensor
    steps: tuple[Step, ...] = ()
    columns: int | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the weight seen as a matrix: a bias is one column."""
        shape = self.source.shape
        columns = self.columns or (shape[-1] if len(shape) > 1 else 1)
        return math.prod(shape) // max(1, columns), columns


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """Computed in one piece: a weight that is quantised where it is read, or where it is written.

    `computed` says what is done between; `targets` are what is written: the parts in which a format holds the weight,
    with `keeps_format` those that it was read from.
    """

    name: str
    computed: ComputeTensor
    targets: tuple[StoredTensor, ...]
    quantised: QuantisedWeight | None = None
    quantiser: Quantiser | None = None
    keeps_format: bool = False


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file to write: its head, and each of its tensors once."""

    target: Header
    head: bytes
    copied: tuple[CopyTensor, ...]
    computed: tuple[ComputeTensor, ...]
    whole: tuple[WholeTensor, ...] = ()

    @property
    def name(self) -> str:
        return self.target.file.name


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor of an adapter went, and what it is there."""

    adapter: str
    tensor: str
    weight: str
    role: str


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The whole merge as a value: can be printed, compared, executed.

    `config` is the result's, where it is not the base's own; `notes` what a reader should know.
    """

    base: BaseModel
    dtype: str
    shards: tuple[PlannedShard, ...]
    placements: tuple[Placement, ...]
    unplaced: tuple[str, ...] = ()
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def computed(self) -> Iterator[ComputeTensor]:
        for shard in self.shards:
            yield from shard.computed
            yield from (tensor.computed for tensor in shard.whole)

    @property
    def quantised_again(self) -> bool:
        """Whether changed weights are written in the format of a quantised base."""
        return any(tensor.keeps_format for shard in self.shards for tensor in shard.whole)

    @property
    def nbytes(self) -> int:
        return sum(shard.target.size for shard in self.shards)


def plan_merge(
    base: BaseModel,
    adapters: Sequence[Adapter],
    *,
    dtype: str = "keep",
    strict: bool = True,
    expert_layout: str | None = None,
    max_shard_size: int | None = None,
    onto: str | None = None,
    quantise: str | None = None,
) -> MergePlan:
    """Say what becomes of every tensor of the base.

    Raises:
        UnsupportedAdapter: an adapter is of a kind that can't be merged, or not without more being said.
        UnplacedTensors: an adapter holds tensors that no weight of the base takes; names them, and the nearest names.
        InvalidFile: an adapter's config speaks of tensors that its file lacks.
        WrongBase: an adapter's shapes aren't the base's.
        Refused: the weights to change are quantised in a way that is not asked for, or can't be read.
    """
    from lorakit.merge.layout import planned_shards
    from lorakit.merge.model import changed_config, model_for
    from lorakit.merge.placing import Placer
    from lorakit.merge.tied import ensure_one_vocabulary, settle_tied

    model = model_for(base, adapters, onto=onto)
    placer = Placer(model, expert_layout=expert_layout)
    for adapter in adapters:
        placer.place(adapter)
    unplaced = placer.unplaced_lines()
    if unplaced and strict:
        raise UnplacedTensors(_unplaced_message(base, unplaced))
    if placer.missing:
        raise InvalidFile(placer.missing[0])
    if not placer.placements:
        raise UnplacedTensors(f"nothing of the adapters fits base '{base.reference}'{_listed(unplaced)}")
    settle_tied(placer)
    ensure_one_vocabulary(placer)
    shards, quantiser = planned_shards(placer, dtype, max_shard_size, quantise)
    config = changed_config(model, dtype, quantiser)
    return MergePlan(base, dtype, shards, tuple(placer.placements.values()), unplaced, config, tuple(placer.notes))


def _listed(unplaced: Sequence[str], most: int = SHOWN) -> str:
    if not unplaced:
        return ""
    lines = "".join(f"\n  {line}" for line in unplaced[:most])
    return ":" + lines + (f"\n  and {len(unplaced) - most} more" if len(unplaced) > most else "")


def _unplaced_message(base: BaseModel, unplaced: Sequence[str]) -> str:
    return (
        f"{len(unplaced)} adapter tensors have no place in base '{base.reference}'{_listed(unplaced)}\n"
        f"Name the base they were trained on with --base, or {WITHOUT_THEM}"
    )
