"""The functions of compressed-tensors that are used here; it is an extra, and imports torch and transformers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

from lorakit.errors import InvalidFile, Refused

_PLACES = {
    "compressors": ("BaseCompressor",),
    "compressors.pack_quantized.helpers": ("pack_to_int32", "unpack_from_int32"),
    "quantization": ("QuantizationArgs", "QuantizationConfig"),
    "quantization.lifecycle.forward": ("quantize", "dequantize"),
    "quantization.quant_scheme": ("preset_name_to_scheme",),
    "quantization.utils": ("calculate_qparams",),
}


@cache
def compressed_tensors() -> SimpleNamespace:
    """Raises Refused when it isn't installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it imports parts of torch that torch has given up
        try:
            found = import_module("compressed_tensors")
        except ModuleNotFoundError as error:
            raise Refused(f"this needs compressed-tensors ({error}): pip install 'lorakit[quantize]'") from None
        modules = {place: import_module(f"compressed_tensors.{place}") for place in _PLACES}
    parts = {name: getattr(modules[place], name) for place, names in _PLACES.items() for name in names}
    return SimpleNamespace(version=found.__version__, **parts)


def library_arguments(arguments: Mapping[str, Any]) -> Any:
    """The `weights` section of a config group as a QuantizationArgs.

    Raises:
        Refused: compressed-tensors isn't installed.
        InvalidFile: it does not take what stands there.
    """
    try:
        return compressed_tensors().QuantizationArgs.model_validate(dict(arguments))
    except ValueError as error:
        raise InvalidFile(
            f"the config's quantization_config has weights that compressed-tensors does not take: {error}"
        ) from None
