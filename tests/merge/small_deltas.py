"""A model of one linear weight W ~ N(0, 0.02), and a rank-16 adapter whose delta is a given part of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHT = "model.layers.0.self_attn.q_proj.weight"
RANK = 16


def write_one_weight(folder: Path, dtype: torch.dtype, shape: tuple[int, int] = (384, 512)) -> Path:
    folder.mkdir()
    torch.manual_seed(0)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    save_file({WEIGHT: (0.02 * torch.randn(shape)).to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_delta(folder: Path, base: Path, ratio: float, seed: int = 1) -> Path:
    """‖Δ‖ = ratio · ‖W‖."""
    folder.mkdir()
    torch.manual_seed(seed)
    weight = tensor(base).double()
    b, a = torch.randn(weight.shape[0], RANK), torch.randn(RANK, weight.shape[1])
    b *= float(ratio * weight.norm() / (b.double() @ a.double()).norm())
    module = f"base_model.model.{WEIGHT.removesuffix('.weight')}"
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


def tensor(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[WEIGHT]


def exact_delta(adapter: Path) -> torch.Tensor:
    """B A in float64."""
    b, a = (
        next(value for name, value in load_file(adapter / "adapter_model.safetensors").items() if part in name)
        for part in ("lora_B", "lora_A")
    )
    return b.double() @ a.double()


def survival(base: Path, adapter: Path, out: Path) -> float:
    """⟨W'-W, Δ⟩ / ‖Δ‖², from the numbers on disk, in float64."""
    delta = exact_delta(adapter)
    return float(((tensor(out).double() - tensor(base).double()) * delta).sum() / delta.square().sum())
