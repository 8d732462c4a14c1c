"""AdaLoRA and DeLoRA: factors of the module's own with a diagonal between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.adapters.kinds.factors import ExactFactors, product
from lorakit.adapters.kinds.module import Module, wide

if TYPE_CHECKING:
    import torch

RANK_OFFSET = 1e-5  # peft/tuners/adalora/layer.py divides by it added to the rank
LEAST_NORM = 1e-4  # peft/tuners/delora/layer.py, `_compute_delta`


def adalora(module: Module) -> ExactFactors:
    """s · B diag(E) A, s = alpha / (init_r + 1e-5) whatever rank training left (peft/tuners/adalora/model.py).

    An alpha of 0 or less stands for the rank that is left.
    """
    source = module.source
    if source.config.raw.get("layer_replication"):
        raise source.refusal("it repeats layers of its base (layer_replication)")
    a = module.take("lora_A", None, None)
    rank, into = a.shape
    b, e = module.take("lora_B", None, rank), module.take("lora_E", rank, 1)
    alpha = source.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else rank) / (source.count("init_r", 12) + RANK_OFFSET)
    return product((b.shape[0], into), rank, lambda: (scale * wide(b) * wide(e).T, wide(a)))


def delora(module: Module) -> ExactFactors:
    """B diag(λ / (r ‖Aᵢ‖ ‖Bⁱ‖)) A diag(w), w the norms of the base's columns, which are in the file."""
    if "delora_w_norm" not in module.parts:
        raise module.source.refusal(f"the norms of the base's columns for '{module.path}' are not in its file")
    a = module.take("delora_A", None, None)
    rank, into = a.shape
    b, strength = module.take("delora_B", None, rank), module.take("delora_lambda", 1)
    norms = module.take("delora_w_norm", into)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        left, right = wide(b), wide(a)
        lengths = left.norm(dim=0).clamp(min=LEAST_NORM) * right.norm(dim=1).clamp(min=LEAST_NORM)
        return left * (wide(strength) / (rank * lengths)), right * wide(norms)

    return product((b.shape[0], into), rank, make)
