"""Which weights of a folder are quantised, how, and by which stored tensors: from its config and its headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lorakit.errors import Refused
from lorakit.merge.quantised.awq import find_awq
from lorakit.merge.quantised.bitsandbytes import find_bitsandbytes
from lorakit.merge.quantised.compressed_config import find_compressed
from lorakit.merge.quantised.config import logical_dtype, quantisation_settings
from lorakit.merge.quantised.finding import INSTEAD, Tensors
from lorakit.merge.quantised.fp8 import find_fp8
from lorakit.merge.quantised.gptq import find_gptq
from lorakit.merge.quantised.weight import QuantisedWeight

Finder = Callable[[str, Mapping[str, Any], Tensors, str], dict[str, QuantisedWeight]]

_CACHES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "prob_output_scale", "prob_scale")
_METHODS: Mapping[str, Finder] = {
    "bitsandbytes": find_bitsandbytes,
    "gptq": find_gptq,
    "awq": find_awq,
    "fp8": find_fp8,
    "fbgemm_fp8": find_fp8,
    "modelopt": find_fp8,
    "compressed-tensors": find_compressed,
}


def quantised_weights(config: Mapping[str, Any], tensors: Tensors) -> dict[str, QuantisedWeight]:
    """Logical name ("….q_proj.weight") -> weight; nothing for a model that is not quantised.

    Raises:
        Refused: quantised by a method, or in a layout, that can't be read here; names it.
        InvalidFile: the config and the tensors contradict each other.
    """
    settings = quantisation_settings(config)
    if settings is None:
        return {}
    method = str(settings.get("quant_method") or _unnamed(settings))
    finder = _METHODS.get(method)
    if finder is None:
        raise Refused(f"the base is quantised by {method}, which can't be read here: {INSTEAD}")
    found = finder(method, settings, tensors, logical_dtype(config) or "BF16")
    taken = {part.name for weight in found.values() for part in weight.parts.values()}
    _refuse_leftovers(method, tensors, taken)
    return found


def activation_scales(tensors: Tensors) -> tuple[str, ...]:
    """Tensors that a dequantised model has no use for, though they are no weight's: scales of the KV cache."""
    return tuple(name for name in tensors if name.rpartition(".")[2] in _CACHES)


def _unnamed(settings: Mapping[str, Any]) -> str:
    """Old configs of bitsandbytes and of modelopt name no method."""
    return "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "an unnamed method"


def _refuse_leftovers(method: str, tensors: Tensors, taken: set[str]) -> None:
    marks = ("absmax", "qweight", "weight_packed", "weight_scale", "weight_scale_inv", "SCB", "scales", "qzeros")
    for name, stored in tensors.items():
        if name in taken:
            continue
        if name.rpartition(".")[2] in marks or stored.dtype.startswith(("F8_", "F4", "F6_")):
            raise Refused(
                f"'{name}' ({stored.dtype} {list(stored.shape)}) belongs to a weight that is quantised in a way that "
                f"{method} does not have here: {INSTEAD}"
            )
