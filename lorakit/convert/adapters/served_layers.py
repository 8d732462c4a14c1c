"""On which layers of which models vLLM takes an adapter, where that is not simply every linear one.

As vLLM 0.32 has it; a test reads the same from its source. Of an architecture that stands nowhere here nothing is
known, and nothing is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorakit.adapters.delta import Delta
from lorakit.convert.answers import MERGE, Check
from lorakit.merge.layers import HEADS, layer_of

# Their classes list no embedding and no head among the layers that adapters may change (`embedding_modules`).
WITHOUT_EMBEDDINGS = frozenset({
    "AXK1ForCausalLM", "AfmoeForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM",
    "ChatGLMForConditionalGeneration", "ChatGLMModel", "DeepseekForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM", "Ernie4_5_MoeForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma4ForCausalLM",
    "GemmaForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM",
    "GptOssForCausalLM", "HYV3ForCausalLM", "InternLM2ForCausalLM", "LagunaForCausalLM", "LongcatFlashForCausalLM",
    "LongcatFlashNgramForCausalLM", "MiMoForCausalLM", "MiniMaxM2ForCausalLM", "Ministral3ForCausalLM",
    "MistralForCausalLM", "MistralLarge3ForCausalLM", "MuseGlimmerForCausalLM", "OPTForCausalLM",
    "OlmoHybridForCausalLM", "OlmoeForCausalLM", "PanguEmbeddedForCausalLM", "PanguProMoEV2ForCausalLM",
    "PanguUltraMoEForCausalLM", "Plamo3ForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3NextForCausalLM",
    "Rnj1ForCausalLM", "SarvamMLAForCausalLM", "SarvamMoEForCausalLM",
})  # fmt: skip

# Their classes take no adapter at all.
WITHOUT_ADAPTERS = frozenset({
    "BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM", "BloomForCausalLM", "Cohere2MoeForCausalLM",
    "DbrxForCausalLM", "DeepseekV32ForCausalLM", "FalconForCausalLM", "FalconMambaForCausalLM", "GPT2LMHeadModel",
    "GPTJForCausalLM", "Gemma3nForCausalLM", "HCXVisionV2ForCausalLM", "HrmTextForCausalLM",
    "IQuestLoopCoderForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "MiMoV2FlashForCausalLM",
    "MiMoV2ForCausalLM", "OrionForCausalLM", "StableLmForCausalLM", "Step1ForCausalLM", "Step3TextForCausalLM",
    "Step3p5ForCausalLM", "Zamba2ForCausalLM",
})  # fmt: skip

WITHOUT_HEAD = frozenset({"Cohere2ForCausalLM", "CohereForCausalLM"})

# Of these it wants the factors of all experts of a layer in one tensor, of the others each expert's own.
STACKED_EXPERTS = frozenset({
    "GptOssForCausalLM", "InternS1ProForConditionalGeneration", "InternS2MobiusForConditionalGeneration",
    "InternS2PreviewForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
})  # fmt: skip

LARGEST_VOCABULARY = 258_048  # with which it starts where an adapter may change the head

_TOWERS = re.compile(
    r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|audio_tower|audio_encoder|speech_encoder|"
    r"multi_modal_projector|embed_vision|embed_audio|connector|merger)\."
)


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The first that the config names, as vLLM takes it."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else None


def not_served(deltas: Mapping[str, Delta], config: Mapping[str, Any]) -> Iterable[Check]:
    """What of these modules vLLM refuses, or leaves out in silence, in a model of that config."""
    name = architecture_of(config)
    if name in WITHOUT_ADAPTERS:
        yield Check("features", False, f"vLLM takes no adapter of a {name}", MERGE)
        return
    for module, delta in deltas.items():
        is_head = layer_of(module) in HEADS
        is_table = is_head or delta.kind == "embedding"
        if (is_table and name in WITHOUT_EMBEDDINGS) or (is_head and name in WITHOUT_HEAD):
            yield Check("features", False, f"vLLM takes no adapter on '{module}' of a {name}", MERGE)
            break
    if any(layer_of(module) in HEADS and delta.shape[0] > LARGEST_VOCABULARY for module, delta in deltas.items()):
        reason = f"vLLM takes no adapter on a head of more than {LARGEST_VOCABULARY} tokens"
        yield Check("features", False, reason, MERGE)
    towers = [module for module in deltas if _TOWERS.search(module)] if _has_towers(config) else []
    if towers:
        reason = f"'{towers[0]}' is no part of the language model, and vLLM leaves such out in silence"
        yield Check("features", False, reason, MERGE)
    if name in STACKED_EXPERTS and any(".experts." in module for module in deltas):
        reason = f"of a {name} vLLM takes the factors of all experts of a layer as one tensor alone"
        yield Check("features", False, reason, MERGE)


def _has_towers(config: Mapping[str, Any]) -> bool:
    return any(isinstance(config.get(part), dict) for part in ("vision_config", "audio_config"))
