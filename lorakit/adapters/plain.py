"""Adapters of PEFT's other methods as plain LoRA, where that is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.as_lora import exact_factors
from lorakit.adapters.delta import Delta, made
from lorakit.adapters.source import Stage


def as_lora(adapter: Adapter, shapes: Mapping[str, tuple[int, int]] | None = None) -> Adapter:
    """The same change of the base as plain low-rank factors, which are computed when they are asked for.

    `shapes` are (out, in) of the base's linear layers, for the methods whose files don't say.

    Raises:
        UnsupportedAdapter: what it changes is not of low rank, or depends on the base; says what helps.
        InvalidFile: tensors are missing, or contradict one another.
    """
    config = adapter.config
    exact, others = exact_factors(config, adapter.others, adapter.files()[0].folder, shapes)
    deltas = {module: Delta((made(one.shape, one.make, one.rank),)) for module, one in exact.items()}
    kept = ("task_type", "revision", "modules_to_save", "bias", "trainable_token_indices")
    return Adapter(
        deltas,
        (Stage("as_lora", {"peft_type": config.peft_type}, adapter.sources),),
        others,
        replace(config, peft_type="LORA", raw={name: config.raw.get(name) for name in kept if config.raw.get(name)}),
    )
