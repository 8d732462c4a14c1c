"""litgpt's `lit_model.pth`: q, k and v in one tensor, names of its own.

`attn.qkv` holds all of q, then k, then v; before litgpt 0.5.4 `attn.attn` held them group by group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit.convert.readers import torch_files
from lorakit.convert.readers.rows import Rows
from lorakit.convert.readers.templates import ensure_apart, renamed, template
from lorakit.convert.source import Source, SourceTensor
from lorakit.errors import InvalidFile, NotFound, Refused
from lorakit.files.folders import file_state
from lorakit.files.plain_yaml import read_yaml

WEIGHTS = "lit_model.pth"
CONFIG = "model_config.yaml"
_OUT, _IN = "transformer.h.{}.", "model.layers.{}."
LLAMA = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
    f"{_OUT}norm_1.weight": f"{_IN}input_layernorm.weight",
    f"{_OUT}norm_2.weight": f"{_IN}post_attention_layernorm.weight",
    f"{_OUT}attn.proj.weight": f"{_IN}self_attn.o_proj.weight",
    f"{_OUT}attn.proj.bias": f"{_IN}self_attn.o_proj.bias",
    f"{_OUT}attn.norm_q.weight": f"{_IN}self_attn.q_norm.weight",
    f"{_OUT}attn.norm_k.weight": f"{_IN}self_attn.k_norm.weight",
    f"{_OUT}mlp.fc_1.weight": f"{_IN}mlp.gate_proj.weight",
    f"{_OUT}mlp.fc_2.weight": f"{_IN}mlp.up_proj.weight",
    f"{_OUT}mlp.proj.weight": f"{_IN}mlp.down_proj.weight",
    f"{_OUT}post_mlp_norm.weight": f"{_IN}post_feedforward_layernorm.weight",
}
_FOUR_NORMS = {  # Gemma 2 and 3: one more before each part's result is added
    f"{_OUT}post_attention_norm.weight": f"{_IN}post_attention_layernorm.weight",
    f"{_OUT}norm_2.weight": f"{_IN}pre_feedforward_layernorm.weight",
}
_QKV = {f"{_OUT}attn.{fused}.{leaf}": leaf for fused in ("qkv", "attn") for leaf in ("weight", "bias")}
# Classes of MLP whose models are laid out as Llama's.
_LLAMA_LIKE = frozenset({"LLaMAMLP", "GemmaMLP"})
PARTS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class LitConfig:
    """What `model_config.yaml` says of a model's heads: `heads` of queries share `groups` of keys and values."""

    name: str
    heads: int
    groups: int
    head_size: int
    raw: Mapping[str, Any]

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of q, k and v."""
        return self.heads * self.head_size, self.groups * self.head_size, self.groups * self.head_size


def read(path: Path, *, weights: str = "model") -> Source:
    """A folder of litgpt's, or its `lit_model.pth`.

    Raises:
        UsageError: EMA weights are asked for, which litgpt keeps none of.
        NotFound, InvalidFile, Refused: as `torch_files.read` and `translated`; there is no model in it.
    """
    torch_files.without_ema(path, weights)
    file = path / WEIGHTS if path.is_dir() else path
    if file.suffix == ".lora" or (not file.is_file() and (path / f"{WEIGHTS}.lora").is_file()):
        raise Refused(f"'{path}' holds litgpt's LoRA alone: convert it as an adapter, or name a {WEIGHTS}")
    if not file.is_file():
        raise NotFound(f"there is no {WEIGHTS} in '{path}'")
    return translated(replace(torch_files.read(file), beside=file.parent))


def translated(source: Source) -> Source:
    """The same under transformers' names, q, k and v apart; itself where the names are not litgpt's.

    Raises:
        Refused: there is no `model_config.yaml` beside it, or it is of a model that this table does not know.
        InvalidFile: that file contradicts the tensors.
    """
    if not any(template(name)[0] in _QKV for name in source.tensors):
        return source
    if source.beside is None or not (source.beside / CONFIG).is_file():
        raise Refused(f"'{source.path}' has litgpt's names, and there is no {CONFIG} beside it: copy it there")
    config = read_lit_config(source.beside / CONFIG)
    kind = config.raw.get("mlp_class_name")
    if not isinstance(kind, str) or kind not in _LLAMA_LIKE or "falcon" in config.name.lower():
        raise Refused(
            f"'{source.path}' is litgpt's {config.name}, whose layers are not named as Llama's: "
            f"convert it with `litgpt convert_from_litgpt` first, whose model.pth lorakit reads"
        )
    table = LLAMA | (_FOUR_NORMS if config.raw.get("post_attention_norm") else {})
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in source.tensors.items():
        place, numbers = template(name)
        parts = {renamed(name, table) or name: tensor}
        if place in _QKV:
            parts = _apart(name, tensor, int(numbers[0]), config, source)
        ensure_apart(parts, tensors, f"'{source.path}'")
        tensors |= parts
    states = {**source.states, source.beside / CONFIG: file_state(source.beside / CONFIG)}
    return replace(source, format="litgpt", tensors=tensors, states=states)


def _apart(name: str, tensor: SourceTensor, layer: int, config: LitConfig, source: Source) -> dict[str, SourceTensor]:
    """q, k and v of what they are fused in."""
    rows = config.rows
    if not tensor.shape or tensor.shape[0] != sum(rows):
        raise InvalidFile(f"'{source.path}': '{name}' is {list(tensor.shape)}, and {CONFIG} implies {sum(rows)} rows")
    leaf = name.rpartition(".")[2]
    if name.endswith(f"attn.attn.{leaf}"):
        rows = (rows[0] // config.groups, config.head_size, config.head_size)
    found: dict[str, SourceTensor] = {}
    first = 0
    for part, count in zip(PARTS, rows, strict=True):
        found[f"model.layers.{layer}.self_attn.{part}.{leaf}"] = Rows(tensor, sum(rows), first, count)
        first += count
    return found


def read_lit_config(file: Path) -> LitConfig:
    """Raises InvalidFile where `model_config.yaml` can't be read, or lacks what its table needs."""
    raw = read_yaml(file)
    said = [raw.get(key) for key in ("n_head", "n_query_groups", "head_size")]
    numbers = [number for number in said if isinstance(number, int) and not isinstance(number, bool) and number > 0]
    if len(numbers) < len(said):
        raise InvalidFile(f"'{file}' does not say n_head, n_query_groups and head_size")
    heads, groups, size = numbers
    if heads % groups:
        raise InvalidFile(f"'{file}': {heads} heads can't share {groups} groups")
    name = raw.get("name")
    return LitConfig(name if isinstance(name, str) else "", heads, groups, size, raw)
