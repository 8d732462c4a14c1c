"""The weights of a checkpoint into the model that is trained: an adapter's, or a whole model's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.reading import WEIGHTS
from lorakit.errors import Refused
from lorakit.files.finite import look_at_numbers
from lorakit.files.folders import read_json
from lorakit.files.safetensors import Header, read_header
from lorakit.training.prepared import NAMES, Into, Loaded, Prepared, more, named

CONFIG = "adapter_config.json"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What changes the values that the same factors stand for.
_SCALING = ("peft_type", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "fan_in_fan_out")


def prepare_model(checkpoint: Path, into: Into) -> Prepared:
    model = into.parts["model"]
    if _is_sharded(model):
        raise Refused(
            "the model is sharded over the ranks (FSDP, DeepSpeed ZeRO 3), and weights are loaded into whole ones "
            f"alone: load '{checkpoint}' before the Trainer is made"
        )
    return _adapter(checkpoint, into) if hasattr(model, "peft_config") else _whole(checkpoint, into)


def _is_sharded(model: Any) -> bool:
    return any(
        hasattr(parameter, "ds_id") or type(parameter).__name__ in ("DTensor", "FlatParameter")
        for parameter in model.parameters()
    ) or any("FullyShardedDataParallel" in type(module).__name__ for module in model.modules())


def _adapter(checkpoint: Path, into: Into) -> Prepared:
    """By PEFT's own `set_peft_model_state_dict`, once every name and shape is known to fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    model = into.parts["model"]
    name = model.active_adapters[0] if hasattr(model, "active_adapters") else model.active_adapter
    folder = checkpoint / name if (checkpoint / name / WEIGHTS).is_file() else checkpoint
    if not (folder / WEIGHTS).is_file():
        raise Refused(
            f"the model is an adapter on a base, and '{checkpoint}' has no {WEIGHTS}: name the checkpoint of an adapter"
        )
    config = _differing_config(folder, model.peft_config[name])
    if config and into.strict:
        raise Refused(f"'{folder}' is not of this training's kind: {config}; strict=False loads it as it is")
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    beside = model.state_dict()  # what PEFT saves of the base besides: embeddings that were resized
    known = {key: tuple(tensor.shape) for key, tensor in {**beside, **own}.items()}
    stored = {key: tensor.shape for key, tensor in _finite(folder / WEIGHTS).tensors.items()}
    fitting, left_out = _fitting(folder, stored, known, own, strict=into.strict)

    def apply() -> None:
        tensors = load_file(folder / WEIGHTS)
        result = set_peft_model_state_dict(model, {**own, **{key: tensors[key] for key in fitting}}, adapter_name=name)
        if result.unexpected_keys:
            raise Refused(f"PEFT could not place {named(result.unexpected_keys)} of '{folder}'")

    words = f"{len(fitting)} tensors of the adapter '{name}'"
    return Prepared(Loaded("model", words, "; ".join(filter(None, (left_out, config)))), apply)


def _differing_config(folder: Path, config: Any) -> str:
    """What would make other values of the same factors, in words."""
    stored = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    mine = json.loads(json.dumps(config.to_dict(), default=str))
    differing = [key for key in _SCALING if key in stored and key in mine and stored[key] != mine[key]]
    if stored.get("r") != mine.get("r"):
        differing.append("r")
    return ", ".join(f"{key} is {stored.get(key)} there and {mine.get(key)} here" for key in differing)


def _whole(checkpoint: Path, into: Into) -> Prepared:
    """Shard by shard: no more than one is held at a time."""
    from safetensors.torch import load_file

    model = into.parts["model"]
    shards = _shards(checkpoint)
    own = model.state_dict()
    stored = {key: tensor.shape for shard in shards for key, tensor in _finite(shard).tensors.items()}
    tied = {own[key].data_ptr() for key in stored if key in own}
    wanted = [key for key, tensor in own.items() if key in stored or tensor.data_ptr() not in tied]
    known = {key: tuple(tensor.shape) for key, tensor in own.items()}
    fitting, left_out = _fitting(checkpoint, stored, known, wanted, strict=into.strict)

    def apply() -> None:
        for shard in shards:
            tensors = {key: tensor for key, tensor in load_file(shard).items() if key in fitting}
            model.load_state_dict(tensors, strict=False)

    return Prepared(Loaded("model", f"{len(fitting)} tensors", left_out), apply)


def _finite(file: Path) -> Header:
    """
    Raises:
        Refused: it is not whole, or holds NaN or infinity.
    """
    header = read_header(file)
    if (name := look_at_numbers(header).not_finite) is not None:
        raise Refused(f"'{file}' holds NaN or infinity, in {name}: name an earlier checkpoint")
    return header


def _shards(checkpoint: Path) -> list[Path]:
    if (checkpoint / MODEL).is_file():
        return [checkpoint / MODEL]
    if not (checkpoint / INDEX).is_file():
        raise Refused(
            f"'{checkpoint}' has neither {MODEL} nor {INDEX}, and the model is a whole one: name a checkpoint of such "
            "a model; an adapter is loaded into a PEFT model, or merged first (lorakit merge)"
        )
    shards = read_json(checkpoint / INDEX).get("weight_map")
    if not (isinstance(shards, dict) and all(isinstance(name, str) for name in shards.values())):
        raise Refused(f"'{checkpoint / INDEX}' has no weight_map")
    names = sorted(set(shards.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise Refused(f"'{checkpoint / INDEX}' names a file outside of its folder: '{outside[0]}'")
    return [checkpoint / name for name in names]


def _fitting(
    source: Path,
    stored: Mapping[str, tuple[int, ...]],
    known: Mapping[str, tuple[int, ...]],
    wanted: Iterable[str],
    *,
    strict: bool,
) -> tuple[set[str], str]:
    """The stored tensors that have a place of their shape, and in words what does not fit.

    Raises:
        Refused: something does not fit, and has to.
    """
    unplaced = [key for key in stored if key not in known]
    differing = [key for key in stored if key in known and tuple(stored[key]) != known[key]]
    missing = [key for key in wanted if key not in stored]
    words = []
    if unplaced:
        words.append(f"no place for {named(unplaced)}")
    if differing:
        shapes = (f"{key} is {list(stored[key])} there and {list(known[key])} here" for key in differing[:NAMES])
        words.append(f"other shapes: {', '.join(shapes)}{more(differing)}")
    if missing:
        words.append(f"not in the checkpoint: {named(missing)}")
    if words and strict:
        raise Refused(f"'{source}' does not fit this model: {'; '.join(words)}. strict=False loads what fits")
    return set(stored) - set(unplaced) - set(differing), "; ".join(words)
