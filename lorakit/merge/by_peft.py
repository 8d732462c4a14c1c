"""Adapters of PEFT's other methods: which weights they change, and PEFT's own layers as the step that does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.adapters.adapter import Adapter
from lorakit.errors import UnplacedTensors
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.layers import EMBEDDINGS, is_transposed, layer_of
from lorakit.merge.peft_layers import CHANGES_BIAS, SHARED, Kind, Layer, PeftLayers, require_mergeable, target_modules
from lorakit.merge.steps import ByPeft

if TYPE_CHECKING:
    from lorakit.merge.placing import Placer


def place_by_peft(placer: Placer, adapter: Adapter, tensors: Sequence[StoredTensor]) -> set[str]:
    """Enter the tensors of the method itself, and give their names; biases and whole modules are left to others.

    Raises:
        UnsupportedAdapter: PEFT can't merge the method, or not from what the file holds.
    """
    config = adapter.config
    require_mergeable(config.raw, adapter.name)
    stored = {tensor.name: tensor for tensor in tensors}
    roles = target_modules(config.raw, stored)
    places = {module: placer.resolver.weight_of(module) for module in roles.values() if module is not None}
    for name, module in roles.items():
        if module is not None and places[module] is None:
            placer.leave_out(stored[name], placer.reason_for(module))
    weights = {module: weight for module, weight in places.items() if weight is not None}
    if len(weights) < len(places) and config.peft_type in SHARED:
        raise UnplacedTensors(
            f"adapter '{adapter.name}' ({config.peft_type}) shares its vectors among all its modules, so it can't be "
            f"merged without '{next(module for module, weight in places.items() if weight is None)}', "
            f"which base '{placer.model.base.reference}' does not have"
        )
    used = {
        name: tensor for name, tensor in stored.items() if roles.get(name, "") is None or roles.get(name) in weights
    }
    if not used:
        return set(roles)
    if not weights:  # all is shared, and the config says which modules take part
        weights = {name.removesuffix(".weight"): name for name in placer.model.tensors if name.endswith(".weight")}
    made = {module: _layer(placer, weight) for module, weight in weights.items()}
    layers = PeftLayers(config.raw, used, made, adapter.name)
    weights = {module: weights[module] for module in sorted(layers.modules)}
    share = adapter.files()[0].weight
    for module, weight in weights.items():
        base = placer.model.tensors[weight]
        mine = [tensor for name, tensor in used.items() if roles[name] == module]
        placer.require_floats(adapter, base, iter(mine))
        bias = placer.model.tensors.get(_bias_of(weight))
        placer.add_step(weight, ByPeft(layers, module, "weight", bias, share))
        if bias is not None and config.peft_type in CHANGES_BIAS:
            placer.add_step(_bias_of(weight), ByPeft(layers, module, "bias", base, share))
        for tensor in mine:
            placer.enter(tensor, weight, config.peft_type)
    for name, tensor in used.items():
        if roles[name] is None:
            placer.enter(tensor, f"{len(weights)} weights", f"{config.peft_type}, shared")
    return set(roles)


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"


def _layer(placer: Placer, name: str) -> Layer:
    shape = placer.model.tensors[name].shape
    kind: Kind = "linear"
    if is_transposed(name, placer.model.base):
        kind = "conv1d"
    elif len(shape) == 1:
        kind = "norm"
    elif len(shape) > 2:
        kind = "conv"
    elif layer_of(name) in EMBEDDINGS:
        kind = "embedding"
    return Layer(kind, shape, _bias_of(name) in placer.model.tensors)
