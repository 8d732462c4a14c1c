"""The names of tensors in an adapter file, in every spelling that PEFT has written.

`base_model.model.<module>.lora_A.weight` is today's; raw state dicts keep the adapter's name
(`…lora_A.default.weight`), embeddings have `lora_embedding_A` without `.weight`, some writers leave the prefix out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal[
    "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_B_bias", "token_rows",
    "other",
]  # fmt: skip
FACTORS: frozenset[Part] = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"})

_FACTOR = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<leaf>\.weight)?$"
)
_MAGNITUDE = re.compile(r"^(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)(?P<adapter>[^.]+))?(?:\.weight)?$")
_LORA_BIAS = re.compile(r"^(?P<module>.+)\.lora_B(?:\.(?!bias$)(?P<adapter>[^.]+))?\.bias$")
_TOKEN_ROWS = re.compile(r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?$")
_OTHERS: tuple[tuple[re.Pattern[str], Part], ...] = (
    (_MAGNITUDE, "lora_magnitude_vector"),
    (_LORA_BIAS, "lora_B_bias"),
    (_TOKEN_ROWS, "token_rows"),
)
_PREFIX = "base_model.model."
# What PEFT puts between a module's path and its own tensors.
_TABLE = re.compile(
    r"(?:^|\.)(?:embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|shared|lm_head|embed_out|proj_out|output_layer|"
    r"predictions\.decoder)\.(?:weight|bias)$"
)
_WRAPPING = re.compile(r"\.(?:base_layer|modules_to_save(?:\.(?!weight$|bias$)[^.]+)?)(?=\.)")


# What a path may begin with, longest first, and what may stand there on disk in its place. Multimodal models had
# `language_model.model.`, and have `model.language_model.` since transformers 4.52; towers (`visual.`, `vision_tower.`,
# `multi_modal_projector.`) moved below `model.` then, which is the empty prefix against `model.`.
PREFIXES = (
    "model.language_model.model.",
    "model.language_model.",
    "language_model.model.",
    "model.text_model.",
    "text_model.model.",
    "thinker.model.",
    "base_model.model.",
    "model.model.",
    "model.llm.",
    "llm.model.",
    "_orig_mod.",
    "language_model.",
    "text_model.",
    "transformer.",
    "thinker.",
    "module.",
    "model.",
    "",
)

# What torch.compile, FSDP and activation checkpointing put into paths; DDP puts `module.` before them.
WRAPPERS = ("base_model.model.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor's name, taken apart: `module` is the path inside the base model."""

    name: str
    module: str
    part: Part
    adapter: str | None = None


def unwrapped(path: str) -> str:
    """A module's path without the wrappers that it was trained in."""
    for wrapper in WRAPPERS:
        path = path.replace(wrapper, "")
    while path.startswith("module."):
        path = path.removeprefix("module.")
    return path


def parse_key(name: str) -> Key:
    """Take a tensor's name apart; a trained bias or a whole module, and what is unknown, has the part `other`."""
    path = unwrapped(name)
    match = _FACTOR.match(path)
    if match is None or (match["part"] in ("lora_A", "lora_B")) != (match["leaf"] is not None):
        for pattern, kind in _OTHERS:
            if found := pattern.match(path):
                return Key(name, found["module"], kind, found["adapter"])
        return Key(name, path, "other")
    part: Part = match["part"]  # type: ignore[assignment]  # the pattern allows no other text
    return Key(name, match["module"], part, match["adapter"])


def factor_name(module: str, part: Part) -> str:
    """The name that PEFT and vLLM read."""
    leaf = "" if part.startswith("lora_embedding") else ".weight"
    return f"{_PREFIX}{module}.{part}{leaf}"


def is_base_copy(name: str) -> bool:
    """Whether it is a whole embedding, which PEFT saves beside its factors: the base's rows, not a delta."""
    return name.endswith(".base_layer.weight")


def is_table(name: str) -> bool:
    """Whether it is an embedding or a head by itself, which PEFT saves where asked (`save_embedding_layers`) or where
    the vocabulary was resized.
    """
    return bool(_TABLE.search(name))


def base_path(name: str) -> str:
    """The name in the base of a tensor that was trained in place of the base's, or is PEFT's copy of it."""
    return _WRAPPING.sub("", unwrapped(name))
