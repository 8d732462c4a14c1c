"""A base of 24 thousand parameters, so small that what is trained of it can be kept beside the programs."""

from __future__ import annotations

from pathlib import Path

SIZES = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}


def make_base(folder: Path) -> Path:
    """A Llama with the tokenizer of the other tests' tiny model: every byte is a token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.server.real import make_tiny_model

    make_tiny_model(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=False))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
