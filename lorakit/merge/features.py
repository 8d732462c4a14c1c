"""Which kinds of LoRA can be merged, and why the others can't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lorakit.adapters.config import PLAIN_INITS, AdapterConfig
from lorakit.errors import UnsupportedAdapter

# Deterministic in the base, so that what they took out of it can be computed again.
REPRODUCIBLE: Mapping[str, Literal["pissa", "olora"]] = {"pissa": "pissa", "olora": "olora"}

_UNMERGEABLE: Mapping[str, str] = {
    "alora_invocation_tokens": "it acts only after its invocation tokens, which no merged weight can",
    "arrow_config": "it routes between experts at each token",
    "kasa_config": "it was trained on a base with its smallest singular values cut off",
    "use_bdlora": "its factors are block-diagonal",
}


def require_mergeable_lora(config: AdapterConfig, name: str) -> None:
    """Raises UnsupportedAdapter for what no merge can do, or not without more than the adapter holds."""
    found = [f"{key} ({why})" for key, why in _UNMERGEABLE.items() if config.raw.get(key)]
    init = str(config.raw.get("init_lora_weights", True)).lower()
    if init not in PLAIN_INITS | REPRODUCIBLE.keys() and config.raw.get("init_lora_weights") is not None:
        found.append(
            f"init_lora_weights '{init}', which changed the base it was trained on in a way that can't be computed "
            f"again (save it with path_initial_model_for_weight_conversion)"
        )
    if found:
        raise UnsupportedAdapter(f"adapter '{name}' can't be merged exactly: it has {'; '.join(found)}")


def changed_start(config: AdapterConfig) -> Literal["pissa", "olora"] | None:
    """The method by which the base was changed before training, where that can be computed again."""
    return REPRODUCIBLE.get(str(config.raw.get("init_lora_weights")).lower())
