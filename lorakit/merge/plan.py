"""What becomes of every tensor of the base, and of every tensor of the adapters. Reads headers, writes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import require_plain_lora
from lorakit.adapters.delta import Delta, Term
from lorakit.errors import Refused, UnplacedTensors, UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import Header, StoredTensor, planned_header
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import BaseModel
from lorakit.merge.resolve import Resolver, copied_from_base

DTYPES: Mapping[str, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}

# Model types whose linear layers are transformers' Conv1D, which stores (in, out); PEFT goes by the same class.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

HEADS = frozenset({"lm_head", "embed_out"})
EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "wte"})

SHOWN = 8  # how many tensors an error names


Role = Literal["A", "B", "copy"]  # a copy is the base's own values, compared before anything is written


@dataclass(frozen=True, slots=True)
class CopyTensor:
    """The bytes stay as they are."""

    source: StoredTensor
    target: StoredTensor


@dataclass(frozen=True, slots=True)
class ComputeTensor:
    """target = round(source + Σ factor · B A); without a term, a change of dtype."""

    source: StoredTensor
    target: StoredTensor
    terms: tuple[Term, ...] = ()
    transposed: bool = False  # the base stores (in, out), as Conv1D does


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file to write: its head, and each of its tensors once."""

    source: Header
    target: Header
    head: bytes
    copied: tuple[CopyTensor, ...]
    computed: tuple[ComputeTensor, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor of an adapter went."""

    adapter: str
    tensor: str
    weight: str
    role: Role


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A tensor of an adapter that has to be equal to one of the base."""

    adapter: str
    stored: StoredTensor
    base: StoredTensor


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The whole merge as a value: can be printed, compared, executed."""

    base: BaseModel
    dtype: str
    shards: tuple[PlannedShard, ...]
    placements: tuple[Placement, ...]
    copies: tuple[BaseCopy, ...]
    unplaced: tuple[str, ...] = ()

    @property
    def computed(self) -> Iterator[ComputeTensor]:
        return (tensor for shard in self.shards for tensor in shard.computed)

    @property
    def nbytes(self) -> int:
        return sum(shard.target.size for shard in self.shards)


@dataclass(slots=True)
class _Accounts:
    """Every adapter tensor is entered once: placed, or unplaced with the reason."""

    deltas: dict[str, Delta] = field(default_factory=dict)
    placements: dict[tuple[Path, str], Placement] = field(default_factory=dict)
    copies: list[BaseCopy] = field(default_factory=list)
    unplaced: dict[tuple[Path, str], str] = field(default_factory=dict)

    def leave_out(self, stored: StoredTensor, reason: str) -> None:
        self.unplaced[stored.file, stored.name] = reason

    def unplaced_lines(self) -> tuple[str, ...]:
        several = len({file for file, _ in self.unplaced}) > 1
        return tuple(
            f"{f'{file.parent}: ' if several else ''}{name}: {reason}" for (file, name), reason in self.unplaced.items()
        )

    def place(self, stored: StoredTensor, weight: str, role: Role) -> None:
        placement = Placement(str(stored.file.parent), stored.name, weight, role)
        self.placements[stored.file, stored.name] = placement


def plan_merge(base: BaseModel, adapters: Sequence[Adapter], *, dtype: str = "keep", strict: bool = True) -> MergePlan:
    """Say what becomes of every tensor of the base.

    Raises:
        UnsupportedAdapter: an adapter asks for more than W + Σ factor · B A on linear layers.
        UnplacedTensors: an adapter holds tensors that no weight of the base takes; names them, and the nearest names.
        WrongBase: an adapter's shapes aren't the base's.
        Refused: the weights to change are quantised.
    """
    accounts = _Accounts()
    resolver = Resolver(base.tensors)
    for adapter in adapters:
        for source in adapter.sources:
            require_plain_lora(source.config, str(source.folder), (), work="merged")
        _place(adapter, base, resolver, accounts)
    unplaced = accounts.unplaced_lines()
    if unplaced and strict:
        raise UnplacedTensors(_unplaced_message(base, unplaced))
    if not accounts.deltas:
        raise UnplacedTensors(f"nothing of the adapters fits base '{base.reference}'{_listed(unplaced)}")
    shards = tuple(_planned_shard(shard, base, accounts.deltas, dtype) for shard in base.shards)
    return MergePlan(base, dtype, shards, tuple(accounts.placements.values()), tuple(accounts.copies), unplaced)


def _place(adapter: Adapter, base: BaseModel, resolver: Resolver, accounts: _Accounts) -> None:
    taken: dict[str, str] = {}
    for module, delta in adapter.deltas.items():
        if delta.kind == "embedding":
            raise UnsupportedAdapter(
                f"adapter '{adapter.name}' can't be merged exactly: it has LoRA on the embedding '{module}'"
            )
        weight = resolver.weight_of(module)
        if weight is None:
            _refuse_tied_head(adapter, module, base)
            # looking for near names takes long, and a reader needs few of them
            nearest = resolver.nearest(module) if len(accounts.unplaced) < SHOWN else []
            reason = f"nearest in the base: {', '.join(nearest)}" if nearest else "no weight of the base takes it"
            for stored in _stored(delta):
                accounts.leave_out(stored, reason)
            continue
        if weight in taken and len(adapter.sources) == 1:
            raise UnplacedTensors(f"adapter '{adapter.name}': '{module}' and '{taken[weight]}' both mean '{weight}'")
        taken[weight] = module
        _check_target(adapter, module, delta, base.tensors[weight], base)
        known = accounts.deltas.get(weight)
        accounts.deltas[weight] = delta if known is None else known.plus(delta, module=weight)
        for term in delta.terms:
            accounts.place(term.B, weight, "B")
            accounts.place(term.A, weight, "A")
    for stored in adapter.others:
        _place_other(stored, base, resolver, accounts)


def _stored(delta: Delta) -> Iterator[StoredTensor]:
    for term in delta.terms:
        yield from (term.A, term.B)


def _place_other(stored: StoredTensor, base: BaseModel, resolver: Resolver, accounts: _Accounts) -> None:
    path = copied_from_base(stored.name)
    name = resolver.tensor_of(path) if path else None
    weight = base.tensors[name] if name else None
    folder = str(stored.file.parent)
    if weight is None:
        accounts.leave_out(stored, "no weight of the base takes it")
    elif weight.shape != stored.shape:
        raise UnsupportedAdapter(
            f"adapter '{folder}' holds '{stored.name}' {list(stored.shape)}, and the base has {list(weight.shape)}: "
            f"it resized the vocabulary, which can't be merged yet"
        )
    else:
        accounts.copies.append(BaseCopy(folder, stored, weight))
        accounts.place(stored, weight.name, "copy")


def is_tied(base: BaseModel) -> bool:
    """Whether the base's output head is its embedding: its config says so, or no head is stored."""
    settings = [base.config, *(value for value in base.config.values() if isinstance(value, dict))]
    said = any(part.get("tie_word_embeddings") is True for part in settings)
    return said or not any(_layer(name) in HEADS for name in base.tensors)


def _layer(path: str) -> str:
    return path.removesuffix(".weight").rsplit(".", 1)[-1]


def _refuse_tied_head(adapter: Adapter, module: str, base: BaseModel) -> None:
    if _layer(module) in HEADS | EMBEDDINGS and is_tied(base):
        raise UnsupportedAdapter(
            f"adapter '{adapter.name}' changes '{module}', but base '{base.reference}' uses one weight as embedding "
            f"and as output head: a delta for one would change both. Untie them first (tie_word_embeddings=False)"
        )


def _check_target(adapter: Adapter, module: str, delta: Delta, weight: StoredTensor, base: BaseModel) -> None:
    _refuse_tied_head(adapter, weight.name, base)
    odd = next((stored for stored in _stored(delta) if stored.dtype not in FLOATS), None)
    if odd is not None:
        raise UnsupportedAdapter(f"'{odd.name}' is stored as {odd.dtype}: save the adapter in bf16, fp16 or fp32")
    if weight.dtype not in FLOATS:
        method = base.quantised
        said = f" (quantised by {method})" if method else ""
        raise Refused(
            f"'{weight.name}' of base '{base.reference}' is stored as {weight.dtype}{said}: "
            f"merge onto the model before it was quantised"
        )
    expected = delta.shape[::-1] if is_transposed(weight.name, base) else delta.shape
    if weight.shape != expected:
        raise WrongBase(
            f"adapter '{adapter.name}' was made for another base: its '{module}' is {list(expected)}, "
            f"and '{weight.name}' of '{base.reference}' is {list(weight.shape)}"
        )


def is_transposed(name: str, base: BaseModel) -> bool:
    """Whether the base stores this weight as (in, out)."""
    return base.model_type in CONV1D_MODELS and _layer(name) in CONV1D_LAYERS


def _planned_shard(source: Header, base: BaseModel, deltas: Mapping[str, Delta], dtype: str) -> PlannedShard:
    wanted = DTYPES.get(dtype)
    plan = [
        (tensor.name, wanted if wanted and tensor.dtype in FLOATS else tensor.dtype, tensor.shape)
        for tensor in source.tensors.values()
    ]
    if all(source.tensors[name].dtype == planned for name, planned, _ in plan):
        head, target = read_head(source), source
    else:
        head, target = planned_header(Path(source.file.name), plan, source.metadata)
    copied: list[CopyTensor] = []
    computed: list[ComputeTensor] = []
    for name, stored in source.tensors.items():
        placed = target.tensors[name]
        if name in deltas:
            computed.append(ComputeTensor(stored, placed, deltas[name].terms, is_transposed(name, base)))
        elif stored.dtype != placed.dtype:
            computed.append(ComputeTensor(stored, placed))
        else:
            copied.append(CopyTensor(stored, placed))
    return PlannedShard(source, target, head, tuple(copied), tuple(computed))


def read_head(header: Header) -> bytes:
    with header.file.open("rb") as stream:
        return stream.read(header.data_start)


def _listed(unplaced: Sequence[str], most: int = SHOWN) -> str:
    if not unplaced:
        return ""
    lines = "".join(f"\n  {line}" for line in unplaced[:most])
    return ":" + lines + (f"\n  and {len(unplaced) - most} more" if len(unplaced) > most else "")


def _unplaced_message(base: BaseModel, unplaced: Sequence[str]) -> str:
    return (
        f"{len(unplaced)} adapter tensors have no place in base '{base.reference}'{_listed(unplaced)}\n"
        f"Name the base they were trained on with --base, or go on without them with --no-strict"
    )
