"""Weights that compressed-tensors stored, and the group of the config that each belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorakit.errors import InvalidFile, Refused
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.quantised.compressed import Compressed
from lorakit.merge.quantised.finding import (
    ACTIVATIONS,
    INSTEAD,
    Tensors,
    bytes_of,
    modules_with,
    parts_of,
    two_sizes,
    weight_of,
)
from lorakit.merge.quantised.library import library_arguments
from lorakit.merge.quantised.tiles import grid
from lorakit.merge.quantised.weight import QuantisedWeight

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")


def find_compressed(
    method: str, settings: Mapping[str, Any], tensors: Tensors, dtype: str
) -> dict[str, QuantisedWeight]:
    groups = settings.get("config_groups")
    sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise Refused(f"the base is sparse ({sparsity}), which can't be read here: {INSTEAD}")
    if not isinstance(groups, Mapping):
        raise InvalidFile("the config's quantization_config has no config_groups")
    found = {}
    for module in modules_with(tensors, "weight_scale"):
        group = group_of(module, groups)
        arguments = group.get("weights") if group else None
        if group is None or not isinstance(arguments, Mapping):
            raise InvalidFile(
                f"'{module}' has scales, and no group of the config's quantization_config is meant for it"
            )
        layout = str(group.get("format") or settings.get("format"))
        strategy = arguments.get("strategy")
        if layout not in FORMATS or strategy not in STRATEGIES:
            raise Refused(f"'{module}.weight' is stored as {layout} by {strategy}, which can't be read here: {INSTEAD}")
        library_arguments(arguments)
        is_packed = f"{module}.weight_packed" in tensors
        needed = ("weight_packed", "weight_scale", "weight_shape") if is_packed else ("weight", "weight_scale")
        if not arguments.get("symmetric", True):
            needed = (*needed, "weight_zero_point")
        parts = parts_of(module, tensors, needed, ("weight_zero_point", "weight_g_idx", *ACTIVATIONS))
        shape = _stored_shape(parts, module)
        scheme = Compressed(arguments, shape, is_packed)
        scales = parts["weight_scale"]
        count = grid(shape, scheme.tile)
        if scales.nbytes == 0 or scales.shape not in (count, (count[0] * count[1],), ()):
            raise InvalidFile(f"'{scales.name}' is {list(scales.shape)}, and {scheme.name} needs {list(count)}")
        found[f"{module}.weight"] = weight_of(module, scheme, shape, dtype, parts)
    return found


def _stored_shape(parts: Mapping[str, StoredTensor], module: str) -> tuple[int, int]:
    if "weight" in parts:
        return two_sizes(parts["weight"].shape, module)
    two_sizes(parts["weight_packed"].shape, module)
    raw, width = bytes_of(parts["weight_shape"]), {"I64": 8, "I32": 4}.get(parts["weight_shape"].dtype, 0)
    if not width or len(raw) != 2 * width:
        raise InvalidFile(f"'{module}.weight_shape' does not hold two whole numbers")
    return int.from_bytes(raw[:width], "little"), int.from_bytes(raw[width:], "little")


def group_of(module: str, groups: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config group of a linear layer: one that names it goes before one that names all `Linear`.

    The order of `compressed_tensors.utils.match` (names, then patterns, then classes).
    """
    sections = [section for section in groups.values() if isinstance(section, Mapping)]
    for names in (_is_name, _is_pattern, _is_class):
        for section in sections:
            if any(names(str(target), module) for target in section.get("targets") or ()):
                return section
    return None


def _is_name(target: str, module: str) -> bool:
    return target == module


def _is_pattern(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target[3:], module) is not None


def _is_class(target: str, module: str) -> bool:
    return target == "Linear"
