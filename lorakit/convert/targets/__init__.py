"""Adapters for other servers than vLLM: what each takes, and the form that it serves right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import ensure_plain
from lorakit.adapters.writing import write_adapter_files
from lorakit.convert.answers import MERGE
from lorakit.convert.targets.gaps import filled_in_layers, filled_in_parts
from lorakit.convert.targets.llama_cpp import write_gguf_adapter
from lorakit.errors import UnsupportedAdapter, UsageError
from lorakit.merge.base import BaseModel


def _peft_files(adapter: Adapter, folder: Path, base: BaseModel | None) -> None:
    write_adapter_files(adapter, folder)


@dataclass(frozen=True, slots=True)
class Target:
    """A server: `embeddings` says whether it applies a LoRA of an embedding; `filled` gives the modules that it wants
    besides, as zeros.
    """

    server: str
    embeddings: bool = False
    filled: Callable[[Adapter, BaseModel | None], Adapter] | None = None
    write: Callable[[Adapter, Path, BaseModel | None], None] = _peft_files


TARGETS: Mapping[str, Target] = {
    "vllm": Target("vLLM", embeddings=True),
    "peft": Target("PEFT", embeddings=True),
    # lorax_server/adapters/lora.py: of a kind of layer all are left out where one of the model has none; what is named
    # lora_embedding_A is not looked for
    "lorax": Target("LoRAX", filled=filled_in_layers),
    # sglang/srt/lora: q, k and v of a layer stand in one, and gate and up, and versions differ in what they do where
    # one is missing
    "sglang": Target("SGLang", embeddings=True, filled=filled_in_parts),
    "llama.cpp": Target("llama.cpp", embeddings=True, write=write_gguf_adapter),
}


def target_named(name: str) -> Target:
    """Raises UsageError for a server that is not known; names the nearest."""
    if name not in TARGETS:
        near = get_close_matches(name, TARGETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TARGETS)}"
        raise UsageError(f"no form of adapters is known for '{name}': {hint}")
    return TARGETS[name]


def write_for(name: str, adapter: Adapter, folder: Path, base: BaseModel | None = None) -> None:
    """Write `adapter` into a folder that is there, in the form that this server serves right.

    Everywhere one rank, alpha = rank, and each module's scale in its B. The modules have the base's names, but for
    PEFT; `base` is needed where something of it decides.

    Raises:
        UsageError: no such server is known, or the base is needed.
        UnsupportedAdapter: there is more in it than deltas, or what that server would leave out in silence.
        Refused: llama.cpp's names of this base's tensors are not known; or an extra isn't installed.
    """
    target = target_named(name)
    work = f"written for {target.server}"
    ensure_plain(adapter.config, adapter.name, (stored.name for stored in adapter.others), work=work)
    embeddings = [module for module, delta in adapter.deltas.items() if delta.kind == "embedding"]
    if embeddings and not target.embeddings:
        raise UnsupportedAdapter(
            f"adapter '{adapter.name}' changes the embedding '{embeddings[0]}', which {target.server} would leave out "
            f"without a word: {MERGE}"
        )
    if target.filled is not None:
        adapter = target.filled(adapter, base)
    target.write(adapter, folder, base)
