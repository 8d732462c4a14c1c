"""Would vLLM serve this adapter, and would it be right? The verdict, without starting anything.

vLLM itself answers 200 with the base's text, or with garbage, for adapters whose names or sizes don't fit the base, and
keeps what it failed to load half registered; so an engine sees only what passed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.config import beyond_plain_lora
from lorakit.adapters.delta import Delta
from lorakit.adapters.keys import factor_name, is_base_copy, parse_key
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import FLOATS
from lorakit.merge.base import BaseModel
from lorakit.merge.copies import equal_values
from lorakit.merge.layers import is_transposed
from lorakit.merge.resolve import Resolver, copied_from_base


@dataclass(frozen=True, slots=True)
class Verdict:
    """`problems` forbid serving, each with its cure; `repairs` say what has to be written anew, exactly, before it.

    `rename` gives modules the names that the base has for them.
    """

    problems: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)


def check_adapter(adapter: Adapter, base: BaseModel, *, max_rank: int | None = None) -> Verdict:
    """Judge an adapter by its config, its names and shapes, and the base's."""
    features = beyond_plain_lora(adapter.config).values()
    problems = [
        f"vLLM serves no adapter with {feature}: merge it into its base (lorakit merge), and serve that"
        for feature in features
    ]
    problems += _other_tensors(adapter, base, explained=bool(features))
    if max_rank is not None and adapter.deltas and adapter.rank > max_rank:
        problems.append(
            f"it has rank {adapter.rank}, but this server was started with --max-lora-rank {max_rank}: "
            f"shrink it (lorakit shrink … --rank {max_rank}), or restart with --max-lora-rank {adapter.rank}"
        )
    rename, misplaced = _placed(adapter.deltas, base)
    problems += misplaced
    if not adapter.deltas and not problems:
        problems.append("it holds no low-rank factors")
    repairs = [] if problems else _repairs(adapter, rename)
    return Verdict(tuple(problems), tuple(repairs), rename)


def _other_tensors(adapter: Adapter, base: BaseModel, *, explained: bool) -> list[str]:
    """What is no factor: PEFT's copy of the base's embedding is no news, anything else was trained.

    `explained`: the config says already what those others are for.
    """
    problems, rest = [], []
    resolver = Resolver(base.tensors)
    biases = (stored for bias in adapter.biases.values() for stored, _ in bias.parts)
    for stored in (*adapter.others, *biases):
        path = copied_from_base(stored.name)
        found = resolver.tensor_of(path) if path else None
        if found is None or not is_base_copy(stored.name):
            rest.append(stored.name)
        elif stored.shape != base.tensors[found].shape:
            problems.append(
                f"its copy of '{found}' is {list(stored.shape)}, the base's is {list(base.tensors[found].shape)}: "
                f"the vocabulary was resized, so merge it into its base (lorakit merge), and serve that"
            )
        elif not equal_values(stored, base.tensors[found]):
            problems.append(f"its copy of '{found}' differs from the base's: it was made for another base")
    if rest and not explained:
        shown = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
        problems.append(f"it holds tensors that no LoRA has ({shown}): vLLM refuses it")
    return problems


def _placed(deltas: Mapping[str, Delta], base: BaseModel) -> tuple[dict[str, str], list[str]]:
    """The names that the base has for the modules, and what does not fit."""
    resolver = Resolver(base.tensors)
    rename: dict[str, str] = {}
    problems: list[str] = []
    missing: list[str] = []
    for module, delta in deltas.items():
        wrong = [term.A for term in delta.stored if term.A.dtype not in FLOATS or term.B.dtype not in FLOATS]
        if wrong:
            problems.append(f"'{wrong[0].name}' is stored as {wrong[0].dtype}: save the adapter in bf16, fp16 or fp32")
        found = resolver.weight_of(module)
        if found is None:
            if not (base.quantised and any(name.startswith(f"{module}.") for name in base.tensors)):
                missing.append(module)
            continue
        if found != f"{module}.weight":
            rename[module] = found.removesuffix(".weight")
        if not base.quantised and not _fits(delta, base.tensors[found], base):
            problems.append(
                f"'{module}' is for a weight {list(delta.shape)}, the base's '{found}' is "
                f"{list(base.tensors[found].shape)}: the adapter was made for another base"
            )
            break
    if missing:
        near = resolver.nearest(missing[0], 1)
        problems.append(
            f"the base has no weight for {len(missing)} of its {len(deltas)} modules ('{missing[0]}'"
            + (f"; nearest: '{near[0]}'" if near else "")
            + "): the adapter was made for another base"
        )
    return rename, problems


def _fits(delta: Delta, weight: StoredTensor, base: BaseModel) -> bool:
    return weight.shape == (delta.shape[::-1] if is_transposed(weight.name, base) else delta.shape)


def _repairs(adapter: Adapter, rename: Mapping[str, str]) -> list[str]:
    config, found = adapter.config, []
    odd = [
        stored.name
        for module, delta in adapter.deltas.items()
        for term in delta.stored
        for stored in (term.A, term.B)
        if stored.name != factor_name(module, parse_key(stored.name).part)
    ]
    if odd:
        found.append(f"raw tensor names ('{odd[0]}')")
    if rename:
        module = next(iter(rename))
        found.append(f"moved names ('{module}' is '{rename[module]}' in the base)")
    if config.rank_pattern or config.alpha_pattern:
        found.append("rank_pattern and alpha_pattern, which vLLM before 0.32 ignores")
    if any(config.raw.get(name) is None for name in ("lora_alpha", "target_modules")):
        found.append("a config without lora_alpha or target_modules")
    return found
