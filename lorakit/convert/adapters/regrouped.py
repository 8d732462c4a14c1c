"""Layers that an adapter has in one piece and the base in several, or the other way round, as the base has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

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


def regrouped(
    deltas: Mapping[str, Delta], tensors: Mapping[str, StoredTensor], resolver: Resolver, config: Mapping[str, Any]
) -> Regrouped:
    """Each module that the base lacks, by the layers that it has instead, where their sizes say that they are it; with
    the sizes of `config` the parts of a layer that were not trained are zeros.
    """
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
        elif whole := _whole(parent, layer, deltas, tensors, resolver, config):
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
    parent: str, layer: str, deltas: Mapping[str, Delta], tensors: Mapping[str, StoredTensor], resolver: Resolver,
    config: Mapping[str, Any],
) -> dict[str, Delta]:  # fmt: skip
    """All pieces of one of the base's layers as one; none where they don't add up to it."""
    for whole, pieces in WHOLES.items():
        weight = resolver.weight_of(f"{parent}.{whole}") if layer in pieces else None
        if weight is None or len(tensors[weight].shape) != 2:
            continue
        rows, into = tensors[weight].shape
        sizes = _sizes(whole, rows, config)
        parts = [
            _nothing(sizes[piece], into) if delta is None and piece in sizes else delta
            for piece in pieces
            for delta in (deltas.get(f"{parent}.{piece}"),)
        ]
        there = [part for part in parts if part is not None]
        if len(there) == len(pieces) and sum(part.shape[0] for part in there) == rows:
            return {f"{parent}.{whole}": _stacked(there)}
    return {}


def _sizes(whole: str, rows: int, config: Mapping[str, Any]) -> dict[str, int]:
    """Of the pieces of a layer of so many rows; none where the config does not say them."""
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, dict) else config
    said = [config.get(name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")]
    heads, groups, size, hidden = (value if isinstance(value, int) and value > 0 else None for value in said)
    if whole == "gate_up_proj" and rows % 2 == 0:
        found = [rows // 2] * 2
    elif whole == "qkv_proj" and heads and (size or hidden):
        size = size or (hidden or 0) // heads
        found = [heads * size, (groups or heads) * size, (groups or heads) * size]
    else:
        return {}
    return dict(zip(WHOLES[whole], found, strict=True)) if sum(found) == rows else {}


def _nothing(out: int, into: int) -> Delta:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        return torch.zeros(out, 0), torch.zeros(0, into)

    return Delta((Made((out, into), make, known_rank=0),))


def _stacked(parts: list[Delta]) -> Delta:
    """Rows below rows: B is block-diagonal, and A the factors below one another."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        loaded = [part.stacked() for part in parts]
        b: torch.Tensor = torch.block_diag(*(left for left, _ in loaded))  # type: ignore[no-untyped-call]
        return b, torch.cat([right for _, right in loaded])

    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    return Delta((Made(shape, make, known_rank=sum(part.rank for part in parts)),))
