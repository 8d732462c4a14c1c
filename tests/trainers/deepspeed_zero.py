"""DeepSpeed's ZeRO 1, 2 and 3 on two ranks, two checkpoints each.

python -m torch.distributed.run --nproc_per_node 2 -m tests.trainers.deepspeed_zero BASE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from tests.trainers.tiny import base_model, batches, leave, say


def write(base: str, out: Path, stage: int, **settings: Any) -> None:
    model = base_model(base)
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {}}, **settings,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step, batch in enumerate(batches(4, seed=dist.get_rank()), 1):
        engine.backward(engine(**batch).loss)
        engine.step()
        if step % 2 == 0:
            engine.save_checkpoint(str(out / f"zero{stage}"))
            say(f"zero{stage}", "save", step=step)
    save_gathered(model, out / "trained" / f"zero{stage}.pt")


class Odd(torch.nn.Module):
    """Sizes that no number of ranks divides, a head that is the embedding, a part that is frozen, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 7)
        self.frozen = torch.nn.Linear(7, 7)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(7, 7) for _ in range(3))
        self.norm = torch.nn.LayerNorm(7)
        self.head = torch.nn.Linear(7, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor([1.5, 0.5]))
        self.frozen.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embedding(tokens)) * self.scale[0]
        for layer in self.layers:
            hidden = layer(hidden).tanh()
        scores = self.head(self.norm(hidden))
        return torch.nn.functional.cross_entropy(scores, (tokens + 1) % 11)


def odd(out: Path, name: str, zero: dict[str, Any], **settings: Any) -> None:
    """Two groups of parameters; whole.pt beside it is the module's own state, gathered."""
    torch.manual_seed(0)
    model = Odd()
    plain = [one for place, one in model.named_parameters() if one.requires_grad and "bias" not in place]
    biases = [one for place, one in model.named_parameters() if one.requires_grad and "bias" in place]
    groups = [{"params": plain, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}, **settings,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    for step in range(3):
        engine.backward(engine((torch.arange(4) + step + dist.get_rank()) % 11))
        engine.step()
    engine.save_checkpoint(str(out / "odd" / name), tag="without-frozen", exclude_frozen_parameters=True)
    engine.save_checkpoint(str(out / "odd" / name), tag="step-3")
    save_gathered(model, out / "odd" / name / "whole.pt")


def save_gathered(model: Any, file: Path) -> None:
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        if dist.get_rank() == 0:
            file.parent.mkdir(exist_ok=True)
            torch.save(model.state_dict(), file)
    dist.barrier()


if __name__ == "__main__":
    base, out = sys.argv[1], Path(sys.argv[2])
    deepspeed.init_distributed("gloo")
    write(base, out, 1)
    write(base, out, 2, bf16={"enabled": True})
    write(base, out, 3)
    odd(out, "zero0", {"stage": 0})
    odd(out, "zero1", {"stage": 1})
    odd(out, "zero2", {"stage": 2, "round_robin_gradients": True}, bf16={"enabled": True})
    odd(out, "zero3", {"stage": 3, "sub_group_size": 60, "stage3_param_persistence_threshold": 0})
    odd(out, "zero3-bf16", {"stage": 3}, bf16={"enabled": True})
    leave()
