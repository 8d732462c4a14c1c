"""Adapters of other PEFT methods as plain LoRA factors: those whose change is exactly B A, whatever the base holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.adapters.config import AdapterConfig
from lorakit.adapters.kinds import blocks, diagonal, lycoris, shared
from lorakit.adapters.kinds.factors import ExactFactors
from lorakit.adapters.kinds.module import Module, Source
from lorakit.errors import InvalidFile, UnsupportedAdapter
from lorakit.files.safetensors import StoredTensor

__all__ = ["EXACT", "NEEDS_SHAPES", "NOT_APPROXIMATED", "ExactFactors", "exact_factors"]


@dataclass(frozen=True, slots=True)
class _Method:
    """How its tensors are named: `<module>.<prefix>…`, and `base_model.<shared>` where all modules share one."""

    prefix: str
    factors: Callable[[Module], ExactFactors]
    shared: frozenset[str] = frozenset()


_METHODS: Mapping[str, _Method] = {
    "ADALORA": _Method("lora_", diagonal.adalora),
    "DELORA": _Method("delora_", diagonal.delora),
    "GRALORA": _Method("gralora_", blocks.gralora),
    "LOHA": _Method("hada_", lycoris.loha),
    "LOKR": _Method("lokr_", lycoris.lokr),
    "MISS": _Method("miss_", blocks.miss),
    "PVERA": _Method("pvera_", shared.pvera, frozenset({"pvera_A", "pvera_B"})),
    "UNILORA": _Method("unilora_", shared.unilora, frozenset({"unilora_theta_d"})),
    "VBLORA": _Method("vblora_", shared.vblora, frozenset({"vblora_vector_bank"})),
    "VERA": _Method("vera_", shared.vera, frozenset({"vera_A", "vera_B"})),
}

EXACT: frozenset[str] = frozenset(_METHODS)
# Their files don't say how many inputs a module has: only the base does.
NEEDS_SHAPES: frozenset[str] = frozenset({"MISS", "PVERA", "VERA"})

_BASE = "what it adds depends on the values of the base"
_FULL = "what it adds has no low rank"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(
        ("BOFT", "DEFT", "FROD", "GLORA", "HIRA", "HRA", "IA3", "OFT", "OSF", "PEANUT", "PSOFT", "ROAD"), _BASE
    ),
    **dict.fromkeys(("C3A", "FOURIERFT", "RANDLORA", "SHIRA", "SUPERTUNING", "WAVEFT"), _FULL),
    "TINYLORA": "which of its modules are embeddings, and which vector each has, is not in its file",
}

_MERGE = "`lorakit merge` is exact"
_PEFT = "run it with the PEFT that wrote it"
_ELSEWHERE = ("it changes biases, norms or rows of an embedding", _MERGE)
_INPUT = ("it adds to the model's input, and changes no weight", _PEFT)
_ROUTED = ("what it adds to a weight depends on the input", _PEFT)
NOT_APPROXIMATED: Mapping[str, tuple[str, str]] = {  # nothing that extract could find: the reason, and what to do
    "ADAMSS": ("its segments come from a clustering of the base's weights, which its file does not hold", _PEFT),
    "BONE": ("PEFT has put MiSS in its place and no longer reads it", _PEFT),
    "BEFT": _ELSEWHERE, "LN_TUNING": _ELSEWHERE, "TRAINABLE_TOKENS": _ELSEWHERE,
    "ADAPTION_PROMPT": _INPUT, "CARTRIDGE": _INPUT, "CPT": _INPUT, "MULTITASK_PROMPT_TUNING": _INPUT,
    "P_TUNING": _INPUT, "PREFIX_TUNING": _INPUT, "PROMPT_TUNING": _INPUT,
    "LILY": _ROUTED, "POLY": _ROUTED, "SHADOW": _ROUTED, "XLORA": _ROUTED,
}  # fmt: skip


def exact_factors(
    config: AdapterConfig,
    tensors: Sequence[StoredTensor],
    folder: Path,
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[dict[str, ExactFactors], tuple[StoredTensor, ...]]:
    """Factors by module path; and the tensors that are no part of the method (biases, whole modules, base copies).

    Reads no tensor. A convolution whose file holds matrices (of out × in·kernel) can't be told from a linear layer.

    Args:
        shapes: (out, in) of the base's linear layers by path, Conv1D's transposed; for `NEEDS_SHAPES`.

    Raises:
        UnsupportedAdapter: a method or a setting whose change is not exactly low-rank, or needs what is not there.
        InvalidFile: a tensor is missing, unknown, or its shape contradicts another's or the config.
        WrongBase: `shapes` are another base's.
    """
    method = _METHODS.get(config.peft_type)
    if method is None:
        raise _refusal(config, folder)
    modules: dict[str, dict[str, StoredTensor]] = {}
    common: dict[str, StoredTensor] = {}
    others: list[StoredTensor] = []
    for stored in tensors:
        module, dot, rest = stored.name.rpartition(f".{method.prefix}")
        part = method.prefix + rest
        if not dot:
            others.append(stored)
        elif module == "base_model" and part in method.shared:
            common[part] = stored
        else:
            parts = modules.setdefault(module.removeprefix("base_model.model."), {})
            if part in parts:
                raise InvalidFile(f"'{folder}': '{stored.name}' and '{parts[part].name}' name the same tensor")
            parts[part] = stored
    source = Source(config, folder, frozenset(modules), common, shapes or {})
    if common and not modules:
        raise source.refusal("its file doesn't say which module has which part of what they share")
    return {path: _factors(method, Module(path, parts, source)) for path, parts in modules.items()}, tuple(others)


def _factors(method: _Method, module: Module) -> ExactFactors:
    factors = method.factors(module)
    if module.parts:
        names = ", ".join(f"'{stored.name}'" for stored in module.parts.values())
        raise InvalidFile(
            f"'{module.source.folder}' ({module.source.config.peft_type}) holds tensors that lorakit has no place for: "
            f"{names}; update lorakit, or merge it with the PEFT that wrote it"
        )
    return factors


def _refusal(config: AdapterConfig, folder: Path) -> UnsupportedAdapter:
    """The reason, and the command that helps."""
    kind = config.peft_type
    if kind in NOT_APPROXIMATED:
        reason, cure = NOT_APPROXIMATED[kind]
        return UnsupportedAdapter(f"adapter '{folder}' ({kind}) can't be made into LoRA factors: {reason}; {cure}")
    source = Source(config, folder, frozenset(), {}, {})
    return source.refusal(_REASONS.get(kind, "lorakit doesn't know this method's formula"))
