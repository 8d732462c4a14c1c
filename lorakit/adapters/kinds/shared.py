"""VeRA, PVeRA, VB-LoRA and Uni-LoRA: factors put together from what all modules share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit.adapters.kinds.factors import ExactFactors, product
from lorakit.adapters.kinds.module import Module, wide
from lorakit.errors import InvalidFile
from lorakit.files.safetensors import StoredTensor
from lorakit.files.tensors import load_tensor

if TYPE_CHECKING:
    import torch


def vera(module: Module) -> ExactFactors:
    """diag(λ_b) B diag(λ_d) A, with the first rows and columns of the shared B and A (arXiv:2310.11454, §3.1)."""
    scales = module.take("vera_lambda_d", None)
    return _scaled_projections(module, "vera", scales, scales.shape[0])


def pvera(module: Module) -> ExactFactors:
    """VeRA with the means alone: the second half of A and λ_d is for the variance (peft/tuners/pvera/layer.py)."""
    if module.source.config.raw.get("sample_at_inference"):
        raise module.source.refusal("it draws its weights anew for every input (sample_at_inference)")
    scales = module.take("pvera_lambda_d", None)
    return _scaled_projections(module, "pvera", scales, scales.shape[0] // 2)


def _scaled_projections(module: Module, kind: str, scales: StoredTensor, rank: int) -> ExactFactors:
    gains = module.take(f"{kind}_lambda_b", None)
    shape = module.base_shape(gains.shape[0])
    stored = _stored_projections(module, kind, scales.shape[0], rank)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (wide(stored[0]), wide(stored[1])) if stored else _drawn_projections(module, scales.shape[0], rank)
        left = wide(gains)[:, None] * b[: shape[0]].double() * wide(scales)[:rank]
        return left, a[:rank, : shape[1]].double()

    return product(shape, rank, make)


def _stored_projections(module: Module, kind: str, rows: int, rank: int) -> tuple[StoredTensor, StoredTensor] | None:
    """A (rows, in) and B (out, rank), as wide as the widest module; None where they come from a seed.

    Raises:
        InvalidFile: they are missing, or too small for this module.
    """
    source = module.source
    if source.config.raw.get("save_projection") is False and not source.shared:
        for name in source.modules:
            source.base_shape(name)
        return None
    a, b = source.shared_tensor(f"{kind}_A", rows, None), source.shared_tensor(f"{kind}_B", None, rank)
    out, into = source.base_shape(module.path)
    if a.shape[1] < into or b.shape[0] < out:
        raise InvalidFile(
            f"'{source.folder}': the shared projections are for modules up to {[b.shape[0], a.shape[1]]}, "
            f"and '{module.path}' is {[out, into]}"
        )
    return a, b


def _drawn_projections(module: Module, rows: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As PEFT draws what it didn't save: A, then B, from one generator on the CPU (peft/tuners/vera/model.py)."""
    import torch

    source = module.source
    shapes = [source.base_shape(name) for name in source.modules]
    generator = torch.Generator().manual_seed(source.count("projection_prng_key", 0, least=0))
    a = torch.empty(rows, max(into for _, into in shapes))
    b = torch.empty(max(out for out, _ in shapes), rank)
    return (
        torch.nn.init.kaiming_uniform_(a, generator=generator),
        torch.nn.init.kaiming_uniform_(b, generator=generator),
    )


def vblora(module: Module) -> ExactFactors:
    """B A, each a row of tiles, and each tile a mixture of the `topk` vectors of the bank that its logits choose.

    Logits are (r, tiles of A, vectors) and (tiles of B, r, vectors); a file may hold the mixtures instead, without the
    last weight of each, which sum to 1 (`save_only_topk_weights`; peft/tuners/vblora/{layer,model}.py).
    """
    bank = module.source.shared_tensor("vblora_vector_bank", None, None)
    chosen_a = _mixture(module, "vblora_logits_A", bank.shape[0])
    chosen_b = _mixture(module, "vblora_logits_B", bank.shape[0])
    rank, tiles_in = chosen_a[0].shape[:2]
    tiles_out, other = chosen_b[0].shape[:2]
    if other != rank:
        raise InvalidFile(f"'{module.source.folder}': A of '{module.path}' has rank {rank}, B has {other}")
    length = bank.shape[1]

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = _mixed(chosen_a, bank, module), _mixed(chosen_b, bank, module)
        return b.transpose(1, 2).flatten(0, 1), a.flatten(1)

    return product((tiles_out * length, tiles_in * length), rank, make)


def _mixture(module: Module, name: str, vectors: int) -> tuple[StoredTensor, ...]:
    """The logits; or the indices and all but the last of their weights."""
    if f"{name}_topk_indices" not in module.parts:
        return (module.take(name, None, None, vectors),)
    indices = module.take(f"{name}_topk_indices", None, None, None)
    return indices, module.take(f"{name}_topk_weights", *indices.shape[:2], indices.shape[2] - 1)


def _mixed(chosen: tuple[StoredTensor, ...], bank: StoredTensor, module: Module) -> torch.Tensor:
    """(i, j, length): the weighted sum of the chosen vectors for each tile."""
    import torch

    if len(chosen) == 1:
        logits, indices = load_tensor(chosen[0]).topk(module.source.count("topk", 2), dim=-1)
        weights = logits.double().softmax(-1)
    else:
        indices, first = load_tensor(chosen[0]).long(), wide(chosen[1])
        weights = torch.cat([first, 1 - first.sum(-1, keepdim=True)], dim=-1)
    return (weights.unsqueeze(-1) * _picked(bank, indices, chosen[0])).sum(-2)


def unilora(module: Module) -> ExactFactors:
    """B A, each θ[indices] ∘ scales (peft/tuners/unilora/layer.py)."""
    theta = module.source.shared_tensor("unilora_theta_d", None)
    indices_a = module.take("unilora_indices_A", None, None)
    rank, into = indices_a.shape
    indices_b = module.take("unilora_indices_B", None, rank)
    scales_a = module.take("unilora_scales_A", rank, into)
    scales_b = module.take("unilora_scales_B", *indices_b.shape)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return (
            _picked(theta, load_tensor(indices_b).long(), indices_b) * wide(scales_b),
            _picked(theta, load_tensor(indices_a).long(), indices_a) * wide(scales_a),
        )

    return product((indices_b.shape[0], into), rank, make)


def _picked(rows: StoredTensor, indices: torch.Tensor, origin: StoredTensor) -> torch.Tensor:
    """Raises InvalidFile when an index points outside."""
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < rows.shape[0]:
        raise InvalidFile(f"'{origin.file}': '{origin.name}' points outside the {rows.shape[0]} rows of '{rows.name}'")
    return wide(rows)[indices]
