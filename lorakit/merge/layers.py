"""What kind of layer a stored weight belongs to: told by its name, its shape and the model's type; tables as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.files.safetensors import StoredTensor
from lorakit.merge.base import BaseModel

# Model types whose linear layers are transformers' Conv1D, which stores (in, out); PEFT goes by the same class.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
CONV1D_LAYERS = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})

HEADS = frozenset({"lm_head", "embed_out"})
HEAD_NAMES = {"whisper": "proj_out.weight"}  # where a tied head, which no file holds, is not called lm_head
EMBEDDINGS = frozenset({"embed_tokens", "embed_in", "wte", "word_embeddings", "tok_embeddings"})


def layer_of(path: str) -> str:
    """The last part of a module's path, or of its weight's name."""
    return path.removesuffix(".weight").rsplit(".", 1)[-1]


def is_transposed(name: str, base: BaseModel) -> bool:
    """Whether the base stores this weight as (in, out)."""
    return base.model_type in CONV1D_MODELS and layer_of(name) in CONV1D_LAYERS


def is_tied(base: BaseModel) -> bool:
    """Whether the base's output head is its embedding: its config says so, or no head is stored."""
    settings = [base.config, *(value for value in base.config.values() if isinstance(value, dict))]
    said = any(part.get("tie_word_embeddings") is True for part in settings)
    return said or not any(layer_of(name) in HEADS for name in base.tensors)


def vocabulary_sizes(config: Mapping[str, Any]) -> set[int]:
    """What the config, or a part of it, calls `vocab_size`."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    return {part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)}


def input_embedding(base: BaseModel) -> StoredTensor | None:
    """The one stored embedding of the vocabulary; None when there is none, or several."""
    sizes = vocabulary_sizes(base.config)
    found = [
        stored
        for name, stored in base.tensors.items()
        if name.endswith(".weight") and layer_of(name) in EMBEDDINGS and len(stored.shape) == 2
    ]
    rows = [stored for stored in found if stored.shape[0] in sizes]
    candidates = rows if len(found) > 1 else found
    return candidates[0] if len(candidates) == 1 else None
