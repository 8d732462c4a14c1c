"""What a model's config says of its quantisation, and the config of a model that is quantised no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.errors import InvalidFile

# What tools write beside a quantised model, and what says nothing true of a dequantised one.
LEFT_BEHIND = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quant_log.csv", "recipe.yaml")

_SECTIONS = ("quantization_config", "compression_config")  # the second by compressed-tensors before 0.6
_PARTS = ("text_config", "llm_config", "language_config")  # where a model of several kinds describes its decoder

_DTYPES = {"bfloat16": "BF16", "float16": "F16", "half": "F16", "float32": "F32", "float": "F32", "float64": "F64"}
_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def quantisation_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that says how the weights are quantised.

    Raises:
        InvalidFile: it is no JSON object.
    """
    for part in _parts(config):
        for section in _SECTIONS:
            settings = part.get(section)
            if settings is None or settings == {}:
                continue
            if not isinstance(settings, Mapping):
                raise InvalidFile(f"the config's {section} is no JSON object, but {settings!r}")
            return settings
    return None


def logical_dtype(config: Mapping[str, Any]) -> str | None:
    """The safetensors name of the dtype that the model computes in, if the config tells."""
    for part in _parts(config):
        for key in ("dtype", "torch_dtype"):
            name = part.get(key)
            if isinstance(name, str) and name.removeprefix("torch.") in _DTYPES:
                return _DTYPES[name.removeprefix("torch.")]
    return None


def dequantised_config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config of the same model with its weights in `dtype` (of safetensors: "BF16")."""
    plain = {key: value for key, value in config.items() if key not in _SECTIONS}
    for part in _PARTS:
        if isinstance(plain.get(part), Mapping):
            plain[part] = {key: value for key, value in plain[part].items() if key not in _SECTIONS}
            _set_dtype(plain[part], dtype, always=False)
    _set_dtype(plain, dtype, always=True)
    return plain


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config, *(part for name in _PARTS if isinstance(part := config.get(name), Mapping))]


def _set_dtype(config: dict[str, Any], dtype: str, *, always: bool) -> None:
    """Under the name it has there: `torch_dtype` before transformers 4.56, `dtype` since."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    for key in keys or (["dtype"] if always else []):
        config[key] = _NAMES[dtype]
