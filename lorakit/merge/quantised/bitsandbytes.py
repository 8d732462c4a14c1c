"""Weights that bitsandbytes quantised, by what it stores beside them; the config can leave out what was skipped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.errors import InvalidFile, Refused
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.quantised.bnb4 import Bnb4, parse_state
from lorakit.merge.quantised.bnb8 import Bnb8
from lorakit.merge.quantised.finding import INSTEAD, Tensors, bytes_of, modules_with, parts_of, two_sizes, weight_of
from lorakit.merge.quantised.weight import QuantisedWeight

_ROW_MAJOR = 0  # the weight_format; the others are tiles of a GPU's kernels


def find_bitsandbytes(
    method: str, settings: Mapping[str, Any], tensors: Tensors, dtype: str
) -> dict[str, QuantisedWeight]:
    found = {}
    for name in tensors:
        module, mark, kind = name.partition(".weight.quant_state.bitsandbytes__")
        if mark:
            scheme = _bnb4_state(tensors[name], kind)
            nested = ("nested_absmax", "nested_quant_map") if scheme.nested_block else ()
            roles = {"weight": "weight", "quant_state": f"weight.quant_state.bitsandbytes__{kind}"}
            roles |= {role: f"weight.{role}" for role in ("absmax", "quant_map", *nested)}
            stored = parts_of(module, tensors, list(roles.values()))
            parts = {role: stored[ending] for role, ending in roles.items()}
            weight = weight_of(module, scheme, scheme.shape, dtype, parts)
            blocks = -(-scheme.shape[0] * scheme.shape[1] // scheme.block)
            if parts["weight"].nbytes != -(-scheme.shape[0] * scheme.shape[1] // 2) or parts["absmax"].shape != (
                blocks,
            ):
                raise InvalidFile(f"'{weight.name}' and its quant_state contradict each other: {list(scheme.shape)}")
            found[weight.name] = weight
    for module in modules_with(tensors, "SCB"):
        parts = parts_of(module, tensors, ("weight", "SCB"), ("weight_format",))
        layout = bytes_of(parts["weight_format"]) if "weight_format" in parts else bytes([_ROW_MAJOR])
        if parts["weight"].dtype != "I8" or layout[:1] != bytes([_ROW_MAJOR]):
            raise Refused(f"'{module}.weight' is stored in the order of a GPU's kernel, not by rows: {INSTEAD}")
        found[f"{module}.weight"] = weight_of(module, Bnb8(), two_sizes(parts["weight"].shape, module), dtype, parts)
    return found


def _bnb4_state(stored: StoredTensor, kind: str) -> Bnb4:
    try:
        scheme = parse_state(bytes_of(stored))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidFile(f"'{stored.name}' is no state that bitsandbytes writes: {error!r}") from None
    if scheme.kind != kind or kind not in ("nf4", "fp4"):
        raise Refused(f"'{stored.name}' is of the kind {scheme.kind!r}, which can't be read here: {INSTEAD}")
    return scheme
