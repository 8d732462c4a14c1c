"""Layers that an adapter has in one piece and the base in several, or the other way round, as the base has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from lorakit.adapters.delta import Delta, Made
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.resolve import Resolver

if TYPE_CHECKING:
    import torch

# The rows of the one are those of the others, one behind the other.
WHOLES: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_qkv": ("in_proj_q", "in_proj_k", "in_proj_v"),
}
RESPELLED = {"unembed_tokens": "lm_head"}  # as tinker calls it


@dataclass(frozen=True, slots=True)
class Regrouped:
    """Deltas by the base's layers; `changed` are the modules, as the adapter calls them, that this took."""

    deltas: dict[str, Delta]
    changed: tuple[str, ...]


def regrouped(deltas: Mapping[str, Delta], tensors: Mapping[str, StoredTensor], resolver: Resolver) -> Regrouped:
    """Each module that the base lacks, by the layers that it has instead, where their sizes say that they are it."""
    found: dict[str, Delta] = {}
    changed: list[str] = []
    for module, delta in deltas.items():
        parent, _, layer = module.rpartition(".")
        if resolver.weight_of(module) is not None or delta.kind != "linear":
            found[module] = delta
            continue
        other = RESPELLED.get(layer)
        if other is not None and (name := _head(other, resolver)) is not None:
            found[name] = delta
        elif pieces := _pieces(parent, layer, delta, tensors, resolver):
            found |= pieces
        elif whole := _whole(parent, layer, deltas, tensors, resolver):
            found |= whole
        else:
            found[module] = delta
            continue
        changed.append(module)
    return Regrouped(found, tuple(changed))


def _head(name: str, resolver: Resolver) -> str | None:
    weight = resolver.weight_of(name)
    return None if weight is None else weight.removesuffix(".weight")


def _pieces(
    parent: str, layer: str, delta: Delta, tensors: Mapping[str, StoredTensor], resolver: Resolver
) -> dict[str, Delta]:
    """The rows of a whole layer, as the base's pieces of it; none where they don't add up to it."""
    paths = [f"{parent}.{piece}" for piece in WHOLES.get(layer, ())]
    weights = [tensors[name].shape for path in paths if (name := resolver.weight_of(path)) is not None]
    sizes = [shape[0] for shape in weights if len(shape) == 2]
    if not paths or len(sizes) < len(paths) or sum(sizes) != delta.shape[0]:
        return {}
    ends = list(accumulate(sizes))
    return {path: _rows(delta, end - size, end) for path, size, end in zip(paths, sizes, ends, strict=True)}


def _rows(delta: Delta, first: int, last: int) -> Delta:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        b, a = delta.stacked()
        return b[first:last], a

    return Delta((Made((last - first, delta.shape[1]), make, known_rank=delta.rank),))


def _whole(
    parent: str, layer: str, deltas: Mapping[str, Delta], tensors: Mapping[str, StoredTensor], resolver: Resolver
) -> dict[str, Delta]:
    """All pieces of one of the base's layers as one; none where one of them is missing, or they don't add up."""
    for whole, pieces in WHOLES.items():
        weight = resolver.weight_of(f"{parent}.{whole}") if layer in pieces else None
        parts = [deltas[path] for piece in pieces if (path := f"{parent}.{piece}") in deltas]
        if weight is None or len(parts) < len(pieces):
            continue
        if sum(part.shape[0] for part in parts) == tensors[weight].shape[0]:
            return {f"{parent}.{whole}": _stacked(parts)}
    return {}


def _stacked(parts: list[Delta]) -> Delta:
    """Rows below rows: B is block-diagonal, and A the factors below one another."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        loaded = [part.stacked() for part in parts]
        b: torch.Tensor = torch.block_diag(*(left for left, _ in loaded))  # type: ignore[no-untyped-call]
        return b, torch.cat([right for _, right in loaded])

    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    return Delta((Made(shape, make, known_rank=sum(part.rank for part in parts)),))
