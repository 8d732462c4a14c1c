"""Open an adapter in PEFT layout: its config and its header are read, no tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import AdapterConfig, read_config
from lorakit.adapters.delta import Delta, Kind, Term
from lorakit.adapters.keys import FACTORS, Key, parse_key
from lorakit.adapters.source import Source
from lorakit.adapters.trained import Blend
from lorakit.errors import Incomplete, InvalidFile, NotFound
from lorakit.files.folders import file_state
from lorakit.files.safetensors import StoredTensor, read_header

WEIGHTS = "adapter_model.safetensors"
UNFINISHED = "checkpoint-is-incomplete.txt"  # transformers' sentinel while a checkpoint is written on SIGTERM


def load_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Open an adapter in PEFT layout: reads its config and its header, no tensor.

    Raises:
        NotFound: there is no such folder.
        Incomplete: it is still being written.
        InvalidFile: a file in it is missing, cut short, or contradicts another.
    """
    path = Path(folder)
    if not path.is_dir():
        raise NotFound(f"there is no adapter folder '{path}'")
    if (path / UNFINISHED).exists():
        raise Incomplete(f"'{path}' is still being written: it holds {UNFINISHED}")
    config = read_config(path)
    file = (path / WEIGHTS).resolve()
    if not file.is_file():
        pickled = next((name for name in ("adapter_model.bin", "adapter_model.pt") if (path / name).is_file()), None)
        if pickled:
            raise InvalidFile(f"'{path}' holds {pickled}, a pickle: save the adapter as safetensors")
        raise InvalidFile(f"'{path}' has an adapter_config.json, but no {WEIGHTS}: it is incomplete")
    state = file_state(file)
    header = read_header(file)
    source = Source(path.resolve(), config, file, state)
    deltas, others = deltas_of(header.tensors.values(), config, path)
    if not deltas and not others:
        raise InvalidFile(f"'{path / WEIGHTS}' holds no tensor")
    biases, others = _biases_of(deltas, others, config)
    return Adapter(deltas, (source,), others, config, biases)


def _biases_of(
    deltas: Mapping[str, Delta], others: tuple[StoredTensor, ...], config: AdapterConfig
) -> tuple[dict[str, Blend], tuple[StoredTensor, ...]]:
    """`lora_bias`: scale · (the bias of lora_B) is added to the module's own; and the tensors that are none."""
    biases: dict[str, Blend] = {}
    rest: list[StoredTensor] = []
    for stored in others:
        key = parse_key(stored.name)
        if key.part == "lora_B_bias" and key.module in deltas and config.peft_type == "LORA":
            biases[key.module] = Blend(((stored, config.scale_of(key.module)),))
        else:
            rest.append(stored)
    return biases, tuple(rest)


def deltas_of(tensors: Any, config: AdapterConfig, folder: Path) -> tuple[dict[str, Delta], tuple[StoredTensor, ...]]:
    """Pair the factors: deltas by module, and all that is no factor."""
    factors: dict[str, dict[str, StoredTensor]] = {}
    others: list[StoredTensor] = []
    adapters: set[str] = set()
    for stored in tensors:
        key: Key = parse_key(stored.name)
        if key.part not in FACTORS or not _is_plain_factor(stored, key, config):
            others.append(stored)
            continue
        if key.adapter:
            adapters.add(key.adapter)
        parts = factors.setdefault(key.module, {})
        if key.part in parts:
            raise InvalidFile(f"'{folder}': '{stored.name}' and '{parts[key.part].name}' name the same factor")
        parts[key.part] = stored
    if len(adapters) > 1:
        raise InvalidFile(f"'{folder}' holds several adapters in one file ({', '.join(sorted(adapters))}): split them")
    deltas = {module: _delta(module, parts, config, folder) for module, parts in factors.items()}
    return deltas, tuple(others)


def _is_plain_factor(stored: StoredTensor, key: Key, config: AdapterConfig) -> bool:
    """Not the factors of a convolution, nor of all experts of a layer at once (PEFT's `target_parameters`)."""
    if len(stored.shape) != 2 or config.peft_type != "LORA":
        return False
    if not (config.raw.get("target_parameters") or key.module.removesuffix(".base_layer").endswith(".experts")):
        return True
    rank = stored.shape[0] if key.part == "lora_A" else stored.shape[1]
    return rank == config.rank_of(key.module)


def _delta(module: str, parts: Mapping[str, StoredTensor], config: AdapterConfig, folder: Path) -> Delta:
    kind: Kind = "embedding" if any(part.startswith("lora_embedding") for part in parts) else "linear"
    prefix = "lora_embedding_" if kind == "embedding" else "lora_"
    try:
        a, b = parts[prefix + "A"], parts[prefix + "B"]
    except KeyError as error:
        raise InvalidFile(f"'{folder}': '{module}' has no {error.args[0]}") from None
    if a.shape[0] != b.shape[1]:
        raise InvalidFile(f"'{folder}': the factors of '{module}' don't fit: B {list(b.shape)}, A {list(a.shape)}")
    if a.shape[0] != config.rank_of(module):
        raise InvalidFile(
            f"'{folder}': '{module}' has rank {a.shape[0]}, but its config says {config.rank_of(module)}: "
            f"the scale can't be known"
        )
    return Delta((Term(b, a, config.scale_of(module)),), kind)
