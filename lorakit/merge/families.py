"""What model classes and their checkpoints call the same thing. Only data: `resolve` and `experts` read it.

From transformers' `conversion_mapping.py` (5.19), which renames at load what is stored under older names, and from
what earlier versions of the same classes called their modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Rename(NamedTuple):
    """Two spellings of a part of a path, where the path also has `within` in it."""

    one: str
    other: str
    within: str = ""


RENAMES = (
    Rename(".mlp.router.", ".block_sparse_moe.gate."),  # Phi-MoE
    Rename(".mlp.", ".block_sparse_moe."),  # Mixtral, Phi-MoE, MiniMax, Kimi Linear
    Rename(".gate_proj.", ".w1.", ".experts."),
    Rename(".up_proj.", ".w3.", ".experts."),
    Rename(".down_proj.", ".w2.", ".experts."),
    Rename(".experts.gate_up_proj", ".input_linear.weight", ".block_sparse_moe."),  # Granite MoE
    Rename(".experts.down_proj", ".output_linear.weight", ".block_sparse_moe."),
    Rename(".router.weight", ".router.layer.weight", ".block_sparse_moe."),
    Rename(".mlp.experts.gate_up_proj", ".mlp.experts.fc1.weight"),  # Aria
    Rename(".mlp.experts.down_proj", ".mlp.experts.fc2.weight"),
    Rename(".mlp.experts.gate_proj", ".moe.gate_proj.weight"),  # Step 3
    Rename(".mlp.experts.up_proj", ".moe.up_proj.weight"),
    Rename(".mlp.experts.down_proj", ".moe.down_proj.weight"),
    Rename(".mlp.gate.", ".moe.gate."),
    Rename(".mlp.shared_experts.", ".share_expert."),
    Rename(".mlp.shared_experts.", ".mlp.shared_expert."),  # Laguna
    Rename(".mlp.shared_experts.", ".mlp.shared_mlp."),  # Hunyuan 3
    Rename(".mlp.gate.", ".mlp.router.gate."),
    Rename("lm_head.", "embed_out."),  # GPT-NeoX
    Rename("vision_tower.", "vision_tower.vision_model."),  # SigLIP and CLIP towers
    Rename(".layers.", ".encoder.layer."),  # ViT and its kin
    Rename(".attention.q_proj.", ".attention.attention.query."),
    Rename(".attention.k_proj.", ".attention.attention.key."),
    Rename(".attention.v_proj.", ".attention.attention.value."),
    Rename(".attention.o_proj.", ".attention.output.dense."),
    Rename(".mlp.fc1.", ".intermediate.dense."),
    Rename(".mlp.fc2.", ".output.dense."),
)

# Layers that some classes keep apart and others as one.
TOGETHER: Mapping[tuple[str, ...], tuple[str, ...]] = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "W_pack", "wqkv", "qkv"),
    ("gate_proj", "up_proj"): ("gate_up_proj", "gate_and_up_proj"),
}

# The parameters that hold all experts of a layer, in the order in which every class of transformers has them.
EXPERT_PARAMETERS = ("gate_up_proj", "gate_proj", "w1", "up_proj", "v1", "down_proj", "w2")

# Which layers of one expert stand in such a parameter, from its first row to its last.
EXPERT_PARTS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}

EXPERT_LAYERS: Mapping[str, str] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
