"""What llama.cpp calls the tensors of a model, and how it lays them out: a row for each architecture that is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lorakit.errors import Refused

_OUT, _IN = "blk.{}.", "model.layers.{}."
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    f"{_OUT}attn_{short}.{leaf}": f"{_IN}self_attn.{long}.{leaf}"
    for short, long in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj"))
    for leaf in ("weight", "bias")
}
_HEAD_NORMS = {f"{_OUT}attn_{one}_norm.weight": f"{_IN}self_attn.{one}_norm.weight" for one in ("q", "k")}
_MLP = {
    f"{_OUT}ffn_gate.weight": f"{_IN}mlp.gate_proj.weight",
    f"{_OUT}ffn_up.weight": f"{_IN}mlp.up_proj.weight",
    f"{_OUT}ffn_down.weight": f"{_IN}mlp.down_proj.weight",
}
_TWO_NORMS = {
    f"{_OUT}attn_norm.weight": f"{_IN}input_layernorm.weight",
    f"{_OUT}ffn_norm.weight": f"{_IN}post_attention_layernorm.weight",
}
_FOUR_NORMS = {
    f"{_OUT}attn_norm.weight": f"{_IN}input_layernorm.weight",
    f"{_OUT}post_attention_norm.weight": f"{_IN}post_attention_layernorm.weight",
    f"{_OUT}ffn_norm.weight": f"{_IN}pre_feedforward_layernorm.weight",
    f"{_OUT}post_ffw_norm.weight": f"{_IN}post_feedforward_layernorm.weight",
}
_FUSED = {
    f"{_OUT}attn_qkv.weight": f"{_IN}self_attn.qkv_proj.weight",
    f"{_OUT}attn_output.weight": f"{_IN}self_attn.o_proj.weight",
    f"{_OUT}ffn_up.weight": f"{_IN}mlp.gate_up_proj.weight",
    f"{_OUT}ffn_down.weight": f"{_IN}mlp.down_proj.weight",
}
_LLAMA = {**_OUTSIDE, **_ATTENTION, **_MLP, **_TWO_NORMS}

BUFFERS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


@dataclass(frozen=True, slots=True)
class Layout:
    """transformers' names by llama.cpp's. `alternating`: the rows of q and k stand as Meta has them, the two halves of
    a head in turn. `raised`: 1 was added to the norms, as their layers do.
    """

    names: Mapping[str, str]
    alternating: bool = False
    raised: bool = False

    @property
    def places(self) -> dict[str, str]:
        """llama.cpp's names by transformers'."""
        return {name: place for place, name in self.names.items()}


LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout(_LLAMA, alternating=True),
    "qwen2": Layout(_LLAMA),
    "qwen3": Layout(_LLAMA | _HEAD_NORMS),
    "gemma": Layout(_LLAMA, raised=True),
    "gemma2": Layout({**_OUTSIDE, **_ATTENTION, **_MLP, **_FOUR_NORMS}, raised=True),
    "gemma3": Layout({**_OUTSIDE, **_ATTENTION, **_HEAD_NORMS, **_MLP, **_FOUR_NORMS}, raised=True),
    "phi3": Layout({**_OUTSIDE, **_FUSED, **_TWO_NORMS}),
}
# llama.cpp's architecture by transformers' model_type.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip


def gguf_library() -> Any:
    """The module `gguf`, which is an extra.

    Raises:
        Refused: it isn't installed.
    """
    try:
        return import_module("gguf")
    except ModuleNotFoundError as error:
        raise Refused(f"this needs gguf ({error}): pip install 'lorakit[gguf]'") from None
