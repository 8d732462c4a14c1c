"""What is mixed and extracted: pairs of random adapters, and a base with a fine-tune of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RANK = 16
WEIGHTS = {"first": 0.7, "second": 0.3}  # of the two adapters, by folder
SCALE = 2.0  # alpha / r of both
DENSITY = 0.5  # of ties
CHANGE = 0.03  # ‖Δ‖ / ‖W‖ of the fine-tune, of singular values 1/i for i ≤ 64

Factors = dict[str, "tuple[torch.Tensor, torch.Tensor]"]  # module: B (out, r) with all scales in it, and A (r, in)


def make_pair(folder: Path, modules: dict[str, tuple[int, int]]) -> Path:
    """Two random adapters in float32, which is what PEFT saves."""
    import torch

    for name in WEIGHTS:
        factors = {
            module: (torch.randn(out, RANK) * 0.02, torch.randn(RANK, into) * 0.02)
            for module, (out, into) in modules.items()
        }
        write_adapter(folder / name, factors, RANK, SCALE)
    return folder


def write_adapter(folder: Path, factors: Factors, rank: int, scale: float) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    named = {f"base_model.model.{module}.lora_B.weight": b for module, (b, _) in factors.items()}
    named |= {f"base_model.model.{module}.lora_A.weight": a for module, (_, a) in factors.items()}
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "bias": "none",
        "target_modules": sorted(factors), "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def read_factors(folder: Path) -> Factors:
    """As they are stored, without their scale."""
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    modules = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    return {
        module.removeprefix("base_model.model."): (stored[f"{module}.lora_B.weight"], stored[f"{module}.lora_A.weight"])
        for module in modules
    }


def make_tuned(folder: Path, base: Path) -> None:
    """The base with a change of decaying singular values in every linear layer, rounded to bf16 as trainers do."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if not name.endswith("_proj.weight"):
                continue
            rank = min(64, *weight.shape)
            u, v = (torch.linalg.qr(torch.randn(side, rank))[0] for side in weight.shape)
            spectrum = 1 / torch.arange(1, rank + 1)
            spectrum *= CHANGE * weight.float().norm() / spectrum.norm()
            tensors[name] = (weight.float() + (u * spectrum) @ v.T).bfloat16()
        save_file(tensors, file, metadata={"format": "pt"})


def changes(tuned: Path, base: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each linear layer, and what changed in it, (out, in) in float32."""
    from safetensors.torch import load_file

    for file in sorted(tuned.glob("*.safetensors")):
        before, after = load_file(base / file.name), load_file(file)
        for name in after:
            if name.endswith("_proj.weight"):
                yield name.removesuffix(".weight"), after[name].float() - before[name].float()
