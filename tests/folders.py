"""Model and adapter folders made of numbers alone, for tests that need neither torch nor a model class."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

HIDDEN, INNER, VOCABULARY = 8, 12, 16
LINEARS = {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def base_tensors(layers: int = 2, dtype: str = "float32") -> dict[str, np.ndarray[Any, Any]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes[f"model.layers.{layer}.norm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    chance = np.random.default_rng(0)
    return {name: chance.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write_base(folder: Path, tensors: Mapping[str, Any] | None = None, *, shards: int = 1, **config: Any) -> Path:
    """A base in Hugging Face layout; with several shards, an index too."""
    folder.mkdir(parents=True)
    tensors = base_tensors() if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def factors(modules: Mapping[str, tuple[int, int]], rank: int = 2, seed: int = 1) -> dict[str, Any]:
    chance = np.random.default_rng(seed)
    named = {}
    for module, (out, into) in modules.items():
        named[f"base_model.model.{module}.lora_A.weight"] = chance.standard_normal((rank, into)).astype("float32")
        named[f"base_model.model.{module}.lora_B.weight"] = chance.standard_normal((out, rank)).astype("float32")
    return named


def linear_modules(layers: int = 2) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in LINEARS.items()}


def write_adapter(folder: Path, tensors: Mapping[str, Any] | None = None, *, rank: int = 2, **config: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = factors(linear_modules(), rank) if tensors is None else tensors
    modules = sorted({match[1] for name in tensors if (match := re.match(r"base_model\.model\.(.+)\.lora_A", name))})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM", **config}))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def stored(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor of a model or adapter folder, as another library reads it."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def leftovers(parent: Path) -> list[str]:
    """What an unfinished writer would leave: hidden folders beside its target."""
    return sorted(path.name for path in parent.iterdir() if ".tmp-" in path.name)
