"""LoHa and LoKr: Hadamard and Kronecker products of small matrices (peft/tuners/{loha,lokr}/layer.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.adapters.kinds.factors import ExactFactors, dense, product, row_products
from lorakit.adapters.kinds.module import Module, wide
from lorakit.errors import InvalidFile

if TYPE_CHECKING:
    import torch


def loha(module: Module) -> ExactFactors:
    """s (w1_a w1_b) ∘ (w2_a w2_b): rank r² (FedPara, arXiv:2108.06098, Proposition 1)."""
    module.refuse_convolution("hada_t1", "hada_t2")
    rank, scale = _rank_and_scale(module)
    w1_a = module.take("hada_w1_a", None, rank)
    w1_b = module.take("hada_w1_b", rank, None)
    shape = w1_a.shape[0], w1_b.shape[1]
    w2_a = module.take("hada_w2_a", shape[0], rank)
    w2_b = module.take("hada_w2_b", rank, shape[1])
    if rank * rank >= min(shape):  # r² columns would be more to hold than the matrix itself
        return dense(shape, lambda: scale * (wide(w1_a) @ wide(w1_b)) * (wide(w2_a) @ wide(w2_b)))
    return ExactFactors(
        shape,
        rank * rank,
        lambda: (scale * row_products(wide(w1_a), wide(w2_a)), row_products(wide(w1_b).T, wide(w2_b).T).T),
    )


def lokr(module: Module) -> ExactFactors:
    """s · kron(w1, w2), each a product or whole: kron(B₁ A₁, B₂ A₂) = kron(B₁, B₂) kron(A₁, A₂), of rank r₁ r₂.

    A whole side of (m, n) has rank min(m, n), as itself beside an identity.
    """
    module.refuse_convolution("lokr_w1", "lokr_w2", "lokr_t2")
    rank, scale = _rank_and_scale(module)
    one, other = _side(module, "lokr_w1", rank), _side(module, "lokr_w2", rank)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        (b1, a1), (b2, a2) = one.make(), other.make()
        return scale * torch.kron(b1, b2), torch.kron(a1, a2)

    shape = one.shape[0] * other.shape[0], one.shape[1] * other.shape[1]
    return ExactFactors(shape, one.rank * other.rank, make)


def _side(module: Module, name: str, rank: int) -> ExactFactors:
    halves = [part for part in (f"{name}_a", f"{name}_b") if part in module.parts]
    if name in module.parts:
        if halves:
            raise InvalidFile(
                f"'{module.source.folder}': '{module.path}' has '{name}' and '{halves[0]}' for one matrix"
            )
        whole = module.take(name, None, None)
        return dense((whole.shape[0], whole.shape[1]), lambda: wide(whole))
    left, right = module.take(f"{name}_a", None, rank), module.take(f"{name}_b", rank, None)
    return product((left.shape[0], right.shape[1]), rank, lambda: (wide(left), wide(right)))


def _rank_and_scale(module: Module) -> tuple[int, float]:
    """r and alpha/r, by the module's own patterns."""
    rank, alpha = module.source.count("r", 8), module.source.number("alpha", 8)
    config = replace(module.source.config, rank=rank, alpha=float(alpha), use_rslora=False)
    return config.rank_of(module.path), config.scale_of(module.path)
