"""Modules that an adapter leaves alone, and a server wants to see all the same: as changes of zero."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.delta import Delta, made
from lorakit.errors import UsageError
from lorakit.merge.base import BaseModel
from lorakit.merge.layers import is_transposed

if TYPE_CHECKING:
    import torch

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# What servers hold in one tensor.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_UNQUANTISED = ", as it was before it was quantised"


def filled_in_layers(adapter: Adapter, base: BaseModel | None) -> Adapter:
    """With each kind of module (`self_attn.q_proj`) in every layer that has one.

    Raises:
        UsageError: there is no base to say which layers there are, or a quantised one, which has no such weights.
    """
    if base is None or base.quantised:
        raise UsageError(
            "LoRAX leaves out a kind of module of which one layer has none, and only the weights of the base say which "
            f"layers there are: name it with --base{_UNQUANTISED if base else ''}"
        )
    kinds = {_NUMBER.sub("#", module) for module in adapter.deltas}
    wanted = (name.removesuffix(".weight") for name in base.tensors if name.endswith(".weight"))
    return _filled(adapter, [module for module in wanted if _NUMBER.sub("#", module) in kinds], base)


def filled_in_parts(adapter: Adapter, base: BaseModel | None) -> Adapter:
    """With all of q, k and v of a layer where it has one of them, and both of gate and up.

    Raises:
        UsageError: one is missing, and there is no base to say its size, or a quantised one.
    """
    wanted = [module for module in _siblings(adapter.deltas) if module not in adapter.deltas]
    if not wanted:
        return adapter
    if base is None or base.quantised:
        raise UsageError(
            f"SGLang holds '{wanted[0]}', which the adapter leaves alone, in one with others that it changes, and only "
            f"the weights of the base say its size: name it with --base{_UNQUANTISED if base else ''}"
        )
    return _filled(adapter, wanted, base)


def _siblings(modules: Iterable[str]) -> Iterable[str]:
    for module in modules:
        parent, _, layer = module.rpartition(".")
        for together in _TOGETHER:
            if layer in together:
                yield from (f"{parent}.{one}" for one in together)


def _filled(adapter: Adapter, modules: Iterable[str], base: BaseModel) -> Adapter:
    zeros = {
        module: _zero(base, f"{module}.weight")
        for module in modules
        if module not in adapter.deltas and f"{module}.weight" in base.tensors
    }
    deltas: Mapping[str, Delta] = {**adapter.deltas, **zeros}
    return replace(adapter, deltas=deltas)


def _zero(base: BaseModel, name: str) -> Delta:
    stored = base.tensors[name].shape
    out, into = stored[::-1] if is_transposed(name, base) else stored
    return Delta((made((out, into), partial(_zeros, out, into), 1),))


def _zeros(out: int, into: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.zeros(out, 1), torch.zeros(1, into)
