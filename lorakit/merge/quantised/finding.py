"""Stored tensors by the names that formats give them beside a module's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from lorakit.errors import InvalidFile, Refused
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.quantised.weight import QuantisedWeight, Scheme

Tensors = Mapping[str, StoredTensor]

INSTEAD = "merge onto the model before it was quantised"  # the cure that every refusal ends with
ACTIVATIONS = ("input_scale", "activation_scale", "input_zero_point", "output_scale", "output_zero_point")


def weight_of(
    module: str, scheme: Scheme, shape: tuple[int, int], dtype: str, parts: Mapping[str, StoredTensor]
) -> QuantisedWeight:
    return QuantisedWeight(f"{module}.weight", shape, dtype, dict(parts), scheme)


def parts_of(
    module: str, tensors: Tensors, needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, StoredTensor]:
    missing = [role for role in needed if f"{module}.{role}" not in tensors]
    if missing:
        raise InvalidFile(f"'{module}.{needed[0]}' is quantised, and '{module}.{missing[0]}' is not there to read it")
    return {role: tensors[f"{module}.{role}"] for role in (*needed, *optional) if f"{module}.{role}" in tensors}


def modules_with(tensors: Tensors, role: str) -> list[str]:
    """The modules that have such a tensor."""
    return [name.removesuffix(f".{role}") for name in tensors if name.endswith(f".{role}")]


def bytes_of(stored: StoredTensor) -> bytes:
    with stored.file.open("rb") as stream:
        return os.pread(stream.fileno(), stored.nbytes, stored.start)


def two_sizes(shape: tuple[int, ...], module: str) -> tuple[int, int]:
    if len(shape) != 2:
        raise Refused(f"'{module}.weight' is quantised and has {len(shape)} dimensions, not 2: {INSTEAD}")
    return shape[0], shape[1]
