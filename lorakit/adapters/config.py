"""`adapter_config.json`: what of it changes the values of an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from lorakit.adapters.keys import unwrapped
from lorakit.adapters.module_names import ends_with
from lorakit.errors import InvalidFile, UnsupportedAdapter
from lorakit.files.folders import read_json

# What PEFT itself starts from zero or at random: the base stays as it is. All others change the base at load
# (peft/tuners/lora/layer.py, `reset_lora_parameters`), so their factors alone don't say what was trained.
PLAIN_INITS = frozenset({"true", "false", "gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The fields that matter, checked; `raw` is the whole file."""

    peft_type: str = "LORA"
    rank: int = 0
    alpha: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    base: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """alpha/r, or alpha/√r with rsLoRA (arXiv:2312.03732), by the module's own patterns."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json` of `folder`.

    Raises:
        InvalidFile: it is missing, can't be parsed, or a field has the wrong type.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise InvalidFile(f"'{folder}' is no adapter: it has no adapter_config.json")
    return parse_config(read_json(file), file)


def parse_config(raw: Mapping[str, Any], file: Path) -> AdapterConfig:
    def take(name: str, kinds: type | tuple[type, ...], default: Any) -> Any:
        value = raw.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in _as_tuple(kinds)):
            raise InvalidFile(f"'{file}': {name} is {shown(value)}")
        return value

    peft_type = str(take("peft_type", str, "")).upper()
    if not peft_type:
        raise InvalidFile(f"'{file}' is no adapter config: it has no peft_type")
    rank = take("r", int, 0)
    if peft_type == "LORA" and rank < 1:
        raise InvalidFile(f"'{file}': r is {shown(raw.get('r'))}, and has to be a whole number above 0")
    # AdaLoRA writes there which of its directions it kept, module by module: lists, which `raw` has
    rank_pattern = {} if peft_type == "ADALORA" else take("rank_pattern", dict, {})
    alpha_pattern = take("alpha_pattern", dict, {})
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for key, value in pattern.items():
            if not _is_finite_number(value) or value < 0:
                raise InvalidFile(f"'{file}': {name}[{shown(key)}] is {shown(value)}")
    if any(not isinstance(value, int) or value < 1 for value in rank_pattern.values()):
        raise InvalidFile(f"'{file}': a rank in rank_pattern is no whole number above 0")
    for name in ("modules_to_save", "target_parameters"):
        names = take(name, list, [])
        if not all(isinstance(item, str) for item in names):
            raise InvalidFile(f"'{file}': {name} is {shown(names)}")
    alpha = take("lora_alpha", (int, float), 8 if peft_type == "LORA" else 0)
    if not _is_finite_number(alpha):
        raise InvalidFile(f"'{file}': lora_alpha is {shown(alpha)}")
    return AdapterConfig(
        peft_type=peft_type,
        rank=rank,
        alpha=float(alpha),
        use_rslora=take("use_rslora", bool, False),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        fan_in_fan_out=take("fan_in_fan_out", bool, False),
        base=take("base_model_name_or_path", str, None) or None,
        raw=raw,
    )


def canonical(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config in the same bytes: PEFT writes sets of names in an order that changes with each process."""
    return {
        key: sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value
        for key, value in sorted(config.items())
    }


def _is_finite_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _as_tuple(kinds: type | tuple[type, ...]) -> tuple[type, ...]:
    return kinds if isinstance(kinds, tuple) else (kinds,)


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule (peft/utils/other.py, `get_pattern_key`): the first key that matches the end of the name."""
    return next((value for key, value in pattern.items() if _matches(key, module)), default)


def _matches(key: str, module: str) -> bool:
    return ends_with(unwrapped(key), module)  # as the module's own path is


def beyond_plain_lora(config: AdapterConfig) -> dict[str, str]:
    """What of this config asks for more than W + scale · B A: the field, and words for it. Empty for plain LoRA."""
    raw = config.raw
    if config.peft_type != "LORA":
        return {"peft_type": f"peft_type {config.peft_type}"}
    found = {
        name: name
        for name in (
            "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "trainable_token_indices",
            "target_parameters", "layer_replication", "kasa_config", "arrow_config", "modules_to_save",
        )
        if raw.get(name)
    }  # fmt: skip
    if (raw.get("bias") or "none") != "none":
        found["bias"] = f"bias '{raw['bias']}'"
    init = raw.get("init_lora_weights", True)
    if init is not None and str(init).lower() not in PLAIN_INITS:
        found["init_lora_weights"] = f"init_lora_weights '{init}'"
    return found


AVERAGED = frozenset({"modules_to_save", "trainable_token_indices", "bias"})  # trained copies, which have no delta


def ensure_plain(
    config: AdapterConfig, name: str, others: Iterable[str], *, work: str, besides: frozenset[str] = frozenset()
) -> None:
    """Stop before anything is written when there is more in an adapter than what can be added up.

    `besides` are the fields of a config that are taken care of.

    Raises:
        UnsupportedAdapter: names what there is, and what helps.
    """
    beyond = {feature: words for feature, words in beyond_plain_lora(config).items() if feature not in besides}
    rest = sorted(others)
    if not any(other.endswith(".bias") for other in rest):
        beyond.pop("bias", None)  # of a base that has none, as Llama
    if "modules_to_save" in beyond and not rest:
        raise InvalidFile(f"adapter '{name}' is incomplete: it has modules_to_save, and its file no such tensor")
    found = list(beyond.values())
    if rest:
        shown = ", ".join(rest[:4]) + (f" and {len(rest) - 4} more" if len(rest) > 4 else "")
        found.append(f"the tensors {shown}")
    if found:
        raise UnsupportedAdapter(
            f"adapter '{name}' can't be {work} exactly: it has {'; '.join(found)}: {_cure(beyond)}"
        )


def _cure(beyond: Mapping[str, str]) -> str:
    if beyond and beyond.keys() <= AVERAGED:
        return (
            "these are trained copies of the base's values, which no weight scales; to average them between adapters, "
            "ask for it (mix --trained average)"
        )
    if "target_parameters" in beyond:
        return "merge it into its base (lorakit merge)"
    return (
        "merge it into its base (lorakit merge), or approximate it by plain LoRA "
        "(lorakit extract ADAPTER --base BASE --rank N)"
    )
