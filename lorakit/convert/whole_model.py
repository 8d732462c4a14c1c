"""Has a whole model every tensor that its config.json implies? By names and shapes, and as far as that is certain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.convert.check import Check, check_numbers
from lorakit.files.finite import look_at_numbers
from lorakit.files.safetensors import StoredTensor
from lorakit.merge.base import BaseModel
from lorakit.merge.layers import HEADS, input_embedding, layer_of, vocabulary_sizes

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
SAMPLED = 1 << 16  # bytes of each tensor
AGAIN = "copy it again, or use an earlier checkpoint"
_LAYER = re.compile(r"((?:.*\.)?(?:layers|layer|h|blocks|block)\.)(\d{1,9})\.(.+)")
_OF_OTHERS = re.compile("vision|visual|audio|encoder")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")

# Of these every tensor is known; the sizes by the names that stand for them in `_sizes`.
UNTIED = frozenset({"llama", "mistral", "ministral", "qwen2", "qwen3", "seed_oss"})  # unless their config says else
LLAMAS = UNTIED | {"gemma", "gemma2", "gemma3_text", "granite", "smollm3"}
_OUTSIDE = {"model.embed_tokens.weight": ("vocabulary", "hidden"), "model.norm.weight": ("hidden",)}
_INSIDE = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("heads", "hidden"),
    "self_attn.k_proj.weight": ("groups", "hidden"),
    "self_attn.v_proj.weight": ("groups", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "heads"),
    "mlp.gate_proj.weight": ("inner", "hidden"),
    "mlp.up_proj.weight": ("inner", "hidden"),
    "mlp.down_proj.weight": ("hidden", "inner"),
}

Layers = dict[int, dict[str, StoredTensor]]


def check_model(model: BaseModel, *, sampled: bool) -> list[Check]:
    """Judge a model folder by its config and its tensors; their numbers too, each one or, `sampled`, the first of each.

    Raises:
        InvalidFile: a file became shorter meanwhile.
    """
    named = ", all that its index names" if model.index is not None else ""
    return [
        Check("readable", True, f"{len(model.tensors)} tensors{named}"),
        Check("pickle-free", True, "safetensors"),
        *_numbers(model, sampled=sampled),
        _layers(model),
        _vocabulary(model),
        _architecture(model),
        _tokenizer(model.folder),
    ]


def _numbers(model: BaseModel, *, sampled: bool) -> list[Check]:
    empty = None
    for shard in model.shards:
        found = look_at_numbers(shard, most=SAMPLED if sampled else None)
        if found.not_finite is not None:
            return [check_numbers(found)]
        if found.all_zero and shard.tensors:
            empty = empty or shard.file.name
    looked_at = f"sampled: the first {SAMPLED >> 10} kB of each tensor" if sampled else "no NaN and no infinity"
    finite = Check("finite", True, looked_at)
    if empty is None:
        return [finite]
    return [finite, Check("filled", None if sampled else False, f"all numbers of {empty} are zero", AGAIN)]


def _layers(model: BaseModel) -> Check:
    """Whether there are as many as the config says, each with what it has to have, of the sizes that it says."""
    count, layers = _count(model.config), _decoder(model.tensors)
    known = model.model_type in LLAMAS and model.quantised is None
    if not layers and not known:
        return _unknown("layers", "how this model names its layers is not known here")
    absent = next((number for number in range(min(count or 0, len(layers) + 1)) if number not in layers), None)
    if absent is not None:
        return _wrong("layers", f"config.json says that there are {count} layers, and layer {absent} is not there")
    wrong = _wrong_in_llama(model, layers) if known else None
    if wrong is not None:
        return _wrong("layers", wrong)
    if count is None:
        return _unknown("layers", "config.json does not say how many layers there are")
    if (odd := _odd_one(layers)) is not None:
        reason = f"layer {odd} has other tensors, or of other shapes, than layer {next(iter(layers))}"
        return _wrong("layers", reason) if known else _unknown("layers", f"{reason}, as some models want it")
    said = "each of what config.json implies" if known else "all alike"
    return Check("layers", True, f"{len(layers)} of {len(next(iter(layers.values())))} tensors, {said}")


def _unknown(name: str, reason: str) -> Check:
    return Check(name, None, reason, "start vLLM with it, and see")


def _wrong(name: str, reason: str) -> Check:
    return Check(name, False, reason, AGAIN)


def _texts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model; a model of several kinds has it as a part."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _count(config: Mapping[str, Any]) -> int | None:
    said = _texts(config)
    return next((_whole(said[key]) for key in _COUNTS if key in said), None)


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _decoder(tensors: Mapping[str, StoredTensor]) -> Layers:
    """The longest list of layers, of the language model's if others have some too, by number; each with its tensors by
    their names within it.
    """
    found: dict[str, Layers] = {}
    for name, stored in tensors.items():
        if match := _LAYER.fullmatch(name):
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = stored
    longest = max(found, key=lambda prefix: (not _OF_OTHERS.search(prefix), len(found[prefix])), default=None)
    return dict(sorted(found[longest].items())) if longest else {}


def _odd_one(layers: Layers) -> int | None:
    first, *others = layers.items()
    shapes = {name: stored.shape for name, stored in first[1].items()}
    return next((number for number, layer in others if {n: s.shape for n, s in layer.items()} != shapes), None)


def _wrong_in_llama(model: BaseModel, layers: Layers) -> str | None:
    """What is not there, or not of the size that the config, or another tensor, implies."""
    sizes = _sizes(model)
    wanted = [(name, model.tensors.get(name), sides) for name, sides in _OUTSIDE.items()]
    wanted += [
        (f"layer {number}'s {name}", layer.get(name), sides)
        for number, layer in layers.items()
        for name, sides in _INSIDE.items()
    ]
    for name, stored, sides in wanted:
        if stored is None:
            return f"{name} is not there"
        if len(stored.shape) != len(sides):
            return f"{name} is {list(stored.shape)}, and has to have {len(sides)} dimensions"
        implied = [sizes.setdefault(side, size) for side, size in zip(sides, stored.shape, strict=True)]
        if implied != list(stored.shape):
            return f"{name} is {list(stored.shape)}, and config.json, or the other tensors, imply {implied}"
    return None


def _sizes(model: BaseModel) -> dict[str, int]:
    """What the config says of them; of the others the first tensor decides."""
    config = model.config
    heads, hidden = _whole(config.get("num_attention_heads")), _whole(config.get("hidden_size"))
    groups = _whole(config.get("num_key_value_heads"))
    dimension = _whole(config.get("head_dim"))
    if dimension is None and model.model_type in ("llama", "mistral", "qwen2") and heads and hidden:
        dimension = hidden // heads
    said = {
        "vocabulary": _whole(config.get("vocab_size")),
        "hidden": hidden,
        "inner": _whole(config.get("intermediate_size")),
        "heads": heads * dimension if heads and dimension else None,
        "groups": groups * dimension if groups and dimension else None,
    }
    return {name: size for name, size in said.items() if size is not None}


def _vocabulary(model: BaseModel) -> Check:
    """Whether the embedding and the head are there, with a row for each token."""
    embedding, sizes = input_embedding(model), vocabulary_sizes(model.config)
    if embedding is None:
        known = model.model_type in LLAMAS
        return (_wrong if known else _unknown)("vocabulary", "no embedding of the vocabulary is found")
    heads = [stored for name, stored in model.tensors.items() if layer_of(name.rpartition(".")[0]) in HEADS]
    if not heads and _needs_head(model):
        return _wrong("vocabulary", "it has no lm_head, and config.json does not say that it is the embedding")
    for stored in () if model.quantised else (embedding, *heads):
        if sizes and not sizes.intersection(stored.shape[:1]):
            said = ", ".join(map(str, sorted(sizes)))
            return _wrong("vocabulary", f"'{stored.name}' is {list(stored.shape)}, and vocab_size is {said}")
        if stored.shape != embedding.shape and model.model_type in LLAMAS:
            return _wrong("vocabulary", f"'{stored.name}' is not of the embedding's shape, {list(embedding.shape)}")
    head = "a head of its own" if heads else "which is the head too"
    return Check("vocabulary", True, f"an embedding of {embedding.shape[0]} tokens, {'and ' * bool(heads)}{head}")


def _needs_head(model: BaseModel) -> bool:
    """Whether what it says next comes from a head that is not its embedding."""
    if not any(name.endswith(("ForCausalLM", "ForConditionalGeneration")) for name in _architectures(model.config)):
        return False
    said = [part.get("tie_word_embeddings") for part in (model.config, _texts(model.config))]
    return True not in said and (False in said or model.model_type in UNTIED)


def _architectures(config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def _architecture(model: BaseModel) -> Check:
    named = _architectures(model.config)
    if named:
        return Check("architecture", True, f"{named[0]}; whether your vLLM knows it is not looked up")
    cure = "take the config.json of the model it was made from"
    return Check("architecture", False, "config.json names no architectures", cure)


def _tokenizer(folder: Path) -> Check:
    found = next((name for name in TOKENIZERS if (folder / name).is_file()), None)
    if found is None:
        cure = "copy those of its base beside it, or serve it with --tokenizer BASE"
        return Check("tokenizer", False, "it has no tokenizer's files", cure)
    return Check("tokenizer", True, found)
