"""Tiny models and adapters made by transformers and PEFT, and PEFT's own merge: the oracle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, logging

logging.disable_progress_bar()

# Odd on purpose: no side is a multiple of a block or of a vector register.
ODD = {"vocab_size": 101, "hidden_size": 96, "intermediate_size": 301, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**ODD, **HEADS, tie_word_embeddings=False),
    "tied-llama": LlamaConfig(**ODD, **HEADS, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**ODD, **HEADS, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=101, n_embd=60, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1),
}
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
LINEARS["qwen2"] = LINEARS["tied-llama"] = LINEARS["llama"]


def make_base(folder: Path, family: str = "llama", dtype: str = "float32", *, max_shard_size: str = "1GB") -> Path:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[family])  # which a model writes its dtype into
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_adapter(folder: Path, base: Path, *, seed: int = 1, dtype: str = "float32", **lora: Any) -> Path:
    """An adapter as PEFT saves it, with factors that are far from zero."""
    torch.manual_seed(seed)
    model = load(base)
    settings = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    if dtype != "float32":
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def load(folder: Path, dtype: str = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def merged_by_peft(base: Path, adapters: Sequence[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    """What PEFT makes of it: one adapter in the base's dtype; several in float32, and rounded once at the end."""
    stored = load(base)
    dtype = stored.dtype
    model = stored if len(adapters) == 1 else stored.float()
    for folder, weight in adapters:
        model = PeftModel.from_pretrained(model, folder)
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= weight
        model = model.merge_and_unload()
    return dict(model.to(dtype).state_dict())


def bits(folder: Path) -> dict[str, torch.Tensor]:
    """The model's weights as transformers loads them from disk."""
    return dict(load(folder).state_dict())


def assert_same_bits(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if mine[name].dtype != theirs[name].dtype]
    different += [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different
