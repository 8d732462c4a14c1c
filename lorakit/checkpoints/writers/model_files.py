"""What a model or an adapter in Hugging Face's layout is in: files that many writers share."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorakit.checkpoints.places import Place
from lorakit.checkpoints.whole import shards_of
from lorakit.checkpoints.writers.layout import (
    ADAPTER,
    ADAPTER_CONFIG,
    CHECKPOINT,
    COMPANIONS,
    PICKLED,
    Kind,
    folders,
    plain_files,
)

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Of several the first counts.
MODELS = (INDEXES[0], "model.safetensors", INDEXES[1], "pytorch_model.bin", "pytorch_model_fsdp.bin")
CONFIGS = ("config.json", "generation_config.json")
_SHARD = re.compile(r"(model|pytorch_model)-\d{5}-of-\d{5}\.(safetensors|bin)")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """`names` are there, `missing` are not; `companions` are those that a tokenizer and a config consist of."""

    kind: Kind | None = None
    names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    refusal: str | None = None


def model_files(place: Place) -> ModelFiles:
    """An adapter where there is one, else a model. Raises OSError."""
    files = plain_files(place)
    companions = tuple(name for name in files if name in CONFIGS or COMPANIONS.fullmatch(name))
    if ADAPTER in files or ADAPTER_CONFIG in files:
        return _adapter(place, companions)
    model = next((name for name in MODELS if name in files), None)
    if model is None:
        return _without_index(tuple(files), companions)
    names = (model, *shards_of(place, model)) if model in INDEXES else (model,)
    needed = (*names, *(() if "fsdp" in model else ("config.json",)))
    missing = tuple(name for name in needed if name not in files)
    return ModelFiles("regular", tuple(name for name in names if name in files), missing, companions)


def _adapter(place: Place, companions: tuple[str, ...]) -> ModelFiles:
    files = plain_files(place)
    missing = tuple(name for name in (ADAPTER, ADAPTER_CONFIG) if name not in files)
    pickle = next((name for name in PICKLED if name in files), None)
    refusal = None
    if ADAPTER in missing and pickle:
        refusal = (
            f"{pickle} is a pickle, and none is opened here: save the adapter as safetensors (save_safetensors=True)"
        )
        missing = ()
    names = [name for name in (ADAPTER, ADAPTER_CONFIG, *((pickle,) if refusal and pickle else ())) if name in files]
    if CHECKPOINT.fullmatch(place.name):  # what is in a run's own root are other checkpoints
        names += _further_adapters(place)
    return ModelFiles("adapter", tuple(names), missing, companions, refusal)


def _further_adapters(place: Place) -> list[str]:
    """PEFT puts each but the first of a model's adapters into a folder of its name."""
    found = []
    for folder in folders(place):
        inner = place.inside(folder).entries
        found += [f"{folder}/{name}" for name in (ADAPTER, ADAPTER_CONFIG) if ADAPTER_CONFIG in inner and name in inner]
    return found


def _without_index(files: tuple[str, ...], companions: tuple[str, ...]) -> ModelFiles:
    shards = tuple(sorted(name for name in files if _SHARD.fullmatch(name)))
    if not shards:
        return ModelFiles(companions=companions)
    index = INDEXES[0] if shards[0].endswith(".safetensors") else INDEXES[1]
    return ModelFiles("regular", shards, (index,), companions)
