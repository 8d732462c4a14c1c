"""torchtune's own names, and Meta's: what FullModelTorchTuneCheckpointer and FullModelMetaCheckpointer write.

Both turn pairs of neighbouring rows by their rotary embeddings where transformers turns the two halves of a head, so
the rows of q_proj and k_proj stand in another order there (of Qwen they don't: torchtune leaves its weights as they
are).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorakit.convert.readers import huggingface, torch_files
from lorakit.convert.readers.rows import TURNED, HalvedHeads, Stacked
from lorakit.convert.readers.templates import config_beside, ensure_apart, head_size, renamed, template
from lorakit.convert.source import Source, SourceTensor
from lorakit.errors import Incomplete, InvalidFile, Refused
from lorakit.files.folders import FileState, file_state

SHARDS = "model-[0-9][0-9][0-9][0-9][0-9]-of-[0-9][0-9][0-9][0-9][0-9].bin"
_LAYER = "model.layers.{}."
OWN = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "norm.rms_norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
    **{f"layers.{{}}.attn.{one}.weight": f"{_LAYER}self_attn.{one}.weight" for one in ("q_proj", "k_proj", "v_proj")},
    **{f"layers.{{}}.attn.{one}.bias": f"{_LAYER}self_attn.{one}.bias" for one in ("q_proj", "k_proj", "v_proj")},
    "layers.{}.attn.output_proj.weight": f"{_LAYER}self_attn.o_proj.weight",
    "layers.{}.attn.q_norm.scale": f"{_LAYER}self_attn.q_norm.weight",
    "layers.{}.attn.k_norm.scale": f"{_LAYER}self_attn.k_norm.weight",
    "layers.{}.mlp.w1.weight": f"{_LAYER}mlp.gate_proj.weight",
    "layers.{}.mlp.w2.weight": f"{_LAYER}mlp.down_proj.weight",
    "layers.{}.mlp.w3.weight": f"{_LAYER}mlp.up_proj.weight",
    "layers.{}.sa_norm.scale": f"{_LAYER}input_layernorm.weight",
    "layers.{}.mlp_norm.scale": f"{_LAYER}post_attention_layernorm.weight",
}  # fmt: skip
_GEMMA2 = {
    "layers.{}.sa_scale.scale": f"{_LAYER}post_attention_layernorm.weight",
    "layers.{}.mlp_scale.scale": f"{_LAYER}pre_feedforward_layernorm.weight",
    "layers.{}.mlp_norm.scale": f"{_LAYER}post_feedforward_layernorm.weight",
}
META = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.attention.wq.weight": f"{_LAYER}self_attn.q_proj.weight",
    "layers.{}.attention.wk.weight": f"{_LAYER}self_attn.k_proj.weight",
    "layers.{}.attention.wv.weight": f"{_LAYER}self_attn.v_proj.weight",
    "layers.{}.attention.wo.weight": f"{_LAYER}self_attn.o_proj.weight",
    "layers.{}.attention_norm.weight": f"{_LAYER}input_layernorm.weight",
    "layers.{}.ffn_norm.weight": f"{_LAYER}post_attention_layernorm.weight",
    "layers.{}.feed_forward.w1.weight": f"{_LAYER}mlp.gate_proj.weight",
    "layers.{}.feed_forward.w2.weight": f"{_LAYER}mlp.down_proj.weight",
    "layers.{}.feed_forward.w3.weight": f"{_LAYER}mlp.up_proj.weight",
}
# What no weight is: Meta's table of angles.
_BUFFERS = frozenset({"rope.freqs"})
_ONLY_OWN = frozenset({"layers.{}.attn.output_proj.weight"})
_ONLY_META = frozenset({"layers.{}.attention.wo.weight"})
ALTERNATING = frozenset({"llama", "mistral", "gemma", "gemma2"})
AS_THEY_ARE = frozenset({"qwen2", "qwen3", "phi3"})


def read(path: Path, *, weights: str = "model") -> Source:
    """A folder of torchtune's, `epoch_N` or `step_N`, or one file of such names.

    Raises:
        UsageError: EMA weights are asked for, which torchtune keeps none of.
        NotFound, InvalidFile, Refused: as the files' own readers, and `translated`.
    """
    torch_files.without_ema(path, weights)
    if path.is_file():
        return translated(torch_files.read(path))
    shards = sorted(path.glob(SHARDS))
    if huggingface.is_model_folder(path) or not shards:
        return translated(huggingface.read(path))
    return translated(_joined(path, shards))


def _joined(folder: Path, shards: Sequence[Path]) -> Source:
    """Files of torch.save that no index joins.

    Raises:
        Incomplete: there are not as many as their names say.
        InvalidFile: two of them have a tensor of one name.
    """
    wanted = shards[0].stem.rpartition("-of-")[2]
    if len(shards) != int(wanted):
        raise Incomplete(f"'{folder}' has {len(shards)} of the {int(wanted)} files that '{shards[0].name}' is one of")
    tensors: dict[str, SourceTensor] = {}
    states: dict[Path, FileState] = {}
    for shard in shards:
        found = torch_files.read(shard)
        if twice := sorted(tensors.keys() & found.tensors.keys()):
            raise InvalidFile(f"'{folder}': '{twice[0]}' is both in {shard.name} and in another file")
        tensors |= found.tensors
        states |= found.states
    return Source(folder, "torchtune", tensors, {}, folder, states)


def translated(source: Source, config: Mapping[str, Any] | None = None) -> Source:
    """The same under transformers' names, rows in its order; itself where the names are not torchtune's or Meta's.

    Args:
        config: the model's, where it isn't beside the weights.

    Raises:
        Refused: the config is needed and isn't there, or is of a model that this table does not know.
        InvalidFile: the config contradicts the tensors.
    """
    known = _table(source.tensors)
    if known is None:
        return source
    said = config or config_beside(source.beside, f"'{source.path}' has {known} names")
    size = _alternating(said, known, source)
    table = META if known == "Meta's" else OWN | (_GEMMA2 if said.get("model_type") == "gemma2" else {})
    tensors: dict[str, SourceTensor] = {}
    for name, tensor in source.tensors.items():
        if name in _BUFFERS:
            continue
        target = renamed(name, table) or name  # which the writer can't place, and names
        ensure_apart([target], tensors, f"'{source.path}'")
        tensors[target] = _in_order(tensor, target, size, name, source)
    if said.get("model_type") == "phi3":
        tensors = _fused(tensors)
    left_out = dict(source.left_out)
    if buffers := tuple(sorted(_BUFFERS & source.tensors.keys())):
        left_out["rotary embeddings, which are computed"] = buffers
    states = dict(source.states)
    if config is None and source.beside is not None:
        states[source.beside / "config.json"] = file_state(source.beside / "config.json")
    return replace(source, format="torchtune", tensors=tensors, left_out=left_out, states=states)


def _table(names: Iterable[str]) -> str | None:
    """Whose names they are."""
    places = {template(name)[0] for name in names}
    if places & _ONLY_OWN:
        return "torchtune's"
    return "Meta's" if places & _ONLY_META else None


def _alternating(config: Mapping[str, Any], known: str, source: Source) -> int | None:
    """The rows of a head, where the two halves of one alternate."""
    kind = config.get("model_type")
    if known == "Meta's" or kind in ALTERNATING:
        return head_size(config, f"'{source.path}'")
    if kind in AS_THEY_ARE:
        return None
    raise Refused(
        f"'{source.path}' has torchtune's names of a {kind} model, whose order of rows is not known here: write it "
        f"with torchtune's FullModelHFCheckpointer"
    )


def _in_order(tensor: SourceTensor, target: str, size: int | None, name: str, source: Source) -> SourceTensor:
    if size is None or not target.endswith(TURNED):
        return tensor
    if not tensor.shape or tensor.shape[0] % size:
        raise InvalidFile(f"'{source.path}': '{name}' is {list(tensor.shape)}: these are no heads of {size} rows")
    return HalvedHeads(tensor, size)


def _fused(tensors: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """Phi-3 has q, k and v in one, and gate and up."""
    found = dict(tensors)
    for name in tensors:
        for parts, whole in _PHI3.items():
            head, _, tail = name.partition(f".{parts[0]}.")
            names = [f"{head}.{part}.{tail}" for part in parts]
            if tail and all(part in found for part in names):
                found[f"{head}.{whole}.{tail}"] = Stacked(tuple(found.pop(part) for part in names))
    return found


_PHI3 = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
