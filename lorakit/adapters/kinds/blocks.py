"""GraLoRA and MiSS: one small change for each block of the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.adapters.kinds.factors import ExactFactors, product
from lorakit.adapters.kinds.module import Module, wide
from lorakit.errors import InvalidFile

if TYPE_CHECKING:
    import torch


def gralora(module: Module) -> ExactFactors:
    """A rank of r/k for each of k × k blocks, and `hybrid_r` for all of them: rank k r + hybrid_r (arXiv:2505.20355).

    The block in row j and column n is B[j, n-th part of r]ᵀ A[n, :, j-th part of r]ᵀ, with A (k, in/k, r) and
    B (k, r, out/k) (peft/tuners/gralora/layer.py, `get_delta_weight`).
    """
    source = module.source
    rank, blocks, hybrid = source.count("r", 32), source.count("gralora_k", 2), source.count("hybrid_r", 0, least=0)
    if rank % blocks:
        raise InvalidFile(f"'{source.folder}/adapter_config.json': r {rank} is no multiple of gralora_k {blocks}")
    scale = source.number("alpha", 64) / (rank + hybrid)
    a, b = module.take("gralora_A", blocks, None, rank), module.take("gralora_B", blocks, rank, None)
    shape = blocks * b.shape[2], blocks * a.shape[1]
    general = (
        (
            module.take("gralora_B_general.weight", shape[0], hybrid),
            module.take("gralora_A_general.weight", hybrid, shape[1]),
        )
        if hybrid
        else None
    )

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        left: torch.Tensor = torch.block_diag(*wide(b).transpose(1, 2))  # type: ignore[no-untyped-call]
        right = _spread(wide(a))
        if general:
            left, right = torch.cat([left, wide(general[0])], dim=1), torch.cat([right, wide(general[1])])
        return scale * left, right

    return product(shape, blocks * rank + hybrid, make)


def _spread(a: torch.Tensor) -> torch.Tensor:
    """A (k, in/k, r) -> (k·r, in): row (j, n, t) is A[n, :, j·r/k + t] in the n-th block of columns, else 0."""
    blocks, into, rank = a.shape
    rows = a.reshape(blocks, into, blocks, rank // blocks).permute(2, 0, 3, 1)
    spread = a.new_zeros(*rows.shape[:3], blocks, into)
    for block in range(blocks):
        spread[:, block, :, block] = rows[:, block]
    return spread.reshape(blocks * rank, blocks * into)


def miss(module: Module) -> ExactFactors:
    """blockᵀ [I I …]: the same (out, r) block for every r columns, cut off at the last (peft/tuners/miss/layer.py).

    With init_weights 'mini' the block itself repeats every `mini_r` rows.
    """
    source = module.source
    start = source.config.raw.get("init_weights", True)
    if start == "bat":
        raise source.refusal("it multiplies the base's weights (init_weights 'bat')")
    out, into = source.base_shape(module.path)
    width = source.count("mini_r", 1) if start == "mini" else out
    if out % width:
        raise InvalidFile(f"'{source.folder}': '{module.path}' has {out} outputs, no multiple of mini_r {width}")
    block = module.take("miss_block", None, width)
    rank = block.shape[0]

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        identities = torch.eye(rank, dtype=torch.float64).repeat(1, -(-into // rank))
        return wide(block).T.repeat(out // width, 1), identities[:, :into]

    return product((out, into), rank, make)
