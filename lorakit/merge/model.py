"""The base as its adapters see it: layers that they repeat stand there as often, and a tied head by its own name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lorakit.adapters.adapter import Adapter
from lorakit.errors import InvalidFile, Refused, UnsupportedAdapter, UsageError
from lorakit.files.safetensors import DTYPE_BITS, StoredTensor
from lorakit.files.tensors import same_bytes
from lorakit.merge.base import BaseModel
from lorakit.merge.layers import CONV1D_MODELS, HEAD_NAMES, HEADS, input_embedding, is_tied, layer_of
from lorakit.merge.plan import DTYPES

if TYPE_CHECKING:
    from lorakit.merge.quantised import QuantisedWeight, Quantiser

_LAYER = re.compile(r"^(?P<before>(?:.*\.)?(?:layers|layer|h|blocks)\.)(?P<number>\d+)(?P<after>\..*)$")


@dataclass(slots=True)
class Model:
    """`tensors` by their names in the result, each with what the base has for it; `config` are changes of its config.

    A tied base has one weight for two names: `embedding` and `head`. The head is in `tensors` too, whether or not it
    is stored: an adapter may change one of the two alone.
    """

    base: BaseModel
    tensors: dict[str, StoredTensor]
    config: dict[str, Any] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    notes: list[str] = field(default_factory=list)
    quantised: dict[str, QuantisedWeight] = field(default_factory=dict)
    onto: str | None = None


ONTO = ("original", "dequantised", "same")


def model_for(base: BaseModel, adapters: Sequence[Adapter], *, onto: str | None = None) -> Model:
    """The base, with its layers repeated as the adapters' `layer_replication` says. Of a quantised base, each weight
    stands under its own name, rather than the tensors that hold it.

    Raises:
        UnsupportedAdapter: the adapters repeat layers differently.
        InvalidFile: they name layers that the base hasn't.
    """
    model = Model(base, dict(base.tensors), onto=onto)
    _see_through_quantisation(model)
    _repeat_layers(model, adapters)
    if is_tied(base):
        _name_both_sides(model)
    return model


def _see_through_quantisation(model: Model) -> None:
    base, onto = model.base, model.onto
    if onto is not None and onto not in ONTO:
        raise UsageError(f"there is no way to merge onto '{onto}': name one of {', '.join(ONTO)}")
    if onto == "original" and base.quantised:
        raise Refused(
            f"base '{base.reference}' is quantised (by {base.quantised}): name the original, in 16 bit, with --base"
        )
    if not base.quantised:
        if onto == "dequantised":
            raise Refused(f"base '{base.reference}' isn't quantised: name the quantised one with --base")
        return
    from lorakit.merge.quantised import activation_scales, quantised_weights

    model.quantised = quantised_weights(base.config, base.tensors)
    if model.quantised and base.model_type in CONV1D_MODELS:
        raise Refused(
            f"base '{base.reference}' is a quantised {base.model_type}, whose weights are (in, out): merge "
            f"onto the model before it was quantised"
        )
    parts = {part.name for weight in model.quantised.values() for part in weight.parts.values()}
    seen = {name: stored for name, stored in model.tensors.items() if name not in parts}
    for name, weight in model.quantised.items():
        first = next(iter(weight.parts.values()))
        size = weight.shape[0] * weight.shape[1] * DTYPE_BITS[weight.dtype] // 8
        seen[name] = StoredTensor(name, first.file, weight.dtype, weight.shape, first.start, first.start + size)
    if onto == "dequantised":
        useless = activation_scales(seen)
        for name in useless:
            del seen[name]
        if useless:
            model.notes.append(f"{len(useless)} scales of the quantised model are left out, {useless[0]} the first")
    model.tensors = seen


def changed_config(model: Model, dtype: str, quantiser: Quantiser | None) -> dict[str, Any] | None:
    """The result's config; None where it is the base's own."""
    config = {**model.base.config, **model.config}
    if model.quantised and model.onto == "dequantised":
        from lorakit.merge.quantised import dequantised_config

        written = DTYPES.get(dtype) or next(iter(model.quantised.values())).dtype
        config = dequantised_config(config, written)
    if quantiser is not None:
        config["quantization_config"] = quantiser.config_section()
    return None if config == model.base.config else config


def _name_both_sides(model: Model) -> None:
    embedding = input_embedding(model.base)
    if embedding is None:
        return
    stored = next((name for name in model.tensors if layer_of(name) in HEADS and name.endswith(".weight")), None)
    if stored is not None and not same_bytes(embedding, model.tensors[stored]):
        return  # transformers takes two stored weights that differ for two
    old_wrapper = embedding.name.startswith("language_model.model.")
    model.embedding = embedding.name
    usual = "language_model.lm_head.weight" if old_wrapper else "lm_head.weight"
    model.head = stored or HEAD_NAMES.get(model.base.model_type, usual)
    model.tensors[model.head] = model.tensors[embedding.name]


def _repeat_layers(model: Model, adapters: Sequence[Adapter]) -> None:
    wanted = {
        str(source.config.raw.get("layer_replication")): source.config.raw.get("layer_replication")
        for adapter in adapters
        for source in adapter.files()
    }
    if not any(wanted.values()):
        return
    if len(wanted) > 1:
        raise UnsupportedAdapter("the adapters repeat layers differently (layer_replication): merge them one by one")
    ranges = next(iter(wanted.values()))
    numbers = _numbers(ranges)
    names: dict[str, StoredTensor] = {}
    prefixes = {match["before"] for name in model.tensors if (match := _LAYER.match(name))}
    if len(prefixes) != 1:
        raise UnsupportedAdapter(
            f"layer_replication needs a base with one list of layers, and this one has {len(prefixes)}: "
            f"{', '.join(sorted(prefixes))}"
        )
    (before,) = prefixes
    there = {int(match["number"]) for name in model.tensors if (match := _LAYER.match(name))}
    missing = sorted(set(numbers) - there)
    if missing:
        raise InvalidFile(f"layer_replication names layer {missing[0]}, and the base has {len(there)} layers")
    copies: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        copies.setdefault(number, []).append(place)
    for name, stored in model.tensors.items():
        match = _LAYER.match(name)
        if match is None:
            names[name] = stored
        else:
            for place in copies.get(int(match["number"]), []):
                names[f"{before}{place}{match['after']}"] = stored
    model.tensors = names
    model.config |= _repeated_config(model.base.config, len(there), numbers)
    model.notes.append(f"layers are repeated ({ranges}): {len(there)} become {len(numbers)}")


def _numbers(ranges: Any) -> list[int]:
    try:
        numbers = [number for begin, end in ranges for number in range(begin, end)]
    except (TypeError, ValueError):
        raise InvalidFile(f"layer_replication is {ranges!r}, and has to be a list of [begin, end]") from None
    if not numbers:
        raise InvalidFile(f"layer_replication {ranges!r} leaves no layer")
    return numbers


def _repeated_config(config: Any, count: int, numbers: Sequence[int]) -> dict[str, Any]:
    """Each number of layers, and each list with an entry a layer, for the new number; nested parts as a whole."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer", "num_layers") and value == count:
            changed[key] = len(numbers)
        elif key in ("layer_types", "mlp_layer_types") and isinstance(value, list) and len(value) == count:
            changed[key] = [value[number] for number in numbers]
        elif isinstance(value, dict) and (inner := _repeated_config(value, count, numbers)):
            changed[key] = {**value, **inner}
    return changed
