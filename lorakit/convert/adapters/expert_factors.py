"""Factors of a mixture of experts as vLLM takes them: each expert's own, for every layer of every expert.

What comes as one tensor for all experts (PEFT's `target_parameters`, tinker's `experts.w1`) is taken apart, and an
expert that was not trained gets zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.adapters.config import AdapterConfig
from lorakit.adapters.delta import Delta, Made
from lorakit.errors import InvalidFile, UnsupportedAdapter, WrongBase
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_floats
from lorakit.merge.apply import picked_from
from lorakit.merge.experts import expert_products
from lorakit.merge.families import EXPERT_LAYERS
from lorakit.merge.resolve import Resolver
from lorakit.merge.steps import AddProduct, Matrix

if TYPE_CHECKING:
    import torch

Pair = tuple[StoredTensor, StoredTensor]  # A, B
_STACK = re.compile(r"^(?P<experts>.+\.experts)\.(?P<layer>w1|w2|w3)$")
_ONE = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<layer>[^.]+)$")


def taken_apart(
    config: AdapterConfig,
    pairs: Mapping[str, Pair],
    tensors: Mapping[str, StoredTensor],
    resolver: Resolver,
    folder: Path,
) -> dict[str, Delta]:
    """The deltas of single layers that the factors of whole stacks mean, by the paths that the base has for them.

    Raises:
        UnsupportedAdapter: the base has all experts in one tensor, or nothing says how the factors are laid out.
        WrongBase, InvalidFile: they don't fit the base, or one another.
    """
    read = lru_cache(maxsize=4)(load_floats)
    by_tinker = {module: pair for module, pair in pairs.items() if len(pair[0].shape) == 3 and _STACK.match(module)}
    odd = next((module for module, pair in pairs.items() if len(pair[0].shape) != 2 and module not in by_tinker), None)
    if odd is not None:
        raise UnsupportedAdapter(f"'{odd}' is a convolution, or another layer of more than two axes")
    deltas: dict[str, Delta] = {}
    for module, pair in by_tinker.items():
        deltas |= _of_tinker(module, *pair, config.scale_of(module), resolver, read)
    by_peft = {module: pair for module, pair in pairs.items() if module not in by_tinker}
    if by_peft:
        deltas |= _of_peft(config, by_peft, tensors, resolver, folder, read)
    return deltas


def require_stacked(
    config: AdapterConfig,
    pairs: Mapping[str, Pair],
    tensors: Mapping[str, StoredTensor],
    resolver: Resolver,
    folder: Path,
    hidden: int,
) -> None:
    """That the factors are what vLLM takes as one tensor for all experts: those of both parameters of each layer, the
    expert fastest in B, from `hidden` inputs and to as many outputs (vllm/lora/model_manager.py,
    `_stack_moe_lora_weights`).

    Raises:
        UnsupportedAdapter: they are laid out otherwise, or one of the two is missing.
        WrongBase: they don't fit the base.
    """
    products, without = expert_products(config, pairs, tensors, resolver, name=str(folder), folder=folder)
    if without:
        raise WrongBase(f"the base has no parameters that '{without[0]}' could change")
    layers = {module.removesuffix(".base_layer") for module in pairs}
    odd = next((module for module in layers if not {module, f"{module}.base_layer"} <= pairs.keys()), None)
    if odd is not None or len(pairs) != 2 * len(layers):
        raise UnsupportedAdapter(f"vLLM wants the factors of both parameters of '{odd or next(iter(layers))}'")
    for module in layers:
        upper, lower = pairs[f"{module}.base_layer"], pairs[module]
        if upper[0].shape[1] != hidden or lower[1].shape[0] != hidden:
            raise UnsupportedAdapter(f"the factors of '{module}' take its outputs for its inputs")
    if any(len(product.B.view) == 3 and product.B.picked[1] is not None for _, product in products):
        raise UnsupportedAdapter("the columns of lora_B are in Unsloth's order")


def _of_peft(
    config: AdapterConfig,
    pairs: Mapping[str, Pair],
    tensors: Mapping[str, StoredTensor],
    resolver: Resolver,
    folder: Path,
    read: Callable[[StoredTensor], torch.Tensor],
) -> dict[str, Delta]:
    products, without = expert_products(config, pairs, tensors, resolver, name=str(folder), folder=folder)
    if without:
        raise WrongBase(f"the base has no parameters that '{without[0]}' could change")
    deltas: dict[str, Delta] = {}
    for weight, product in products:
        if len(tensors[weight].shape) != 2 or not weight.endswith(".weight"):
            raise UnsupportedAdapter(f"the base has all experts of '{weight}' in one tensor")
        deltas[weight.removesuffix(".weight")] = _delta_of(product, read)
    return deltas


def _delta_of(product: AddProduct, read: Callable[[StoredTensor], torch.Tensor]) -> Delta:
    def load(matrix: Matrix) -> torch.Tensor:
        return picked_from(read(matrix.stored), matrix)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        b, a = load(product.B), load(product.A)
        return (a.T, b.T) if product.transposed else (b, a)

    out, into = product.shape
    return Delta((Made((out, into), make, product.factor, product.rank),))


def _of_tinker(
    module: str, a: StoredTensor, b: StoredTensor, scale: float, resolver: Resolver,
    read: Callable[[StoredTensor], torch.Tensor],
) -> dict[str, Delta]:  # fmt: skip
    """A (experts, r, in) and B (experts, out, r), either of them of one expert where all share it."""
    match = _STACK.match(module)
    counts = {a.shape[0], b.shape[0]}
    if match is None or len(b.shape) != 3 or len(counts - {1}) > 1 or a.shape[1] != b.shape[2]:
        raise InvalidFile(f"the factors of '{module}' don't fit: B {list(b.shape)}, A {list(a.shape)}")
    deltas: dict[str, Delta] = {}
    for expert in range(max(counts)):
        path = f"{match['experts']}.{expert}.{EXPERT_LAYERS[match['layer']]}"
        weight = resolver.weight_of(path)
        if weight is None:
            raise WrongBase(f"the base has no weight for '{path}'")
        deltas[weight.removesuffix(".weight")] = _of_expert(expert, a, b, scale, read)
    return deltas


def _of_expert(
    expert: int, a: StoredTensor, b: StoredTensor, scale: float, read: Callable[[StoredTensor], torch.Tensor]
) -> Delta:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return read(b)[min(expert, b.shape[0] - 1)], read(a)[min(expert, a.shape[0] - 1)]

    return Delta((Made((b.shape[1], a.shape[2]), make, scale, a.shape[1]),))


def untrained(deltas: Mapping[str, Delta], tensors: Mapping[str, StoredTensor]) -> dict[str, Delta]:
    """Zeros for the layers of experts that are not among `deltas`, where others of the same layer of the model are."""
    trained = {match["experts"] for module in deltas if (match := _ONE.match(module))}
    return {
        module: Delta((_nothing((stored.shape[0], stored.shape[1])),))
        for module, stored in _layers_of(trained, tensors)
        if module not in deltas
    }


def _layers_of(experts: set[str], tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    for name, stored in tensors.items():
        match = _ONE.match(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if match is not None and match["experts"] in experts and len(stored.shape) == 2:
            yield name.removesuffix(".weight"), stored


def _nothing(shape: tuple[int, int]) -> Made:
    def make() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        return torch.zeros(shape[0], 0), torch.zeros(0, shape[1])

    return Made(shape, make, known_rank=0)
